"""The arithmetic, the load and the picture of the rollout bench; its engines are those of its own command."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch

from actors.shard import Shard
from kernels.gumbel_sample import gumbel_noise
from launch.bench_rollout import main, record_of, table
from launch.compose import compose
from launch.hidden_lengths import with_lengths
from launch.near_ties import Difference, compare, near_tie
from launch.rollout_load import heavy_loads, uniform_load, write_trace
from launch.rollout_picture import draw
from launch.rollout_run import Bar, Timeline, share_done
from launch.rollout_turns import Options, Repeat, make_loads, quantiles, rotated, scheduler_of
from rollout.config import EngineConfig, ModelConfig, SchedulerConfig, SyncConfig
from rollout.errors import InvalidRequest
from rollout.simulate.lengths import LengthModel, read_trace
from rollout.types import Chunk, ChunkResult, FinishReason, Prompt, SamplingParams, VersionSpan

PROMPTS = [Prompt(token_ids=(1, 2), prompt_id=f"p{i}") for i in range(16)]
VOCAB = 64


def timeline(ends_s: list[float], num_tokens: int = 1000) -> Timeline:
    bars = tuple(
        Bar(
            trajectory_id=f"g{i // 2}/{i % 2}",
            group_id=f"g{i // 2}",
            start_s=0.0,
            end_s=end_s,
            engine_s=end_s,
            shard=i % 2,
            num_chunks=1,
        )
        for i, end_s in enumerate(ends_s)
    )
    return Timeline(bars=bars, num_slots=len(bars), num_tokens=num_tokens, num_cached_tokens=0, wall_s=ends_s[-1])


STATIC = timeline([1.0, 2, 3, 4, 5, 6, 7, 8, 10, 20])
DIVIDED = timeline([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10])


def test_the_tail_is_what_comes_after_nine_tenths() -> None:
    assert share_done([float(i) for i in range(1, 11)]) == 9.0
    assert (STATIC.makespan_s, STATIC.tail_s) == (20.0, 10.0)
    assert STATIC.group_ends_s == [2.0, 4.0, 6.0, 8.0, 20.0] and STATIC.group_tail_s == 0.0
    assert STATIC.utilisation == pytest.approx(66 / 200)


def test_the_record_has_the_median_of_the_ratios() -> None:
    options = Options(repeats=3)
    others = {"vllm": STATIC, "static": timeline([1.0, 40.0]), "partial": STATIC}
    heavy = [
        Repeat(timelines=others | {"divided": ours}, lengths=[1, 2], differences=())
        for ours in (timeline([1.0, 20.0]), DIVIDED, timeline([1.0, 2.0]))
    ]
    plain = {"plain": timeline([3.0]), "plain 2": timeline([1.5]), "vllm": timeline([2.0])}
    uniform = [Repeat(timelines=plain | {"divided": timeline([4.0])}, lengths=[5], differences=())]
    record = record_of(options, heavy, uniform)
    assert record["makespan_speedup"] == 2.0 and record["repeats"]["makespan_speedup"] == [1.0, 2.0, 10.0]
    assert "group_tail_ratio" not in record, "five groups have no last tenth"
    assert record["speedup_over_static"] == 4.0
    assert (record["uniform_ratio"], record["uniform_over_vllm"]) == pytest.approx((0.5, 0.5)), "over the mean of both"
    alone = record_of(Options(repeats=3, stock=False), heavy, uniform)
    assert alone["makespan_speedup"] == 4.0 and "uniform_over_vllm" not in alone
    assert "makespan_speedup         2.000   1.000 … 10.000" in table(record)
    json.dumps(record)


def test_policies_take_turns_at_being_first() -> None:
    ways = dict.fromkeys(["a", "b", "c"])
    orders = ["".join(rotated(ways, i)) for i in range(7)]
    assert orders == ["abc", "bca", "cab", "cba", "acb", "bac", "abc"]


def test_only_our_policy_cuts() -> None:
    options = Options(slots=5, ahead=1, chunk_tokens=9)
    chosen = [scheduler_of(SchedulerConfig(), options, policy) for policy in ("static", "divided")]
    assert [one.chunk_tokens for one in chosen] == [None, 9]
    assert all(one.max_running_per_shard == 6 for one in chosen)


def test_a_heavy_load_is_a_function_of_its_seed() -> None:
    model = LengthModel(p80_share=0.2)
    load, again, other = (
        heavy_loads(PROMPTS, 8, run_seed=s, model=model, max_tokens=400, visits=1)[0] for s in (1, 1, 2)
    )
    assert load == again and load.lengths != other.lengths
    assert len(load.lengths) == 16 * 8 and all(1 <= length <= 400 for length in load.lengths.values())
    assert load.request.group_ids == tuple(f"{prompt.prompt_id}@0" for prompt in PROMPTS)
    assert uniform_load(PROMPTS, 8, run_seed=1, num_tokens=9).lengths == {}


def test_visits_of_a_prompt_resemble_each_other_and_are_groups_of_their_own() -> None:
    model = LengthModel(p80_share=0.2, rho=1.0, tail_share=0.0)
    first, second = heavy_loads(PROMPTS, 2, run_seed=1, model=model, max_tokens=4000, visits=2)
    assert list(first.lengths.values()) == list(second.lengths.values())
    assert first.lengths.keys().isdisjoint(second.lengths) and first.request.prompts == second.request.prompts


def test_loads_share_neither_prompts_nor_seeds() -> None:
    options = Options(groups=4, n=2, repeats=3, visits=1)
    loads = make_loads(compose(["experiment=tiny_grpo"]), options, LengthModel())
    every = [loads.warm_up, *loads.heavy, *loads.uniform]
    ids = [group_id for load in every for group_id in load.request.group_ids]
    assert len(ids) == len(set(ids)) == 7 * 4
    assert loads.lengths.keys() == {f"{i}/{k}" for load in loads.heavy for i in load.request.group_ids for k in (0, 1)}


def test_a_trace_is_what_the_simulator_reads(tmp_path: Path) -> None:
    load = heavy_loads(PROMPTS, 3, run_seed=1, model=LengthModel(), max_tokens=50, visits=1)[0]
    write_trace(load, tmp_path / "trace.jsonl")
    for prompt, work in zip(PROMPTS, read_trace(tmp_path / "trace.jsonl"), strict=True):
        assert (work.group_id, work.prompt_tokens) == (f"{prompt.prompt_id}@0", len(prompt.token_ids))
        assert work.output_tokens == tuple(load.lengths[f"{prompt.prompt_id}@0/{i}"] for i in range(3))


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 50])
def test_hidden_lengths_end_a_trajectory_however_it_is_cut(chunk_tokens: int) -> None:
    shard = with_lengths({"g/0": 9})(0, ModelConfig(), EngineConfig(), SyncConfig())
    asked: list[int] = []

    async def engine(self: Shard, chunk: Chunk) -> ChunkResult:
        asked.append(chunk.max_tokens)
        return ChunkResult(
            trajectory_id=chunk.trajectory_id,
            token_ids=(5,) * chunk.max_tokens,
            logprobs=(-1.0,) * chunk.max_tokens,
            spans=(VersionSpan(version=0, start=0, stop=chunk.max_tokens),),
            finish_reason=FinishReason.LENGTH,
            shard=0,
        )

    def generate(trajectory_id: str, done: int) -> ChunkResult:
        chunk = Chunk(
            trajectory_id=trajectory_id,
            token_ids=(1, 2) + (5,) * done,
            num_prompt_tokens=2,
            max_tokens=chunk_tokens,
            seed=0,
            sampling=SamplingParams(max_tokens=50),
        )
        return asyncio.run(shard.generate(chunk))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shard, "generate", engine)  # what is below it is vLLM
        done, reason = 0, FinishReason.LENGTH
        while reason is FinishReason.LENGTH:
            result = generate("handle:g/0", done)
            done, reason = done + len(result.token_ids), result.finish_reason
        assert (done, reason, sum(asked)) == (9, FinishReason.STOP, 9)
        assert generate("handle:other/0", 0).finish_reason is FinishReason.LENGTH


def test_quantiles_are_of_trajectories() -> None:
    found = quantiles(list(range(1, 101)))
    assert (found["p50"], found["p90"], found["p100"]) == (51, 91, 100)


def scored(seed: int, position: int, ids: tuple[int, int], gap: float) -> tuple[list[float], list[float]]:
    """Log-probabilities under which the two tokens' scores lie `gap` apart, the first ahead."""
    noise = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), VOCAB)[0]
    return [-1.0], [float(-1.0 + noise[ids[0]] - noise[ids[1]]) - gap]


@pytest.mark.parametrize("gap, is_near", [(1e-5, True), (0.1, False)])
def test_a_near_tie_is_told_by_scores_with_noise(gap: float, is_near: bool) -> None:
    a, b = scored(9, 10 + 4, (7, 8), gap)
    shared = {"seed": 9, "num_prompt_tokens": 10, "temperature": 1.0, "vocab_size": VOCAB}
    found = compare(([5, 7], [-0.5, *a]), ([5, 8], [-0.5, *b]), **shared, within=near_tie("float32", 1.0), start=3)
    assert isinstance(found, Difference)
    assert (found.index, found.tokens, found.is_near_tie) == (4, (7, 8), is_near)
    # Noise and log-probabilities of a few units are added in float32: four roundings of 2^-22 each.
    assert found.gap == pytest.approx(gap, abs=4 * 2**-22)
    assert ("not a near tie" in str(found)) is not is_near


def test_an_early_end_is_a_difference_and_never_a_near_tie() -> None:
    shared = {"seed": 1, "num_prompt_tokens": 1, "temperature": 0.0, "vocab_size": VOCAB, "within": 1.0}
    assert compare(([1], [-1.0]), ([1], [-1.5]), **shared) is None
    found = compare(([1], [-1.0]), ([1, 2], [-1.0, -2.0]), **shared)
    assert found is not None and (found.index, found.tokens, found.is_near_tie) == (1, (None, 2), False)
    assert "the end" in str(found)


def test_the_picture_is_written(tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    draw({"static": STATIC, "divided": DIVIDED}, path, "two policies")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("argument", ["group=3", "repeats=0", "sigma=-1"])
def test_wrong_options_are_refused(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument]) == 2
    assert argument.partition("=")[0][:5] in capsys.readouterr().err


def test_options_refuse_what_cannot_be_run() -> None:
    with pytest.raises(InvalidRequest, match="slots"):
        Options(slots=0)
