"""What the comparison of simulator and service is made of; its engines are those of its own command."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from launch.rollout_load import Load, heavy_loads
from launch.simulate_bench import Comparison, Options, main, scenario_of, table, turnaround_s, work_of
from rollout.config import RunConfig
from rollout.errors import InvalidRequest
from rollout.fleet import ShardInfo
from rollout.simulate.lengths import LengthModel
from rollout.simulate.measured import FitError, MeasuredCosts, MeasuredStep
from rollout.simulate.simulation import Simulation
from rollout.types import Group, Prompt, Trajectory

PROMPTS = [Prompt(token_ids=(1,) * (2 + i), prompt_id=f"p{i}") for i in range(4)]


def load() -> Load:
    (one,) = heavy_loads(PROMPTS, 4, run_seed=1, model=LengthModel(), max_tokens=64, visits=1)
    return one


def service() -> Any:
    infos = [
        ShardInfo(
            rank=rank,
            num_experts=8,
            num_local_experts=4,
            kv_tokens=4096,
            vocab_size=64,
            max_model_len=256,
            block_tokens=32,
        )
        for rank in range(2)
    ]
    return SimpleNamespace(infos=infos)


def test_the_simulator_is_told_the_load_as_it_is() -> None:
    asked = load()
    work = work_of(asked)
    assert [one.prompt_tokens for one in work] == [2, 3, 4, 5]
    assert sum(sum(one.output_tokens) for one in work) == sum(asked.lengths.values())
    assert {f"{one.group_id}/{i}": n for one in work for i, n in enumerate(one.output_tokens)} == asked.lengths


@pytest.mark.parametrize("policy", ["static", "partial", "divided"])
def test_a_load_can_be_simulated_under_every_policy(policy: str) -> None:
    options = Options(groups=4, n=4, slots=3, ahead=1, chunk_tokens=16, max_tokens=64)
    scenario = scenario_of(service(), RunConfig(), options, load(), 0.01)
    assert (scenario.gpus, scenario.shards_per_group, scenario.max_running, scenario.ahead) == (2, 2, 3, 1)
    steps = [
        MeasuredStep(batch=b, context_tokens=b * c, step_s=0.01 * b + 0.001) for b in (1, 2, 3) for c in (8, 9, 64)
    ]
    run = Simulation(scenario, policy, MeasuredCosts(steps), 4096, work_of(load())).run()
    assert run.outcome.num_tokens == sum(load().lengths.values())
    assert run.outcome.max_running == 3, "what is ahead waits in the engine"


def test_the_time_between_chunks_is_what_no_engine_accounts_for() -> None:
    trajectories = [
        Trajectory(
            group_id="g",
            sample_index=i,
            seed=i,
            prompt_token_ids=(1,),
            metadata={"total_s": 10.0 + i, "queue_s": 1.0, "generate_s": 8.0, "shards": [0] * 4},
        )
        for i in range(3)
    ]
    group = Group(group_id="g", prompt=PROMPTS[0], trajectories=trajectories)
    run: Any = SimpleNamespace(groups=(group,))
    assert turnaround_s(run) == pytest.approx(2.0 / 4)


def test_the_error_is_the_median_over_loads() -> None:
    one = Comparison(policy="divided", measured_s=(10.0, 20.0, 40.0), predicted_s=(11.0, 18.0, 40.8))
    assert one.error == pytest.approx(0.02)
    told = table([one], FitError(num_steps=9, mean_relative=0.011, p95_relative=0.02), 0.0042)
    assert "divided" in told and "+2.0%" in told and "4.2 ms" in told and "1.1%" in told


@pytest.mark.parametrize("argument", ["policies=fastest", "within=0", "groups=0", "group=4"])
def test_wrong_options_are_refused_with_their_names(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = argument.partition("=")[0]
    assert main([argument]) == 2
    assert name in capsys.readouterr().err


def test_options_reach_the_bench() -> None:
    bench = Options(groups=3, n=2, slots=5, ahead=0, chunk_tokens=7, max_tokens=9, repeats=2, first_seed=4).bench
    assert (bench.groups, bench.n, bench.slots, bench.ahead, bench.chunk_tokens) == (3, 2, 5, 0, 7)
    assert (bench.max_tokens, bench.repeats, bench.first_seed, bench.uniform_tokens) == (9, 2, 4, 0)
    with pytest.raises(InvalidRequest, match="repeats"):
        Options(repeats=0).bench  # noqa: B018
