from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.compose import compose, to_yaml
from launch.evaluation import Evaluation
from launch.restarts import MAX_FUTILE, Once, TrainerDeaths
from launch.resume import check_same_run
from launch.train import MAX_REFUSALS, after_step, ask_for, evaluation_before, publish, run_id_of
from rollout.config import RunConfig, SupervisorConfig, WorkloadConfig
from rollout.cursor import Cursor
from rollout.errors import CheckpointBroken, EngineDead, InvalidRequest, SyncRefused, TrainerDead
from rollout.fleet import SyncReport
from rollout.trainer_config import TrainerConfig
from rollout.types import Group, Prompt


def test_a_resumed_run_never_measures_its_start_with_later_weights(tmp_path: Path) -> None:
    cursor, unused = Cursor(step=3, version=3, data_cursor=48), None
    config = RunConfig(workload=WorkloadConfig(eval_problems=2))
    arguments: Any = (config, tmp_path, unused, unused, cursor, unused)
    with pytest.raises(CheckpointBroken, match=r"eval_before\.json"):
        evaluation_before(*arguments)
    saved = Evaluation(rewards=(1.0, None), exact=(True, None), lengths=(3, 4), version=0, duration_s=1.0)
    saved.save(tmp_path / "eval_before.json")
    assert evaluation_before(*arguments) == saved
    config.workload.eval_problems = 3
    with pytest.raises(InvalidRequest, match="2, as when this run began"):
        evaluation_before(*arguments)


def test_a_checkpoint_is_not_continued_as_another_run(tmp_path: Path) -> None:
    config = compose(["experiment=tiny_grpo"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    check_same_run(compose(["experiment=tiny_grpo", "trainer.lr=1"]), tmp_path)  # no checkpoint yet
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").touch()
    check_same_run(config, tmp_path)
    check_same_run(compose(["experiment=tiny_grpo", "trainer.num_steps=99"]), tmp_path)
    check_same_run(compose(["experiment=tiny_grpo", "trainer.lr=1", "resume=false"]), tmp_path)
    with pytest.raises(InvalidRequest, match=r"trainer\.lr: got 1\.0, expected 0\.0002"):
        check_same_run(compose(["experiment=tiny_grpo", "trainer.lr=1"]), tmp_path)


def test_an_option_that_a_run_is_older_than_had_its_default(tmp_path: Path) -> None:
    config = compose(["experiment=tiny_grpo"])
    older = yaml.safe_load(to_yaml(config))
    del older["trainer"]["draft"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(older))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").touch()
    check_same_run(config, tmp_path)
    config.trainer.draft.num_steps += 1
    with pytest.raises(InvalidRequest, match=r"trainer\.draft"):
        check_same_run(config, tmp_path)


def a_group(group_id: str) -> Group:
    return Group(group_id=group_id, prompt=Prompt(token_ids=(1,), prompt_id=group_id), trajectories=[])


def test_without_over_sampling_every_step_asks_for_its_own_problems() -> None:
    config = RunConfig(trainer=TrainerConfig(prompts_per_step=2))
    cursor = Cursor(step=0, version=0, data_cursor=0)
    asked = ask_for(config, 1, cursor)
    assert asked == (("step000001/0000", 0), ("step000001/0001", 1))
    cursor = after_step(cursor, asked, [a_group(one) for one, _ in asked], 1, ["learned"])
    assert cursor == Cursor(step=1, version=1, data_cursor=2, learned=("learned",))


@settings(deadline=None)
@given(choices=st.lists(st.sets(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=12))
def test_over_sampling_loses_no_problem_and_repeats_none(choices: list[set[int]]) -> None:
    config = RunConfig(trainer=TrainerConfig(prompts_per_step=3, over_sampling_batch_size=5))
    cursor, used = Cursor(step=0, version=0, data_cursor=0), []
    for step, finished in enumerate(choices, 1):
        asked = ask_for(config, step, cursor)
        assert len(asked) == 5 and asked[: len(cursor.leftover)] == cursor.leftover
        assert len({group_id for group_id, _ in asked}) == 5
        assert asked == ask_for(config, step, Cursor.from_json(cursor.to_json())), "a resumed run asks for the same"
        used += [asked[place] for place in finished]
        groups = [a_group(asked[place][0]) for place in finished]
        cursor = after_step(cursor, asked, groups, step, [])
    problems = sorted([problem for _, problem in used] + [problem for _, problem in cursor.leftover])
    assert problems == list(range(cursor.data_cursor))
    assert cursor.step == len(choices) and cursor.data_cursor == 3 * len(choices) + len(cursor.leftover)


def test_a_resumed_run_keeps_its_name_and_a_new_one_gets_another(tmp_path: Path) -> None:
    config = RunConfig()
    name = run_id_of(config, tmp_path)
    assert name.startswith(tmp_path.name) and run_id_of(config, tmp_path) == name
    config.resume = False
    other = run_id_of(config, tmp_path)
    assert other != name
    config.resume = True
    assert run_id_of(config, tmp_path) == other


class Service:
    """Trainers, client and monitor in one: publishing raises what it is told, one fault a call."""

    def __init__(self, faults: list[Exception], live_after: int | None = None) -> None:
        self.version, self.faults, self.live_after = 7, list(faults), live_after
        self.num_calls, self.said, self.ahead = 0, [], 0

    def publish(self) -> SyncReport:
        self.num_calls += 1
        if self.faults:
            raise self.faults.pop(0)
        return replace(SyncReport.unknown(self.version), num_tensors=3)

    def stats(self) -> SimpleNamespace:
        is_live = self.live_after is not None and self.num_calls >= self.live_after
        return SimpleNamespace(live_version=self.version + self.ahead if is_live else self.version - 1)

    def say(self, text: str) -> None:
        self.said.append(text)


def publish_through(service: Any, **supervisor: Any) -> SyncReport:
    config = RunConfig(supervisor=SupervisorConfig(check_every_s=0.001, **supervisor))
    return publish(config, service, service, service)


def test_a_publication_is_repeated_while_something_dead_comes_back() -> None:
    service = Service([EngineDead("no shard is left"), *[SyncRefused("a shard died")] * MAX_REFUSALS])
    assert publish_through(service).num_tensors == 3
    assert service.num_calls == MAX_REFUSALS + 2 and len(service.said) == MAX_REFUSALS + 1
    assert "version 7 was not published" in service.said[0]


def test_a_publication_of_which_only_the_answer_was_lost_is_not_repeated() -> None:
    service = Service([SyncRefused("no answer")] * 2, live_after=1)
    assert publish_through(service) == SyncReport.unknown(7) and service.num_calls == 1


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_version_that_ranks_which_died_had_published_is_not_gone_back_to(ahead: int) -> None:
    service = Service([], live_after=0)
    service.ahead = ahead
    assert publish_through(service) == SyncReport.unknown(7) and service.num_calls == 0


def deaths_of(steps: list[int], **supervisor: Any) -> TrainerDeaths:
    """Deaths after the run had got to each of these steps, the last of which must not be forgiven."""
    history: Any = SimpleNamespace(steps=[])
    deaths = TrainerDeaths(SupervisorConfig(**supervisor), history, Service([]))  # type: ignore[arg-type]
    for place, step in enumerate(steps):
        history.steps = [SimpleNamespace(step=step)] if step else []
        if place == len(steps) - 1:
            with pytest.raises(TrainerDead):
                deaths.note(TrainerDead("rank 1"))
        else:
            deaths.note(TrainerDead("rank 1"))
    return deaths


def test_trainer_ranks_are_started_anew_until_that_gets_nowhere() -> None:
    assert deaths_of([0] * (MAX_FUTILE + 1)).num_restarts == MAX_FUTILE
    assert deaths_of([3] * 3 + [4] + [2] * (MAX_FUTILE - 1) + [4] * 2).num_restarts == 5 + MAX_FUTILE - 1
    assert deaths_of([5], enabled=False).num_restarts == 0


def test_a_question_is_asked_once() -> None:
    asked: list[int] = []
    once = Once(lambda question: asked.append(question) or question * 2)  # type: ignore[func-returns-value]
    assert (once.ask(3), once.ask(4), once.value, asked) == (6, 6, 6, [3])


def test_a_publication_that_is_refused_for_good_ends_the_run() -> None:
    service = Service([SyncRefused(f"refusal {i}") for i in range(MAX_REFUSALS + 3)])
    with pytest.raises(SyncRefused, match=f"refusal {MAX_REFUSALS}"):
        publish_through(service)
    assert service.num_calls == MAX_REFUSALS + 1
    service = Service([SyncRefused("once")])
    with pytest.raises(SyncRefused):
        publish_through(service, enabled=False)
    assert service.num_calls == 1


def test_dead_engines_are_waited_for_no_longer_than_configured() -> None:
    service = Service([EngineDead("no shard is left")] * 100_000)
    with pytest.raises(EngineDead):
        publish_through(service, engine_wait_s=0.02)
    assert 1 <= service.num_calls <= 1 + 0.02 / 0.001 + 1
