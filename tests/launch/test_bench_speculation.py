"""The loads, the arithmetic, the useless drafts and the picture of the speculation bench; engines are its command's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from actors.service import served_plans
from actors.vllm_plugin.steps import Step
from launch.bench_speculation import main, prepare
from launch.compose import compose
from launch.rollout_load import Load
from launch.rollout_run import Bar, Timeline
from launch.rollout_turns import Repeat
from launch.speculation_figures import ACCEPT_LENGTH, governed_ratio, record_of, table, undisturbed
from launch.speculation_loads import GIVEN_TOKENS, PARTS, Options, corrupted_loads, make_loads, tail_loads
from launch.speculation_pairs import Pair, pairs_of
from launch.speculation_picture import draw
from launch.speculation_turns import DRAFTING, NGRAM, NONE, ON_HOLD, STOCK, Results, Turn
from launch.speculation_useless import USELESS, publication, shuffled
from rollout.config import EngineConfig, ModelConfig
from rollout.errors import LongrollError
from rollout.governor.comparison import TURN_STEPS, is_on_hold
from rollout.scheduler.intake import make_group
from rollout.simulate.lengths import LengthModel
from rollout.speculation.clover_config import load_draft
from rollout.speculation.clover_training import TENSOR_PREFIX
from rollout.sync.encoding import TensorPlan, plan_tensors
from rollout.sync.manifest import TensorSpec, dtype_name
from rollout.types import Group

TINY = Path("models/tiny")
DRAFT = str(TINY / "draft")


def timeline(wall_s: float, num_tokens: int = 1000) -> Timeline:
    """Ten trajectories, of which the last takes as long as all others together."""
    bars = tuple(
        Bar(trajectory_id=str(i), group_id="g", start_s=0.0, end_s=end, engine_s=end, shard=0, num_chunks=2)
        for i, end in enumerate([*[wall_s / 2] * 9, wall_s])
    )
    return Timeline(bars=bars, num_slots=10, num_tokens=num_tokens, num_cached_tokens=0, wall_s=wall_s)


def turn(accept_length: float = 3.0, start: int = 0, **wall_s: float) -> Turn:
    names = {"drafting": DRAFTING, "none": NONE, "hold": ON_HOLD, "vllm": STOCK, "ngram": NGRAM}
    timelines = {names[key]: timeline(seconds) for key, seconds in wall_s.items()}
    repeat = Repeat(timelines=timelines, lengths=[100] * 10, differences=())
    return Turn(repeat=repeat, drafts={DRAFTING: {ACCEPT_LENGTH: accept_length}}, start=start)


def pairs(*ratios: float) -> list[Pair]:
    """Of steps of a second on hold."""
    return [Pair(governed_s=1 / ratio, on_hold_s=1.0, drafted_share=0.1) for ratio in ratios]


def results(**parts: object) -> Results:
    full = {
        "tails": {
            1: [turn(drafting=1.0, none=4.0, vllm=3.0, ngram=2.0)] * 3,
            4: [
                turn(drafting=1.0, none=ratio, vllm=1.5, ngram=1.25, accept_length=length)
                for ratio, length in ((2.0, 4.0), (2.5, 5.0), (9.0, 6.0))
            ],
        },
        "answers": [turn(drafting=2.0, none=5.0)],
        "heavy": [turn(drafting=10.0, none=none) for none in (14.0, 15.0, 21.0)],
        "worst": {
            1: [turn(drafting=d, none=10.0, hold=10.0) for d in (10.0, 10.0, 11.0)],
            64: [turn(drafting=10.0, none=10.0, hold=10.2)] * 3,
        },
        "within": {1: pairs(0.98, 0.96, 0.97), 64: pairs(1.0, 1.0)},
        "vllm_ngram": (800, 300),
        "settled": [turn(drafting=5.0, none=10.0)] * 2,
        "alarm_tokens": [140, 170],
        "corrupted": [turn(drafting=10.1, none=10.0, hold=10.0)] * 2,
        "corrupted_within": pairs(0.99, 0.97),
    }
    return Results(**(full | parts))  # type: ignore[arg-type]


def test_speedups_are_medians_and_the_tail_is_its_worst_size() -> None:
    record = record_of(Options(), results())
    assert (record["tail_speedup_1"], record["tail_speedup_4"], record["tail_speedup"]) == pytest.approx((4, 2.5, 2.5))
    assert (record["tail_over_vllm_4"], record["tail_over_ngram_4"]) == pytest.approx((1.5, 1.25))
    assert (record["rollout_speedup"], record["rollout_tail_speedup"]) == pytest.approx((1.5, 1.5))
    assert record["answers_speedup"] == pytest.approx(2.5)
    assert record["accept_length_tail"] == pytest.approx(3.5), "of three times 3, and 4, 5, 6"
    assert record["accept_length_vllm_ngram"] == pytest.approx(1.6)
    assert record["repeats"]["tail_speedup_4"] == pytest.approx([2.0, 2.5, 9.0])


def test_what_must_not_be_slower_counts_every_repeat() -> None:
    """One slow repeat of three, which a median would hide."""
    record = record_of(Options(), results())
    assert record["services_ratio_1"] == pytest.approx(30 / 31) and record["services_ratio_64"] == 1.0
    assert record["hold_ratio"] == pytest.approx(60 / 60.6) and record["services_ratio"] == pytest.approx(60 / 61)
    assert record["corrupted_services_ratio"] == pytest.approx(20 / 20.2) and record["alarm_tokens"] == 170
    assert record["settled_ratio"] == 2.0


def test_the_worst_case_is_what_a_governor_loses_times_what_its_engine_has_to_keep() -> None:
    record = record_of(Options(), results())
    one = 3 / (1 / 0.98 + 1 / 0.96 + 1 / 0.97)
    assert (record["governed_ratio_1"], record["governed_ratio_64"]) == pytest.approx((one, 1.0))
    assert record["worst_case_ratio"] == pytest.approx(one * 60 / 60.6) and record["worst_case_batch"] == 1
    assert record["corrupted_ratio"] == record["corrupted_governed_ratio"] == pytest.approx(2 / (1 / 0.99 + 1 / 0.97))
    assert record["drafted_share_1"] == pytest.approx(0.1)
    # By hand: of two pairs, stretched to governed steps of 1 s, the residuals of hold times are ± 0.01.
    assert governed_ratio(pairs(0.99, 0.97))[1] == pytest.approx(0.01, rel=0.02)
    assert record["worst_case_ratio_error"] == pytest.approx(
        math.hypot(record["governed_ratio_1_error"] * 60 / 60.6, record["hold_ratio_error"] * one)
    )


def test_pairs_have_the_steps_of_all_sequences() -> None:
    """Governed ones take 3 s, and so does one on hold that verifies a tree; what some sequences do is not compared."""
    steps, now = [], 0.0
    for vote in range(4 * TURN_STEPS):
        drafted = vote == TURN_STEPS
        now += 3.0 if drafted or not is_on_hold(vote) else 2.0
        few = 2 * TURN_STEPS <= vote < 3 * TURN_STEPS
        steps.append(Step(vote=vote, version=0, ended_at=now, num_requests=1 if few else 2, num_trees=drafted))
    assert is_on_hold(TURN_STEPS) and not is_on_hold(0), "the tree was drafted in the governed turn before"
    share = 1 / TURN_STEPS  # what the tree's step adds makes up for the first step, of which nobody knows when it began
    assert pairs_of(steps, 2, start=4) == [Pair(governed_s=3.0, on_hold_s=2.0, drafted_share=share, start=4)]
    assert pairs_of(steps[: TURN_STEPS // 2], 2) == [], "of one turn alone there is nothing to compare"


def test_turns_that_the_machine_disturbed_are_left_out_with_all_their_ways() -> None:
    calm = [turn(drafting=10.2, none=10.0, hold=10.1)] * 4
    hit = [turn(drafting=10.2, none=14.0, hold=10.1), turn(drafting=15.0, none=10.0, hold=10.1)]
    record = record_of(Options(), results(worst={1: calm + hit}))
    assert record["services_ratio_1"] == pytest.approx(100 / 102) and record["turns_left_out"] == 2
    assert record["hold_ratio"] == pytest.approx(100 / 101)
    assert undisturbed(calm[:2] + hit) == calm[:2] + hit, "half of them: that is how it is here"
    assert record["services_ratio_1_error"] == 0.0, "the calm ones are alike"
    alone = record_of(Options(), results(worst={1: calm[:1]}, corrupted=calm[:1]))
    unknown = {"services_ratio_1_error", "hold_ratio_error", "worst_case_ratio_error", "corrupted_ratio_error"}
    assert not unknown & set(alone), "of one turn no error is known"
    started = [turn(start=start, drafting=10.0, none=none, hold=10.0) for start, none in enumerate((9.8, 10.0, 10.2))]
    errors = record_of(Options(starts=3), results(worst={1: started * 20}))
    expected = pytest.approx(0.02 / 3**0.5)
    assert errors["hold_ratio_error"] == errors["services_ratio_1_error"] == expected, "turns tell nothing of starts"
    slow = record_of(Options(), results(worst={1: [turn(drafting=20.0, none=10.0, hold=10.0)] * 3}))
    assert slow["services_ratio_1"] == pytest.approx(0.5), "what is slow every time is not left out"


def test_a_part_that_was_not_measured_has_no_figures() -> None:
    record = record_of(Options(parts=("answers",)), Results(answers=[turn(drafting=2.0, none=5.0)]))
    assert not {"tail_speedup", "rollout_speedup", "worst_case_ratio", "corrupted_ratio", "alarm_tokens"} & set(record)
    assert list(record["turns"]) == ["answers"]
    without_stock = results(tails={2: [turn(drafting=1.0, none=2.0)]})
    assert "tail_over_vllm_2" not in record_of(Options(), without_stock)


def test_the_table_names_targets_and_what_went_unnoticed() -> None:
    record = record_of(Options(), results(alarm_tokens=[140, None]))
    json.dumps(record)
    lines = table(record).splitlines()
    assert any(line.split()[:4] == ["tail_speedup", "2.500", "≥", "2.00"] for line in lines)
    assert any(line.startswith("tail_speedup_4") and line.endswith("2.000 … 9.000") for line in lines)
    assert "the corrupted draft was not noticed" in lines


def test_loads_share_neither_prompts_nor_groups() -> None:
    options = Options(
        groups=3, n=2, tail_pool=30, corrupted_batch=1, batches=(2, 5), batch_rounds=3, repeats=2, answers=2
    )
    loads = make_loads(compose(["experiment=tiny_grpo"]), options, LengthModel())
    worst = [some for every in (loads.worst, loads.long) for repeats in every.values() for some in repeats]
    several = [loads.pools, loads.answers, loads.heavy, *worst]
    every = [loads.warm_up, loads.corrupted, *(load for some in several for load in some)]
    ids = [group_id for load in every for group_id in load.request.group_ids]
    prompts = [prompt.prompt_id for load in every for prompt in load.request.prompts]
    assert len(set(ids)) == len(ids) and len(set(prompts)) == len(prompts)
    assert [[len(load.request.prompts) for load in some] for some in loads.worst[5]] == [[5] * 3] * 2
    assert loads.heavy[0].request.prompts == loads.earlier[0][0].request.prompts, "visits of one prompt"
    assert loads.lengths.keys() == {
        f"{group}/{member}"
        for load in [*loads.heavy, *(load for visits in loads.earlier for load in visits)]
        for group in load.request.group_ids
        for member in range(2)
    }
    assert not loads.pools[0].request.sampling.ignore_eos and loads.worst[2][0][0].request.sampling.ignore_eos


def served(load: Load, lengths: list[int]) -> list[Group]:
    """The groups of a load, as if its answers had these lengths and counted up from 0."""
    groups = [make_group(load.request, place) for place in range(len(lengths))]
    for group, length in zip(groups, lengths, strict=True):
        group.trajectories[0].token_ids.extend(range(length))
    return groups


def test_tails_are_the_longest_answers_going_on_as_they_did() -> None:
    options = Options(
        parts=("tail",), tails=(1, 2), tail_rounds=2, tail_pool=8, groups=1, n=1, batches=(1,), repeats=1, answers=1
    )
    pool = make_loads(compose(["experiment=tiny_grpo"]), options, LengthModel()).pools[0]
    lengths = [30, 90, 20, 80, 70, 60, 3, 50]
    groups = served(pool, lengths)
    loads = tail_loads(pool, groups, options)
    assert [len(load.request.prompts) for count in (1, 2) for load in loads[count]] == [1, 1, 2, 2]
    tails = [load for round_ in zip(loads[1], loads[2], strict=True) for load in round_]
    assert [length for load in tails for length in load.lengths.values()] == [
        length - GIVEN_TOKENS for length in (90, 80, 70, 60, 50, 30)
    ]
    for load in tails:
        for place, group_id in enumerate(load.request.group_ids):
            whole = groups[pool.request.group_ids.index(group_id)]
            again = make_group(load.request, place)
            given = tuple(whole.trajectories[0].token_ids[:GIVEN_TOKENS])
            assert again.prompt.token_ids == whole.prompt.token_ids + given
            assert again.trajectories[0].seed == whole.trajectories[0].seed
    with pytest.raises(LongrollError, match="among the longest"):
        tail_loads(pool, served(pool, [9] * 8), options)


def test_a_corrupted_drafts_loads_are_of_about_one_length() -> None:
    options = Options(parts=("corrupted",), corrupted_batch=2, tail_pool=20, repeats=1)
    pool = make_loads(compose(["experiment=tiny_grpo"]), options, LengthModel()).corrupted
    loads = corrupted_loads(pool, served(pool, [100 + place for place in range(20)]), options)
    lengths = [sorted(load.lengths.values()) for load in loads]
    assert lengths == [[115 - place - GIVEN_TOKENS, 119 - place - GIVEN_TOKENS] for place in range(4)]
    with pytest.raises(LongrollError, match="got an answer of 23 tokens among the 8 longest of 20, expected 32"):
        corrupted_loads(pool, served(pool, [19 + place for place in range(20)]), options)


def test_engines_have_room_for_every_part_and_all_that_drafts() -> None:
    config = compose(["experiment=tiny_grpo", "engine.speculation.budget_nodes=9"])
    prepare(config, Options(batches=(3, 70), max_tokens=3000))
    speculation = config.engine.speculation
    assert (config.engine.max_num_seqs, speculation.budget_nodes) == (70, 9)
    assert config.model.max_model_len > 3000
    assert speculation.enabled and speculation.draft_travels and set(speculation.sources) > {"clover2", USELESS}
    assert speculation.draft_model is not None and speculation.draft_model.endswith("draft")


def test_shuffled_numbers_are_the_same_at_other_places() -> None:
    tensors = {"a": torch.arange(1000.0).view(10, 100), "b": torch.arange(3.0)}
    first, again = shuffled(tensors), shuffled(tensors)
    for name, tensor in tensors.items():
        assert first[name].shape == tensor.shape and torch.equal(first[name], again[name])
        assert torch.equal(first[name].flatten().sort().values, tensor.flatten())
    # A random permutation of n leaves 1 of them in place on average, more than 10 with a chance below 1e-7.
    assert int((first["a"] == tensors["a"]).sum()) <= 10


def plans() -> dict[str, TensorPlan]:
    _, tensors = load_draft(DRAFT)
    specs = [TensorSpec(name=TENSOR_PREFIX + n, shape=tuple(t.shape), dtype="float32") for n, t in tensors.items()]
    return served_plans(ModelConfig(path=str(TINY)), EngineConfig()) | plan_tensors(specs, None)


def test_a_corrupted_publication_differs_in_its_draft_alone() -> None:
    good, bad = (publication(plans(), str(TINY), DRAFT, is_corrupted=is_corrupted) for is_corrupted in (False, True))
    assert good.keys() == bad.keys() == plans().keys()
    assert all(dtype_name(tensor.dtype) == plans()[name].dtype for name, tensor in good.items())
    changed = {name for name in good if not torch.equal(good[name], bad[name])}
    assert changed and all(name.startswith(TENSOR_PREFIX) for name in changed)


@pytest.mark.parametrize("drop", ["lm_head.weight", TENSOR_PREFIX])
def test_a_publication_needs_what_the_service_serves(drop: str) -> None:
    some: Mapping[str, TensorPlan] = {name: plan for name, plan in plans().items() if not name.startswith(drop)}
    extra = {} if drop == TENSOR_PREFIX else {"other.weight": next(iter(some.values()))}
    with pytest.raises(LongrollError, match="one side only"):
        publication(dict(some) | extra, str(TINY), DRAFT, is_corrupted=False)


@pytest.mark.parametrize("left_out", [(), ("tails", "heavy"), ("worst", "within", "corrupted", "settled")])
def test_the_picture_has_what_was_measured(left_out: tuple[str, ...], tmp_path: Path) -> None:
    some = results(**{name: type(getattr(results(), name))() for name in left_out})
    path = tmp_path / "speculation.png"
    draw(some, record_of(Options(), some), path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "argument, named",
    [
        ("parts=tails", PARTS[0]),
        ("tails=0", "tails"),
        ("tail_pool=9", "tail_pool"),
        ("tails=1 tail_pool=10", "part corrupted"),
        ("batches=", "batches"),
        ("long_tokens=32", "several pairs"),
        ("repeats=0", "≥ 1"),
        ("starts=0", "starts"),
    ],
)
def test_wrong_options_are_refused(argument: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argument.split()) == 2
    assert named in capsys.readouterr().err
