"""The fault campaign: its plan, its search for victims, its verdict; and a short one on real engines."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch

from kernels.gumbel_sample import gumbel_noise
from launch.chaos import Options, figures_of, is_good, main, overrides_of, record_of
from launch.chaos_campaign import Kill, line, read_kills
from launch.chaos_operator import Operator
from launch.chaos_verdict import Ledger, Ties, failures, num_duplicated, num_lost, read_ledger, sameness
from launch.chaos_victims import Kind, by_kind, is_gone, is_worker, numbers_of, plan
from launch.compose import compose
from launch.token_counts import TokenCount, total_tokens
from rollout.config import JournalConfig
from rollout.cursor import Cursor
from rollout.journal.opening import open_journal
from rollout.journal.records import TrajectoryKey
from rollout.seeds import trajectory_seed
from rollout.types import (
    ChunkResult,
    FinishReason,
    Prompt,
    RolloutRequest,
    SamplingParams,
    Status,
    Trajectory,
    VersionSpan,
)

VOCAB = 64
TIES = Ties(temperature=1.0, vocab_size=VOCAB, within=1e-4)
PROMPT = (1, 2, 3)
N = 2
KILL = Kill(
    number=1,
    kind="shard",
    signal="SIGKILL",
    title="ray::Shard",
    step=3,
    num_pending_groups=2,
    recovery_s=81.5,
    num_restarts=0,
)
Output = tuple[tuple[int, ...], tuple[float, ...]]
PLAIN: Output = ((5, 6, 7), (-0.5, -0.25, -1.0))


def request(group_ids: Sequence[str]) -> RolloutRequest:
    return RolloutRequest(
        prompts=tuple(Prompt(token_ids=PROMPT, prompt_id=one) for one in group_ids),
        n_samples_per_prompt=N,
        sampling=SamplingParams(max_tokens=8),
        run_seed=0,
        group_ids=tuple(group_ids),
    )


def chunk(output: Output) -> ChunkResult:
    return ChunkResult(
        trajectory_id="h:g/0",
        token_ids=output[0],
        logprobs=output[1],
        spans=(VersionSpan(version=0, start=0, stop=len(output[0])),),
        finish_reason=FinishReason.STOP,
        shard=0,
    )


def ended(group_id: str, index: int, output: Output, error: str | None) -> Trajectory:
    seed = trajectory_seed(0, group_id, index)
    trajectory = Trajectory(group_id=group_id, sample_index=index, seed=seed, prompt_token_ids=PROMPT)
    trajectory.append(chunk(output))
    if error is not None:
        trajectory.fail(error)
        return trajectory
    trajectory.move_to(Status.COMPLETED)
    trajectory.finish_reason, trajectory.reward = FinishReason.STOP, 1.0
    return trajectory


async def write_journal(
    config: JournalConfig,
    steps: Sequence[Sequence[str]],
    outputs: dict[str, Output],
    errors: dict[str, str],
    unfinished: Sequence[str],
) -> None:
    async with open_journal(config) as journal:
        for number, group_ids in enumerate(steps, start=1):
            await journal.submit("run", request(group_ids), f"h{number}")
            for group_id in group_ids:
                for index in range(N):
                    name = f"{group_id}/{index}"
                    key = TrajectoryKey(run_id="run", group_id=group_id, sample_index=index)
                    output = outputs.get(name, PLAIN)
                    await journal.append_chunk(key, 0, 0, chunk(output))
                    if name not in unfinished:
                        await journal.finish(key, 0, ended(group_id, index, output, errors.get(name)))
            if not any(name.startswith(one) for one in group_ids for name in unfinished):
                await journal.acknowledge("run", group_ids, f"step {number}", now=float(number))


def run_of(
    folder: Path,
    steps: Sequence[Sequence[str]] = (("s1/0", "s1/1"), ("s2/0", "s2/1")),
    *,
    outputs: dict[str, Output] | None = None,
    errors: dict[str, str] | None = None,
    unfinished: Sequence[str] = (),
    learned: Sequence[Sequence[str]] | None = None,
) -> Ledger:
    """What is found of a run that made these steps, with a checkpoint after each."""
    config = JournalConfig(dsn=f"sqlite:///{folder / 'journal.sqlite'}", group_commit_ms=0.0)
    asyncio.run(write_journal(config, steps, outputs or {}, errors or {}, unfinished))
    for number, group_ids in enumerate(learned or steps, start=1):
        path = folder / "checkpoints" / f"step-{number:06d}" / "cursor.json"
        path.parent.mkdir(parents=True)
        path.write_text(Cursor(step=number, version=number, data_cursor=0, learned=tuple(group_ids)).to_json())
    return read_ledger(folder, config)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    pair = (tmp_path / "disturbed", tmp_path / "undisturbed")
    for folder in pair:
        folder.mkdir()
    return pair


def test_two_equal_runs_have_nothing_to_show(folders: tuple[Path, Path]) -> None:
    mine, theirs = run_of(folders[0]), run_of(folders[1])
    assert num_lost(mine, 4, N) == num_duplicated(mine) == 0 and failures(mine) == {}
    same = sameness(mine, theirs, TIES, groups_per_step=2)
    assert (same.num_compared, same.num_equal, same.num_near_ties, same.num_after_near_tie) == (8, 8, 0, 0)
    assert mine.num_tokens == 8 * len(PLAIN[0])


def test_a_missing_group_and_an_unfinished_trajectory_are_lost(folders: tuple[Path, Path]) -> None:
    assert num_lost(run_of(folders[0], unfinished=["s2/1/0"]), 4, N) == 1
    assert num_lost(run_of(folders[1], learned=[["s1/0", "s1/1"], ["s2/0"]]), 4, N) == N


def test_a_group_learned_from_twice_is_seen(folders: tuple[Path, Path]) -> None:
    twice = run_of(folders[0], learned=[["s1/0", "s1/1"], ["s1/1", "s2/0", "s2/1"]])
    assert num_duplicated(twice) == 2, "it was learned from again, by a checkpoint it is not acknowledged to"
    assert num_lost(twice, 4, N) == 0
    two_keys = run_of(folders[1])
    two_keys.num_keys["s1/0"] += 1
    assert num_duplicated(two_keys) == 1


def test_failures_are_counted_by_reason_and_differ(folders: tuple[Path, Path]) -> None:
    mine, theirs = run_of(folders[0], errors={"s1/0/1": "reward: died"}), run_of(folders[1])
    assert failures(mine) == {"reward: died": 1} and num_lost(mine, 4, N) == 0
    (difference,) = sameness(mine, theirs, TIES, groups_per_step=2).differences
    assert difference.startswith("s1/0/1: ('failed'")


def near_tie_pair(group_id: str) -> tuple[Output, Output]:
    """Two outputs of member 0 that part at token 1, where the scores of both candidates are the same."""
    noise = gumbel_noise(torch.tensor([trajectory_seed(0, group_id, 0)]), torch.tensor([len(PROMPT) + 1]), VOCAB)[
        0
    ].tolist()
    score = min(noise[6], noise[9]) - 0.5
    return ((5, 6, 7), (-0.5, score - noise[6], -1.0)), ((5, 9, 8), (-0.5, score - noise[9], -2.0))


def test_what_follows_a_near_tie_is_counted_apart(folders: tuple[Path, Path]) -> None:
    mine, theirs = near_tie_pair("s1/0")
    other: Output = ((5, 6, 8), (-0.5, -0.25, -3.0))
    same = sameness(
        run_of(folders[0], outputs={"s1/0/0": mine, "s2/1/1": other}),
        run_of(folders[1], outputs={"s1/0/0": theirs}),
        TIES,
        groups_per_step=2,
    )
    assert (same.num_equal, same.num_near_ties, same.num_after_near_tie) == (6, 1, 1) and not same.differences


def test_a_difference_in_the_step_of_a_near_tie_is_a_difference(folders: tuple[Path, Path]) -> None:
    mine, theirs = near_tie_pair("s1/0")
    other: Output = ((5, 6, 8), (-0.5, -0.25, -30.0))
    same = sameness(
        run_of(folders[0], outputs={"s1/0/0": mine, "s1/1/1": other}),
        run_of(folders[1], outputs={"s1/0/0": theirs}),
        TIES,
        groups_per_step=2,
    )
    assert same.num_near_ties == 1 and len(same.differences) == 1


def test_figures_and_their_targets(folders: tuple[Path, Path]) -> None:
    mine, theirs = run_of(folders[0]), run_of(folders[1])
    config = compose(
        [
            "experiment=tiny_grpo",
            "trainer.num_steps=2",
            "trainer.prompts_per_step=2",
            f"sampling.n_samples_per_prompt={N}",
        ]
    )
    num_durable = mine.num_tokens
    for num_generated, is_expected in ((num_durable, True), (2 * num_durable, False)):
        figures = figures_of(config, mine, theirs, num_generated)
        record = {"options": {"kills": 1}} | figures | record_of([KILL], [])
        assert record["regenerated_token_ratio"] == num_generated / num_durable - 1
        assert is_good(record) is is_expected
        assert not is_good(record | {"num_lost": 1}) and not is_good(record | {"num_kills": 0})


def test_the_plan_has_every_kind_in_each_round_by_both_signals_in_two() -> None:
    strikes = list(islice(plan(3, 5.0), 4 * len(Kind)))
    assert strikes == list(islice(plan(3, 5.0), 4 * len(Kind))) != list(islice(plan(4, 5.0), 4 * len(Kind)))
    for start in range(0, len(strikes), len(Kind)):
        assert {strike.kind for strike in strikes[start : start + len(Kind)]} == set(Kind)
    both = {(strike.kind, strike.signal) for strike in strikes[: 2 * len(Kind)]}
    assert both == {(kind, number) for kind in Kind for number in (signal.SIGKILL, signal.SIGSTOP)}
    assert all(0 <= strike.delay_s < 5 and 0 <= strike.draw < 1 for strike in strikes)


@pytest.fixture
def pretenders() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes with titles as Ray and vLLM give them."""
    titles = ["ray::Shard.generate", "ray::Controller", "VLLM::EngineCore_DP0", "ray::IDLE"]
    started = [
        subprocess.Popen([title, "-c", "read"], executable="/bin/bash", stdin=subprocess.PIPE) for title in titles
    ]
    yield started
    for process in started:
        process.kill()
        process.communicate()


def test_victims_are_found_by_their_titles(pretenders: list[subprocess.Popen[bytes]]) -> None:
    os.kill(pretenders[0].pid, signal.SIGSTOP)
    found = by_kind(os.getpid())
    first = {kind: [process.pid for process in some] for kind, some in found.items()}
    shard, controller, core, _ = (process.pid for process in pretenders)
    assert first == {
        Kind.SHARD: [shard],
        Kind.ENGINE_CORE: [core],
        Kind.CONTROLLER: [controller],
        Kind.REWARD: [],
        Kind.TRAINER: [],
        Kind.DRIVER: [os.getpid()],
    }
    assert not is_gone(found[Kind.SHARD][0]), "a stopped process is there"
    assert [is_worker(psutil.Process(process.pid)) for process in pretenders] == [True, True, True, False]
    pretenders[1].kill()
    psutil.wait_procs([psutil.Process(pretenders[1].pid)], timeout=10)
    assert is_gone(found[Kind.CONTROLLER][0]) and by_kind(os.getpid())[Kind.CONTROLLER] == []


def test_numbers_are_those_of_the_configuration() -> None:
    config = compose([*overrides_of(Options(), []), "engine.num_shards=2", "engine.num_groups=3"])
    found = numbers_of(config)
    assert set(found) == set(Kind), "every kind can be struck"
    assert found[Kind.SHARD] == found[Kind.ENGINE_CORE] == 6 and found[Kind.TRAINER] == config.trainer.num_ranks
    assert found[Kind.CONTROLLER] == found[Kind.REWARD] == found[Kind.DRIVER] == 1


def test_an_engine_core_without_a_title_is_known_by_its_shard() -> None:
    """As `multiprocessing` starts it, below whoever is a shard; below anybody else it is something else."""
    command = f"{sys.executable} -c 'import time; time.sleep(60)  # multiprocessing.spawn' & read"
    for title, expected in (("ray::Shard", 1), ("ray::Controller", 0)):
        with subprocess.Popen([title, "-c", command], executable="/bin/bash", stdin=subprocess.PIPE) as parent:
            deadline = time.monotonic() + 20
            while not (children := psutil.Process(parent.pid).children()) or children[0].cmdline()[:1] != [
                sys.executable
            ]:
                assert time.monotonic() < deadline, "the child did not start"
                time.sleep(0.05)
            (child,) = children
            assert [one.pid for one in by_kind(os.getpid())[Kind.ENGINE_CORE]] == [child.pid] * expected
            assert is_worker(child) == bool(expected)
            child.kill()
            parent.kill()


def test_counts_outlive_the_process_that_was_killed(tmp_path: Path) -> None:
    assert total_tokens(tmp_path / "counts") == 0
    TokenCount(tmp_path / "counts").add(0)
    code = (
        "import os, signal, sys; from pathlib import Path; from launch.token_counts import TokenCount\n"
        "count = TokenCount(Path(sys.argv[1])); count.add(40); count.add(2)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "counts")])
        assert done.returncode == -signal.SIGKILL
    assert total_tokens(tmp_path / "counts") == 84


def test_standing_changes_with_what_is_durable(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    operator = Operator([], run_dir)
    assert operator.standing().num_groups == 0 and not operator.is_complete
    run_of(run_dir, [["s1/0"]], unfinished=["s1/0/1"])
    (run_dir / "steps.jsonl").write_text("{}\n")
    now = operator.standing()
    assert (now.num_groups, now.num_unfinished, now.num_tokens, now.num_steps) == (1, 1, N * len(PLAIN[0]), 1)


def test_kills_are_read_back_and_told(tmp_path: Path) -> None:
    assert read_kills(tmp_path / "kills.jsonl") == []
    record = record_of([KILL, replace(KILL, recovery_s=10.0, num_restarts=1, is_stuck=True)], [])
    (tmp_path / "kills.jsonl").write_text("".join(json.dumps(one) + "\n" for one in record["kills"]))
    assert read_kills(tmp_path / "kills.jsonl")[0] == KILL
    assert record["num_stuck"] == 1 and record["median_recovery_s"] == {"shard": 45.75}
    assert "81.5 s, in place" in line(KILL) and "STUCK" in line(replace(KILL, is_stuck=True))


def test_overrides_compose_and_the_users_come_last() -> None:
    options = Options(kills=7)
    config = compose(overrides_of(options, ["trainer.prompts_per_step=2"]))
    assert config.trainer.num_steps == 21 and config.trainer.prompts_per_step == 2
    assert config.scheduler.num_reward_workers == 1


def test_a_wrong_option_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kill=3"]) == 2
    assert "kills" in capsys.readouterr().err


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.skipif("LONGROLL_SLOW" not in os.environ, reason="ten minutes; LONGROLL_SLOW=1 runs it")
def test_a_short_campaign_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["kills=3", "steps=6", "seed=1", "gap_s=3", f"dir={tmp_path / 'runs'}", f"out={out}"]) in (0, 1)
    record = json.loads(out.read_text())
    assert [kill["kind"] for kill in record["kills"]] == ["controller", "whole service", "trainer rank"]
    zeros = ("num_lost", "num_duplicated", "num_different", "num_failed", "num_stuck", "num_left")
    assert {name: record[name] for name in zeros} == dict.fromkeys(zeros, 0)
