"""What drafts bring: counting them, the best tree, and estimates by budget and depth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import InvalidRequest
from rollout.governor.acceptance import Acceptance
from rollout.governor.config import GovernorConfig
from rollout.governor.expected_tree import best_nodes, best_trees
from rollout.governor.plans import Planner
from rollout.governor.records import Choice, SourceShare, StepOutcome, StepState
from rollout.governor.tally import StepTally
from rollout.speculation_config import MAX_WIDTH, SpeculationConfig
from tests.rollout.governor_engine import MAX_DEPTH, Engine, Source, chances, choice_of, cpu_s

BUDGETS = (1, 2, 4, 8, 16)


def test_a_tree_is_counted_by_depth_rank_and_source():
    tally = StepTally(3)
    # Rows: 0 root; 1 and 2 its children (a, b); 3 and 4 children of 1 (a, a); 5 child of 2 (b, never reached).
    tally.add(("a", "b"), [0, 0, 1, 1, 2], ["a", "b", "a", "a", "b"], [0, 1, 4])
    together, a, b = tally.together, tally.by_source["a"], tally.by_source["b"]
    assert (together.asked, together.offered, together.nodes, together.accepted) == (1, 1, 5, 2)
    assert together.trials[:2, :2].tolist() == [[1, 1], [1, 1]] and together.hits[:2, :2].tolist() == [[1, 0], [0, 1]]
    assert (a.nodes, a.accepted, b.nodes, b.accepted) == (3, 2, 2, 0)
    # The node of b is the second child of the root, but the first of b's.
    assert b.trials[:2, :2].tolist() == [[1, 0], [0, 0]] and b.hits.sum() == 0
    tally.add(("a", "b"), [0], ["b"], [0])
    assert (a.asked, a.offered, b.asked, b.offered) == (2, 1, 2, 2)


def test_depths_and_ranks_beyond_the_table_count_in_its_last_column():
    tally = StepTally(2)
    tally.add(("a",), [0, 1, 2, 3], ["a"] * 4, [0, 1, 2, 3])
    assert tally.together.trials[:, 0].tolist() == [1, 3] and tally.together.hits[:, 0].tolist() == [1, 2]


def test_a_tally_says_what_is_wrong():
    with pytest.raises(InvalidRequest, match="2 parents, 1 sources"):
        StepTally(2).add(("a",), [0, 1], ["a"], [0])
    with pytest.raises(InvalidRequest, match="source of a node: got z"):
        StepTally(2).add(("a",), [0], ["z"], [0])


LAYER = st.lists(st.floats(0.01, 1.0), min_size=MAX_WIDTH, max_size=MAX_WIDTH).map(
    lambda xs: sorted((x / (sum(xs) + 0.1) for x in xs), reverse=True)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(LAYER, min_size=1, max_size=4), st.integers(1, MAX_WIDTH))
def test_the_best_tree_is_no_worse_than_any_part_of_the_nodes_and_grows_by_less_and_less(layers, width):
    nodes = best_nodes(layers, width)
    table = best_trees(layers, width, range(1, len(nodes) + 3))
    for depth in range(1, len(layers) + 1):
        kept = sorted((p for p, layer, _ in nodes if layer <= depth), reverse=True)
        for budget in range(1, len(nodes) + 3):
            # By definition: the most probable nodes, of which every parent is one.
            assert table.accepted[depth - 1, budget - 1] == pytest.approx(sum(kept[:budget]))
            assert table.nodes[depth - 1, budget - 1] == min(budget, len(kept))
        assert table.depth[depth - 1].max() <= depth and table.width[depth - 1].max() <= width
        gains = np.diff(table.accepted[depth - 1], prepend=0.0)
        assert (np.diff(gains) <= 1e-12).all()  # sums of the same numbers in another order


def learned(source: Source, requests: int, budget=8, depth=MAX_DEPTH, seed=0, into=None, width=MAX_WIDTH):
    known = into or Acceptance(BUDGETS, MAX_DEPTH, width, memory_trials=1024)
    engine = Engine(cpu_s, {"s": source}, np.random.default_rng(seed))
    choice = choice_of(("s",), budget, depth, width)
    for _ in range(requests // 16):
        known.learn(engine.step(choice, 16, 16_000).tally.together, BUDGETS.index(budget), depth)
    return known


@pytest.mark.parametrize("offer", [1.0, 0.5])
def test_it_estimates_tokens_and_nodes_of_the_budget_it_saw_and_of_others(offer):
    source = Source(chances(0.7), offer=offer)
    known = learned(source, 8192)
    estimate = known.estimate()
    for index, budget in enumerate(BUDGETS):
        truth = source.expected(budget, MAX_DEPTH, MAX_WIDTH)
        # Tokens of a request have a standard deviation of at most 2.5 with these chances; 1,024 are remembered, with
        # half that weight: 2.5 / sqrt(512) = 0.11. Three of them; deeper budgets than were seen go by pooled depths.
        assert estimate.accepted[-1][index] == pytest.approx(truth, abs=0.33)
        assert estimate.nodes[-1][index] == pytest.approx(offer * budget, rel=0.2)  # of 1,024 offers, and of the prior
        assert 0 < estimate.relative_error[index] < 0.15
    assert estimate.offer == pytest.approx(offer, abs=4 * math.sqrt(0.25 / 512))


def test_sources_that_are_useless_are_seen_through_quickly():
    known = learned(Source(chances(0.01)), 64)
    estimate = known.estimate()
    # Two virtual trials at 0.5 + 0.15 + 0.08 + 0.04 among 64, and a hit or two: (1.5 + 2) / 66.
    assert estimate.accepted[-1][0] + estimate.accepted[-1][0] * estimate.relative_error[0] < 0.12


def test_what_is_new_outweighs_what_is_old():
    known = learned(Source(chances(0.8)), 4096)
    learned(Source(chances(0.2)), 4096, seed=1, into=known)
    # e ** (-4096 / 1024) of the old is left, 2 %, of a difference of 0.6; and 4 standard errors of 1,024 / 2 trials.
    assert known.by_depth()[0] == pytest.approx(0.2 * 1.32, abs=0.02 * 0.8 + 4 * math.sqrt(0.2 / 512))


def test_a_new_version_starts_from_the_old_one_but_believes_it_less():
    old = learned(Source(chances(0.8)), 4096)
    before = old.estimate().accepted[-1][3]
    old.weaken(64)
    assert old.num_trials == pytest.approx(64) and old.estimate().accepted[-1][3] == pytest.approx(before, rel=0.1)
    learned(Source(chances(0.2)), 256, seed=1, into=old)
    never = learned(Source(chances(0.2)), 256, seed=1)
    # 64 of 320 trials are of the old version.
    assert old.estimate().accepted[-1][3] < never.estimate().accepted[-1][3] + 64 / 320 * before + 0.1


def test_a_depth_that_was_never_reached_is_judged_by_the_one_above():
    known = learned(Source(chances(0.6, fall=1.0)), 2048, budget=1, depth=1)
    first, second = known.chances()[:2]
    assert second == pytest.approx(first)


def test_a_drafter_that_knows_where_it_is_right_is_estimated_by_what_its_trees_bring():
    known = Acceptance(BUDGETS, MAX_DEPTH, MAX_WIDTH, memory_trials=1024)
    rng = np.random.default_rng(3)
    for _ in range(400):
        tally = StepTally(MAX_DEPTH)
        for _ in range(8):
            is_sure = rng.random() < 0.5  # a long chain where it is right, and a single wrong node where it is not
            if is_sure:
                tally.add(("s",), [0, 1, 2, 3], ["s"] * 4, [0, 1, 2, 3, 4])
            else:
                tally.add(("s",), [0], ["s"], [0])
        known.learn(tally.together, 2, MAX_DEPTH)
    # Truth: 2 tokens a request. Averages: 0.5 in the first layer, then surely on.
    assert known.estimate().accepted[-1][2] == pytest.approx(2.0, abs=4 * 2 / math.sqrt(512))
    assert known.estimate().nodes[-1][2] == pytest.approx(2.5, rel=0.175)


def test_a_source_that_is_seldom_asked_costs_little() -> None:
    """Of a pair the dear source drafts for one request in four, where the cheap one had no idea."""
    limits = SpeculationConfig(max_depth=4, budget_nodes=8)
    planner, sources = Planner(limits, GovernorConfig()), ("clover2", "sibling")
    state = StepState(num_sequences=4, context_tokens=400, sources=sources, version=0)
    choice = Choice(
        shares=tuple(SourceShare(source=source, num_nodes=4) for source in sources),
        budget_nodes=8,
        max_depth=4,
        max_width=4,
    )

    def learn(num_asked: int) -> None:
        tally = StepTally(limits.max_depth)
        for place in range(4):
            who = sources if place < num_asked else ("sibling",)
            tally.add(who, (0, 1), (who[0],) * 2, (0, 1, 2))
        draft_s = tuple((source, s) for source, s in (("clover2", 4e-3 * num_asked), ("sibling", 2e-4)) if s)
        planner.learn(
            StepOutcome(
                choice=choice,
                num_sequences=4,
                context_tokens=400,
                version=0,
                rows=12,
                num_tokens=12,
                step_s=20e-3 + sum(s for _, s in draft_s),
                draft_s=draft_s,
                tally=tally,
            )
        )

    for _ in range(64):
        learn(4)
    together = next(p for p in planner.plans(state, [sources]) if p.budget_index == planner.budgets.index(8))
    by_source = {share.source: share for share in planner.shares(together)}
    assert by_source["sibling"].enough_tokens == math.inf and 1 < by_source["clover2"].enough_tokens < 3
    for _ in range(256):
        for num_asked in (0, 1, 1, 2):
            learn(num_asked)
    seldom = next(p for p in planner.plans(state, [sources]) if p.budget_index == together.budget_index)
    # A quarter of the requests. The first 256 were asked for all and count exp(-4): 0.75 / 0.25 of that is 5.5 % more.
    # Cells of the time model are a third of an octave wide, so a time may be carried over by up to 12 %.
    assert seldom.draft_s == pytest.approx(together.draft_s / 4, rel=0.175)
