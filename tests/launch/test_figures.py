"""History, evaluation, monitor, picture and summary: what a run keeps and shows."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launch.evaluation import Evaluation, evaluation_of, paired_p_value
from launch.history import History, StepRecord
from launch.monitor import AREAS, Monitor, wandb_row
from launch.picture import draw
from launch.summary import summarise
from rollout.config import MonitorConfig
from rollout.fleet import ShardInfo
from rollout.types import Group, Prompt, Status, Trajectory

RECORD = StepRecord(
    step=1,
    version=0,
    reward_mean=0.4,
    reward_std=0.5,
    exact_rate=0.4,
    length_mean=100.0,
    length_p95=180.0,
    length_max=200,
    truncated_rate=0.0,
    num_trajectories=8,
    num_failed=1,
    num_tokens=800,
    num_groups_filtered=1,
    staleness_max=0,
    rollout_s=2.0,
    train_s=1.0,
    sync_s=0.5,
    save_s=0.0,
    stall_s=0.1,
    mismatch_kl=1e-6,
    loss=0.1,
    grad_norm=1.0,
    clip_fraction=0.0,
    entropy=0.5,
    lr=1e-4,
    reference_kl=0.0,
    tis_weight_mean=1.0,
    tis_capped_fraction=0.0,
    kv_usage_max=0.25,
    is_skipped=False,
    trajectories_digest="0011223344556677",
)


def evaluation(rewards: list[float | None]) -> Evaluation:
    return Evaluation(
        rewards=tuple(rewards),
        exact=tuple(None if r is None else r == 1 for r in rewards),
        lengths=(10,) * len(rewards),
        version=0,
        duration_s=1.0,
    )


def test_history_forgets_steps_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    history = History(path)
    for step in (1, 2, 3):
        history.add(replace(RECORD, step=step))
    history.amend_save_s(0.7)
    path.write_text(path.read_text() + '{"step": 4, "ver')  # killed while writing
    again = History(path)
    again.restore(2)
    again.add(replace(RECORD, step=3, reward_mean=0.9))
    last = History(path)
    last.restore(10)
    assert [r.step for r in last.steps] == [1, 2, 3]
    assert last.steps[-1].reward_mean == 0.9


def test_evaluation_counts_failures_apart(tmp_path: Path) -> None:
    def group(index: int, reward: float | None) -> Group:
        sample = Trajectory(
            group_id=f"eval/{index}",
            sample_index=0,
            seed=1,
            prompt_token_ids=(1,),
            token_ids=[1, 2],
            status=Status.COMPLETED,
            reward=reward,
        )
        if reward is None:
            sample.fail("scorer raised")
        return Group(group_id=sample.group_id, prompt=Prompt(token_ids=(1,), prompt_id="p"), trajectories=[sample])

    got = evaluation_of([group(2, 1.0), group(0, 0.0), group(1, None)], version=3, duration_s=2.0)
    assert got.rewards == (0.0, None, 1.0)
    assert got.reward == 0.5 and got.num_failed == 1
    got.save(tmp_path / "e.json")
    assert Evaluation.load(tmp_path / "e.json") == got


def test_paired_test_against_the_binomial() -> None:
    before = evaluation([0.0] * 10 + [1.0] * 2 + [1.0] * 50)
    after = evaluation([1.0] * 10 + [0.0] * 2 + [1.0] * 50)
    # 10 of 12 changed for the better: 2 · (C(12,10) + C(12,11) + C(12,12)) / 2^12
    assert paired_p_value(before, after) == pytest.approx(2 * (66 + 12 + 1) / 4096)
    assert paired_p_value(before, before) == 1.0
    with pytest.raises(ValueError, match="as many"):
        paired_p_value(before, evaluation([1.0]))


def test_summary_holds_the_promised_keys(tmp_path: Path) -> None:
    shards = tuple(
        ShardInfo(rank=r, num_experts=8, num_local_experts=4, kv_tokens=1, vocab_size=1, max_model_len=1)
        for r in range(2)
    )
    summary = summarise(
        before=evaluation([0.0, 1.0]),
        after=evaluation([1.0, None]),
        steps=[RECORD, replace(RECORD, step=2, mismatch_kl=0.0, is_skipped=True)],
        shards=shards,
        num_trainer_ranks=2,
        num_trainer_restarts=1,
        start_s=3.0,
        total_s=20.0,
    )
    summary.save(tmp_path / "summary.json")
    got = json.loads((tmp_path / "summary.json").read_text())
    assert got["eval_reward_before"] == 0.5 and got["eval_reward_after"] == 1.0 and got["gain"] == 0.5
    assert got["experts_per_shard"] == [4, 4] and got["num_engine_shards"] == 2 and got["num_trainer_ranks"] == 2
    assert got["num_trainer_restarts"] == 1
    assert got["num_weight_syncs"] == 2
    assert got["num_trajectories"] == 20 and got["num_trajectories_failed"] == 3
    assert got["num_tokens_generated"] == 1640
    assert got["mismatch_kl"] == 1e-6, "a skipped step measures nothing"
    assert got["timing_s"]["rollout"] == 4.0
    assert got["hardware"]["cores"] >= 1 and got["versions"]["torch"]


def test_picture_is_drawn(tmp_path: Path) -> None:
    draw([RECORD], tmp_path / "one.png", "one step")
    draw([replace(RECORD, step=s) for s in range(1, 30)], tmp_path / "many.png", "many", (0.3, 0.7))
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "many.png").stat().st_size > 10_000


def test_every_wandb_key_has_an_axis() -> None:
    areas = {area for group in AREAS.values() for area in group}
    row = wandb_row(RECORD)
    assert {key.split("/")[0] for key in row} <= areas
    promised = {
        "rollout/reward_mean",
        "rollout/response_length_mean",
        "rollout/truncated_rate",
        "perf/tokens_per_s",
        "engine/kv_cache_usage",
        "perf/longest_sample_tokens_per_s",
        "async/staleness_max",
        "mismatch_kl/all",
        "sync/stall_ms",
        "timing_s/rollout",
        "timing_s/train",
        "timing_s/sync",
        "rollout/step",
        "train/step",
    }
    assert promised <= set(row)


def test_plain_lines_name_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(MonitorConfig(wandb_mode="disabled", progress="plain"), tmp_path, {}, num_steps=5)
    assert list(monitor.track([1, 2], "rollout", 2)) == [1, 2]
    with monitor.phase("train"):
        monitor.step(RECORD)
    monitor.evaluation(evaluation([1.0]), "before", 0)
    monitor.finish()
    line, evaluated = capsys.readouterr().out.splitlines()
    assert "step   1/5" in line and "reward 0.400" in line and "400 tokens/s" in line and "rollout 2.0 s" in line
    assert evaluated.startswith("eval before: reward 1.000")


def test_rich_bars_run_without_a_terminal(tmp_path: Path) -> None:
    monitor = Monitor(MonitorConfig(wandb_mode="disabled", progress="rich"), tmp_path, {}, num_steps=5)
    with monitor.phase("sync"):
        assert list(monitor.track("ab", "rollout", 2)) == ["a", "b"]
    monitor.step(RECORD)
    monitor.finish()
    monitor.finish()


def test_wandb_failure_is_counted_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    class Broken:
        def log(self, row: dict[str, float]) -> None:
            raise RuntimeError("no space left")

        def finish(self, exit_code: int) -> None:
            raise RuntimeError("no space left")

        def define_metric(self, name: str, step_metric: str | None = None) -> None: ...

    monkeypatch.setattr(wandb, "init", lambda **settings: Broken())
    monitor = Monitor(MonitorConfig(progress="off"), tmp_path, {}, num_steps=5)
    monitor.step(RECORD)
    monitor.step(RECORD)
    monitor.finish()
    assert monitor.num_wandb_failures == 3
    assert len([r for r in caplog.records if "W&B" in r.message]) == 1


@pytest.mark.slow
def test_wandb_offline_needs_no_account(tmp_path: Path) -> None:
    monitor = Monitor(MonitorConfig(progress="off"), tmp_path, {"trainer": {"lr": 1e-4}}, num_steps=1)
    monitor.step(RECORD)
    monitor.finish()
    assert monitor.num_wandb_failures == 0
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert asdict(RECORD)["step"] == 1
