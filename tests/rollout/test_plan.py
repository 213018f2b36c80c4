"""The planner's parts: memory, steady state, drafts, search. Sizes are those of Qwen3-235B-A22B."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rollout.errors import InvalidRequest
from rollout.plan.candidate import BF16, Candidate, groups, int4
from rollout.plan.drafts import Draft
from rollout.plan.memory import Ledger, ledger, peak_ratio
from rollout.plan.search import RELAXED, RELAXED_LEAST, Choices, Fleet, frontier, headroom, limit_of, plans, search
from rollout.plan.shape import shape_of
from rollout.plan.steady import residual_s, steady
from rollout.plan.workload import SCENARIOS, Targets, Workload, fixed
from rollout.simulate.accelerators import ACCELERATORS
from rollout.simulate.costs import QWEN3_235B_A22B, Efficiency, Layout, RooflineCosts
from rollout.simulate.speculation import chance_of

H200 = ACCELERATORS["h200"]
ROOT = Path(__file__).resolve().parents[2]
SERVING = SCENARIOS[0]
GROUP = Candidate(ranks=8, tensor_ranks=1, batch=32, chunk=2048, precision=int4())


def figures(candidate: Candidate, workload: Workload = SERVING, efficiency: Efficiency | None = None):  # type: ignore[no-untyped-def]
    found = steady(candidate, workload, H200, QWEN3_235B_A22B, efficiency or Efficiency())
    assert found is not None
    return found


def test_shapes_are_read_from_configurations() -> None:
    assert shape_of(str(ROOT / "tests/data/qwen3_235b")) == QWEN3_235B_A22B == shape_of("Qwen/Qwen3-235B-A22B")
    assert shape_of(str(ROOT / "models/tiny")).num_experts == 8  # its file has the newer name of that field
    with pytest.raises(InvalidRequest, match=r"config\.json"):
        shape_of("models/absent")


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 4, "hidden_size": 64}')
    with pytest.raises(InvalidRequest, match="num_experts"):
        shape_of(str(tmp_path))


def test_the_scenarios_are_those_of_the_requirements() -> None:
    assert [(w.prompt_tokens, w.output_tokens) for w in SCENARIOS] == [(4096, 1536), (2048, 20_480), (2048, 32_768)]
    serving, short, long = SCENARIOS
    assert serving.held_output == serving.mean_output / 2
    for tailed in (short, long):
        assert tailed.held_output > tailed.mean_output / 2  # the longer a sequence, the more time it is there
        assert tailed.mean_output < tailed.output_tokens


@pytest.mark.parametrize("wrong", [{"prompt_tokens": 0}, {"mean_output": 9e9}, {"group_size": 0}])
def test_workloads_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        replace(SERVING, **wrong)  # type: ignore[arg-type]


def test_a_chain_of_drafts_gains_the_length_it_was_solved_for() -> None:
    chance = chance_of(2.47, 3)
    assert Draft(num_tokens=3, chance=chance).accept_length == pytest.approx(2.47, abs=1e-12)
    assert Draft(num_tokens=1, chance=chance).accept_length == pytest.approx(1 + chance)
    assert Draft().accept_length == 1
    assert chance_of(4, 3) == pytest.approx(1)
    with pytest.raises(InvalidRequest, match="accept_length"):
        chance_of(4.5, 3)


def test_every_way_to_cut_a_fleet() -> None:
    cut = list(groups(24, QWEN3_235B_A22B, BF16, (1, 2)))
    assert {c.ranks for c in cut} == {1, 2, 4, 8}  # 3 divides the fleet, not the experts
    assert {c.exchange for c in cut if c.ranks == 8} == {"gather", "dispatch"}
    assert [c.exchange for c in cut if c.ranks == c.tensor_ranks == 2] == ["gather"]  # its rows are everywhere already
    assert {c.exchange for c in groups(8, QWEN3_235B_A22B, int4())} == {"gather"}  # all that INT4 experts run under


def test_the_ledger_adds_up_and_admits_what_fits() -> None:
    held = ledger(RooflineCosts(8), H200, is_flipping=True)
    assert held.flip == held.weights
    assert held.weights + held.workspace + held.flip + held.kv == pytest.approx(0.9 * 141e9)
    rl = SCENARIOS[1]
    room = held.sequences(rl)
    assert room * (rl.held_output + rl.prefilled_tokens) <= held.kv_tokens
    assert ledger(RooflineCosts(8), H200, is_flipping=False).sequences(rl) > room
    longest = replace(rl, prompt_tokens=held.kv_tokens)
    assert held.sequences(longest) == 0, "one that could not end is not begun"


def test_weights_that_do_not_fit_leave_no_room() -> None:
    full = Ledger(limit=72e9, weights=73e9, workspace=8e9, flip=0.0, kv_token=192_512)
    assert full.kv < 0 and full.kv_tokens == 0 and full.sequences(SERVING) == 0


def test_peak_ratio_goes_from_weights_to_kv_as_the_load_grows() -> None:
    own = Ledger(limit=1e9, weights=1e8, workspace=0, flip=0, kv_token=100)
    plain = Ledger(limit=1e9, weights=4e8, workspace=0, flip=0, kv_token=200)
    assert peak_ratio(own, plain, 0) == pytest.approx(0.25)
    assert peak_ratio(own, plain, 1e12) == pytest.approx(0.5, rel=1e-3)


def test_terms_are_the_sum_that_the_simulator_steps_by() -> None:
    for layout in (Layout(), Layout(tensor_ranks=4), Layout(exchange="dispatch", weight_bits=16, kv_dtype="bfloat16")):
        costs = RooflineCosts(8, H200, layout=layout)
        terms = costs.terms(64, 500_000, 300, 300 * 1024, 8 * 364)
        apart = costs.local_s(64, 300, 300 * 1024) + costs.shared_s(8 * 364) + 500_000 * costs.context_token_s
        assert terms.total_s == pytest.approx(apart, rel=1e-12)


def test_tensor_parallelism_splits_weights_and_heads_but_no_fewer_than_one_head() -> None:
    one, four, eight = (RooflineCosts(8, H200, layout=Layout(tensor_ranks=t)) for t in (1, 4, 8))
    assert one.kv_bytes_per_token == 4 * four.kv_bytes_per_token == 4 * eight.kv_bytes_per_token
    assert one.weight_bytes() > four.weight_bytes() > eight.weight_bytes()
    assert one.terms(64, 0, 0, 0, 512).reduce_s == 0 < four.terms(64, 0, 0, 0, 512).reduce_s
    assert eight.terms(64, 0, 0, 0, 512).exchange_s == 0, "its rows are on every rank"


def test_dispatching_sends_less_than_gathering_where_groups_are_large() -> None:
    gather, dispatch = (RooflineCosts(64, H200, layout=Layout(exchange=e)) for e in ("gather", "dispatch"))
    assert dispatch.shared_s(64 * 64) < gather.shared_s(64 * 64)
    # 8 experts of a row are on about 7.5 of 64 ranks; 56 of those 63 lie in other nodes, reached by the network.
    reached = 56 * (1 - (1 - 1 / 64) ** 8)
    seconds = 94 * reached * 64 * 4096 * (1 + 2) / 50e9 / 0.8
    assert dispatch.terms(64, 0, 0, 0, 64 * 64).exchange_s == pytest.approx(94 * 2 * 80e-6 + seconds)


def test_the_busiest_rank_sets_the_time_of_large_batches() -> None:
    level, skewed = (RooflineCosts(8, efficiency=Efficiency(imbalance=i)) for i in (1.0, 1.5))
    assert skewed.terms(4096, 0, 0, 0, 32_768).experts_s == pytest.approx(
        1.5 * level.terms(4096, 0, 0, 0, 32_768).experts_s
    )
    assert skewed.terms(1, 0, 0, 0, 8).experts_s == level.terms(1, 0, 0, 0, 8).experts_s  # reading bounds it


@pytest.mark.parametrize("wrong", [{"arithmetic": "fp2"}, {"exchange": "pigeon"}])
def test_layouts_are_checked(wrong: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        Layout(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="tensor_ranks"):
        RooflineCosts(8, layout=Layout(tensor_ranks=3))


def test_throughput_is_the_batch_over_the_time_of_a_token() -> None:
    found = figures(GROUP)
    assert found.tokens_per_s_per_gpu == pytest.approx(GROUP.batch / found.tpot_s)
    assert found.step_s == pytest.approx(found.terms.total_s)
    assert found.longest_step_s > found.step_s > found.longest_step_s * found.prefill_share
    sliced = replace(GROUP, tensor_ranks=2)
    assert figures(sliced).tokens_per_s_per_gpu == pytest.approx(GROUP.batch / figures(sliced).tpot_s / 2)


def test_prefills_share_the_steps_as_requests_arrive() -> None:
    found = figures(GROUP)
    # In the steady state as many requests begin as end: batch / 1,536 a step, of 4,096 tokens each; a step that
    # prefills has room for the chunk less the decoding rows.
    assert found.prefill_share == pytest.approx(32 / 1536 * 4096 / (2048 - 32))
    shared = figures(GROUP, replace(SERVING, group_size=16))
    assert shared.prefill_share == pytest.approx(found.prefill_share / 16)


def test_requests_that_come_faster_than_they_can_be_prefilled_are_no_plan() -> None:
    # 512 / 8 requests a step bring 4,096 tokens each; a step has room for 8,192 - 512.
    hopeless = replace(GROUP, batch=512, chunk=8192)
    assert steady(hopeless, fixed("burst", 4096, 8), H200, QWEN3_235B_A22B, Efficiency()) is None


def test_the_first_token_waits_longer_the_busier_the_group() -> None:
    calm, busy = (figures(replace(GROUP, batch=b)) for b in (1, 160))
    assert busy.ttft_s - busy.prefill_s > calm.ttft_s - calm.prefill_s
    assert calm.ttft_s >= calm.prefill_s


@pytest.mark.parametrize(("full", "bare", "share"), [(0.184, 0.075, 0.0064), (0.184, 0.03, 0.2), (0.1, 0.03, 0.9)])
def test_the_rest_of_a_step_is_what_random_arrivals_find(full: float, bare: float, share: float) -> None:
    rng = np.random.default_rng(0)
    inside = share * full / (share * full + (1 - share) * bare)  # a longer step is met the more often
    left = rng.random(200_000) * np.where(rng.random(200_000) < inside, full, bare)
    # The standard error of this percentile is below 0.2 % of the step: five of them.
    assert residual_s(full, bare, share) == pytest.approx(float(np.percentile(left, 95)), abs=0.01 * full)


def test_speculation_divides_the_step_and_pays_for_its_rows() -> None:
    rl, draft = SCENARIOS[1], Draft(num_tokens=3, chance=0.7)
    plain, drafted = figures(GROUP, rl), figures(replace(GROUP, draft=draft), rl)
    assert drafted.step_s > plain.step_s
    assert drafted.tpot_s == pytest.approx(drafted.step_s / draft.accept_length)
    useless = figures(replace(GROUP, draft=Draft(num_tokens=3, chance=0.0)), rl)
    assert useless.tokens_per_s_per_gpu < plain.tokens_per_s_per_gpu


def test_aligned_prefills_cost_less_than_scattered_ones() -> None:
    parts = GROUP, SERVING, H200, QWEN3_235B_A22B, Efficiency()
    scattered, aligned = steady(*parts), steady(*parts, is_aligned=True)
    assert scattered is not None and aligned is not None
    assert aligned.step_s < scattered.step_s


FLEET = Fleet(gpu=H200, num_gpus=8, efficiency=Efficiency())


def test_the_search_finds_the_fastest_that_keeps_the_targets() -> None:
    rl, choices = SCENARIOS[1], Choices(precisions=(int4(),))
    best = search(FLEET, rl, Targets(), choices)
    assert best is not None and best.keeps(Targets())
    everything = frontier(FLEET, rl, choices)
    kept = [plan.steady.tokens_per_s_per_gpu for plan in everything if plan.keeps(Targets())]
    assert best.steady.tokens_per_s_per_gpu >= max(kept)
    times = [plan.steady.tpot_s for plan in everything]
    speeds = [plan.steady.tokens_per_s_per_gpu for plan in everything]
    assert times == sorted(times) and speeds == sorted(set(speeds)), "the frontier only ever pays for more throughput"
    strict = search(FLEET, rl, Targets(tpot_s=0.02), choices)
    assert strict is not None and strict.steady.tpot_s <= 0.02
    assert strict.steady.tokens_per_s_per_gpu < best.steady.tokens_per_s_per_gpu


def test_where_no_plan_keeps_the_targets_the_time_of_a_token_comes_first() -> None:
    choices, targets = Choices(precisions=(int4(),)), Targets(ttft_s=0.05)
    found = search(FLEET, SERVING, targets, choices)
    least_s = min(p.steady.ttft_s for p in plans(FLEET, SERVING, choices) if p.steady.tpot_s <= targets.tpot_s)
    assert found is not None and found.steady.tpot_s <= targets.tpot_s
    assert targets.ttft_s < found.steady.ttft_s <= max(RELAXED * targets.ttft_s, RELAXED_LEAST * least_s)
    hopeless = search(FLEET, SERVING, Targets(tpot_s=1e-6), choices)
    assert hopeless is not None and hopeless.candidate.batch == 1


def test_a_model_that_fits_nowhere_has_no_plan() -> None:
    one = replace(FLEET, gpu=ACCELERATORS["a100"], num_gpus=1)
    assert search(one, SERVING, Targets(), Choices(precisions=(int4(),))) is None


def test_a_plan_says_what_limits_it_and_what_is_left_of_the_data_sheet() -> None:
    best = search(FLEET, SCENARIOS[2], Targets(), Choices(precisions=(BF16,)))
    assert best is not None
    assert "KV" in limit_of(best) and "%" in limit_of(best)
    assert headroom(best, FLEET, SCENARIOS[2]) > 1
    perfect = Efficiency(memory=1, kv=1, compute=1, link=1, collective_s=0, step_s=0)
    ideal = replace(FLEET, efficiency=perfect)
    found = search(ideal, SCENARIOS[2], Targets(), Choices(precisions=(BF16,)))
    assert found is not None and headroom(found, ideal, SCENARIOS[2]) == pytest.approx(1)
    assert math.isfinite(found.steady.ttft_s)
