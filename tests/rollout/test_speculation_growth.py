"""The choice of nodes under a budget, and the union of several drafts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import InvalidRequest
from rollout.speculation.growth import ScoredTree, TreeGrowth, beam_tree, best_tree, merge
from rollout.speculation.tree import MAX_WIDTH
from tests.rollout.speculation_cases import trees

Candidates = tuple[list[int], list[int], list[float]]
Path = tuple[int, ...]


@st.composite
def candidates(draw: st.DrawFn, max_size: int = 20) -> Candidates:
    """Any candidates, wider than a tree may be and with duplicates; scores fall along paths, with ties."""
    tokens: list[int] = []
    parents: list[int] = []
    scores: list[float] = []
    for node in range(draw(st.integers(0, max_size))):
        parent = draw(st.integers(0, node))
        tokens.append(draw(st.integers(0, 4)))
        parents.append(parent)
        scores.append((scores[parent - 1] if parent else 0.0) - draw(st.integers(0, 3)) / 2)
    return tokens, parents, scores


def paths(tokens: list[int], parents: list[int]) -> list[Path]:
    """The tokens from the root to each node."""
    found: list[Path] = [()]
    for token, parent in zip(tokens, parents, strict=True):
        found.append((*found[parent], token))
    return found[1:]


def by_path(scored: ScoredTree) -> dict[Path, float]:
    return dict(zip(paths(*scored.tree.to_lists()), scored.scores.tolist(), strict=True))


def union(*drafts: Candidates) -> dict[Path, float]:
    """Every path with the best score that any draft gives it."""
    best: dict[Path, float] = {}
    for tokens, parents, scores in drafts:
        for path, score in zip(paths(tokens, parents), scores, strict=True):
            best[path] = max(score, best.get(path, -math.inf))
    return best


def check_choice(chosen: ScoredTree, offered: dict[Path, float], max_width: int, budget: int) -> None:
    """What is chosen is closed, within limits, scored as offered, and nothing better was left out."""
    kept = by_path(chosen)
    assert len(kept) == chosen.num_nodes <= budget
    assert all(kept[path] == offered[path] for path in kept)
    assert np.all(np.diff(chosen.scores) <= 0), "best first"
    assert chosen.num_nodes == 0 or chosen.tree.widths().max() <= max_width
    chosen.tree.check(max_width=max_width, budget=budget)
    for path in offered.keys() - kept.keys():
        has_parent = len(path) == 1 or path[:-1] in kept
        layer = [score for other, score in kept.items() if len(other) == len(path)]
        is_layer_full = len(layer) == max_width and offered[path] <= min(layer)
        is_tree_full = len(kept) == budget and offered[path] <= min(kept.values())
        assert not has_parent or is_layer_full or is_tree_full, f"{path} was left out"


@settings(max_examples=100, deadline=None)
@given(candidates(), st.integers(1, MAX_WIDTH), st.integers(1, 24))
def test_the_best_candidates_are_chosen(offer: Candidates, max_width: int, budget: int) -> None:
    chosen = best_tree(*offer, max_width=max_width, budget=budget, source=4)
    check_choice(chosen, union(offer), max_width, budget)
    assert np.all(chosen.sources == 4)
    for size in range(chosen.num_nodes):
        assert by_path(chosen.prefix(size)) == dict(itertools.islice(by_path(chosen).items(), size))


@settings(max_examples=100, deadline=None)
@given(st.lists(candidates(12), max_size=3), st.integers(1, MAX_WIDTH), st.integers(1, 24))
def test_a_merge_is_the_best_of_all(offers: list[Candidates], max_width: int, budget: int) -> None:
    drafts = [best_tree(*offer, max_width=MAX_WIDTH, budget=99, source=1 << i) for i, offer in enumerate(offers)]
    merged = merge(drafts, max_width=max_width, budget=budget)
    lists = [(*draft.tree.to_lists(), draft.scores.tolist()) for draft in drafts]
    check_choice(merged, union(*lists), max_width, budget)
    for path, source in zip(paths(*merged.tree.to_lists()), merged.sources.tolist(), strict=True):
        assert source == sum(1 << i for i, draft in enumerate(drafts) if path in by_path(draft))


@settings(deadline=None)
@given(candidates())
def test_merging_a_draft_with_itself_or_nothing_changes_nothing(offer: Candidates) -> None:
    draft = best_tree(*offer, max_width=3, budget=10)
    again = merge([draft, ScoredTree.empty(), draft], max_width=3, budget=10)
    assert again.tree == draft.tree and np.array_equal(again.scores, draft.scores)
    assert math.isclose(draft.expected_accepted, sum(math.exp(score) for score in draft.scores.tolist()))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, MAX_WIDTH), st.integers(1, 16))
def test_growing_by_layers_finds_what_choosing_from_all_finds(data: st.DataObject, width: int, budget: int) -> None:
    growth = TreeGrowth(max_width=width, budget=budget)
    frontier: list[int] = [0]
    everything: dict[Path, float] = {}
    kept: dict[int, tuple[Path, float]] = {0: ((), 0.0)}
    for _ in range(data.draw(st.integers(1, 4))):
        layer = [(token, row, -data.draw(st.floats(0.01, 3))) for row in frontier for token in range(3)]
        offered = {kept[row] + (token,): logprob for token, row, logprob in layer}
        everything |= {(*path, token): score + logprob for (path, score, token), logprob in offered.items()}
        rows = growth.extend([t for t, _, _ in layer], [row for _, row, _ in layer], [p for _, _, p in layer])
        assert len(rows) <= width
        for row, (token, parent) in zip(rows, growth.nodes(rows), strict=True):
            path = (*kept[parent][0], token)
            kept[row] = path, everything[path]
        frontier = rows
        if not rows:
            break
    check_choice(growth.finish(), everything, width, budget)


@settings(deadline=None)
@given(trees())
def test_scores_may_be_all_the_same(tree: object) -> None:
    tokens, parents = tree.to_lists()  # type: ignore[attr-defined]
    chosen = best_tree(tokens, parents, [0.0] * len(tokens), max_width=MAX_WIDTH, budget=99)
    assert sorted(by_path(chosen)) == sorted(paths(tokens, parents))


def test_unlikely_and_impossible_nodes_are_left_out() -> None:
    offer = [1, 2, 3, 4], [0, 0, 1, 3], [-0.1, -math.inf, -0.5, -2.0]
    assert by_path(best_tree(*offer, max_width=4, budget=9)) == {(1,): -0.1, (1, 3): -0.5, (1, 3, 4): -2.0}
    assert by_path(best_tree(*offer, max_width=4, budget=9, min_score=-1)) == {(1,): -0.1, (1, 3): -0.5}
    # A path is no likelier than its beginning, whatever a drafter says.
    assert by_path(best_tree([1, 2], [0, 1], [-1.0, -0.5], max_width=4, budget=9)) == {(1,): -1.0, (1, 2): -1.0}


@pytest.mark.parametrize(
    ("offer", "limits", "message"),
    [
        (([1], [0], [0.0]), {"max_width": 5, "budget": 1}, "max_width: got 5"),
        (([1], [0], [0.0]), {"max_width": 4, "budget": 0}, "budget: got 0"),
        (([1], [1], [0.0]), {"max_width": 4, "budget": 1}, "parent 1 of candidate 0"),
        (([1], [0], [math.nan]), {"max_width": 4, "budget": 1}, "score of a candidate: got nan"),
        (([1], [0], [0.0, 0.0]), {"max_width": 4, "budget": 1}, "1 tokens, 1 parents, 2 scores"),
    ],
)
def test_impossible_candidates_are_refused(offer: Candidates, limits: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        best_tree(*offer, **limits)


def test_impossible_limits_of_a_merge_and_of_growth_are_refused() -> None:
    for make in (lambda: merge([], max_width=5, budget=1), lambda: TreeGrowth(max_width=4, budget=0)):
        with pytest.raises(InvalidRequest, match="expected"):
            make()


@given(st.data(), st.integers(1, MAX_WIDTH), st.integers(1, 30))
@settings(deadline=None)
def test_a_beams_tree_is_the_best_tree_of_its_candidates(data: st.DataObject, width: int, budget: int) -> None:
    """Beams as drafters grow them: so many nodes in each layer, children of one parent different."""
    tokens: list[int] = []
    parents: list[int] = []
    scores: list[float] = []
    layer = [0]
    for _ in range(data.draw(st.integers(0, 5))):
        pairs = [(parent, token) for parent in layer for token in range(width)]
        chosen = sorted(data.draw(st.lists(st.sampled_from(pairs), min_size=1, max_size=width, unique=True)))
        layer = []
        for parent, token in chosen:
            tokens.append(token)
            parents.append(parent)
            step = data.draw(st.sampled_from([-math.inf, -1.0, -0.5, 0.0, 1e-7]))  # rounding may raise a score
            scores.append((scores[parent - 1] if parent else 0.0) + step)
            layer.append(len(tokens))
    found = beam_tree(tokens, parents, scores, budget=budget, source=3)
    expected = best_tree(tokens, parents, scores, max_width=width, budget=budget, source=3)
    assert found.tree == expected.tree and found.scores.tolist() == expected.scores.tolist()
    assert found.sources.tolist() == expected.sources.tolist()
