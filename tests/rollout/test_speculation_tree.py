"""Trees, masks and the walk, against definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import InvalidRequest
from rollout.speculation.tree import MAX_WIDTH, TokenTree, tree_masks
from rollout.speculation.walk import kv_moves, walk, walk_batch
from tests.rollout.speculation_cases import trees


def ancestors(tree: TokenTree, row: int) -> set[int]:
    found = {row}
    while row:
        row = int(tree.parents[row - 1])
        found.add(row)
    return found


def naive_walk(tree: TokenTree, sampled: list[int]) -> tuple[list[int], list[int]]:
    tokens, rows = [sampled[0]], [0]
    while True:
        onward = [row for row in tree.children(rows[-1]).tolist() if tree.tokens[row - 1] == tokens[-1]]
        if not onward:
            return tokens, rows
        [row] = onward
        rows.append(row)
        tokens.append(sampled[row])


@settings(deadline=None)
@given(trees())
def test_rows_see_themselves_and_their_ancestors(tree: TokenTree) -> None:
    mask = tree.mask()
    assert mask.shape == (tree.num_rows, tree.num_rows) and mask.dtype == bool
    for row in range(tree.num_rows):
        assert set(np.flatnonzero(mask[row]).tolist()) == ancestors(tree, row) == set(tree.path(row))
        assert tree.depths[row] == len(ancestors(tree, row)) - 1


@settings(deadline=None)
@given(st.lists(trees(), min_size=1, max_size=5), st.integers(0, 9))
def test_masks_of_a_batch_are_padded_with_rows_that_see_themselves(batch: list[TokenTree], more: int) -> None:
    rows = max(tree.num_rows for tree in batch) + more
    masks = tree_masks(batch, rows)
    for mask, tree in zip(masks, batch, strict=True):
        assert np.array_equal(mask[: tree.num_rows, : tree.num_rows], tree.mask())
        rest = mask.copy()
        rest[: tree.num_rows, : tree.num_rows] = False
        assert np.array_equal(rest, np.diag(np.arange(rows) >= tree.num_rows))
    with pytest.raises(InvalidRequest, match="at least"):
        tree_masks(batch, max(tree.num_rows for tree in batch) - 1)


@settings(deadline=None)
@given(trees())
def test_counts_agree(tree: TokenTree) -> None:
    assert tree.widths().sum() == tree.num_nodes == tree.num_rows - 1
    assert len(tree.widths()) == tree.depth == max(tree.depths)
    assert tree.num_nodes == sum(len(tree.children(row)) for row in range(tree.num_rows))
    assert TokenTree.of_lists(*tree.to_lists()) == tree and hash(TokenTree.of_lists(*tree.to_lists())) == hash(tree)
    tree.check(max_width=MAX_WIDTH, budget=max(1, tree.num_nodes))


@settings(deadline=None)
@given(trees(), st.integers(0, 30))
def test_a_prefix_is_a_tree(tree: TokenTree, num_nodes: int) -> None:
    prefix = tree.prefix(num_nodes)
    kept = min(num_nodes, tree.num_nodes)
    # Construction checks parents, siblings and widths.
    again = TokenTree(tokens=tree.tokens[:kept], parents=tree.parents[:kept])
    assert prefix == again and np.array_equal(prefix.depths, again.depths)
    assert np.array_equal(prefix.mask(), tree.mask()[: kept + 1, : kept + 1])


@settings(max_examples=100, deadline=None)
@given(st.lists(trees(vocab_size=3), min_size=1, max_size=4), st.data())
def test_walk_is_its_definition(batch: list[TokenTree], data: st.DataObject) -> None:
    sampled = [data.draw(st.lists(st.integers(0, 2), min_size=t.num_rows, max_size=t.num_rows)) for t in batch]
    walks = walk_batch(batch, np.concatenate([np.array(one) for one in sampled]))
    for tree, tokens, walked in zip(batch, sampled, walks, strict=True):
        assert walked == walk(tree, tokens) == walk(tree, np.array(tokens, dtype=np.int32))
        assert (list(walked.tokens), list(walked.rows)) == naive_walk(tree, tokens)
        assert walked.num_drafted == len(walked.tokens) - 1 == tree.depths[walked.rows[-1]]


@settings(max_examples=100, deadline=None)
@given(st.lists(trees(vocab_size=2), min_size=1, max_size=4), st.data())
def test_moves_make_accepted_rows_consecutive(batch: list[TokenTree], data: st.DataObject) -> None:
    total = sum(tree.num_rows for tree in batch)
    walks = walk_batch(batch, np.array(data.draw(st.lists(st.integers(0, 1), min_size=total, max_size=total))))
    sources, destinations = kv_moves(batch, walks)
    slots = np.arange(total)
    slots[destinations] = slots[sources]
    start = 0
    for tree, walked in zip(batch, walks, strict=True):
        assert (slots[start : start + len(walked.rows)] - start).tolist() == list(walked.rows)
        start += tree.num_rows
    assert np.all(destinations < sources)


def test_the_whole_path_is_walked_when_every_token_is_right() -> None:
    # 10 and 20 below the root, 11 and 12 below 10, 13 below 12.
    tree = TokenTree.of_lists([10, 20, 11, 12, 13], [0, 0, 1, 1, 4])
    walked = walk(tree, [10, 12, 99, 99, 13, 14])
    assert walked.tokens == (10, 12, 13, 14) and walked.rows == (0, 1, 4, 5)
    assert tree.widths().tolist() == [2, 2, 1]
    sources, destinations = kv_moves([TokenTree.empty(), tree], [walk(TokenTree.empty(), [7]), walked])
    assert sources.tolist() == [5, 6] and destinations.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([1, 2], [0], "2 tokens and 1 parents"),
        ([1, 2], [0, 2], "parent 2 of node 1"),
        ([1, 2, 3], [0, 3, 2], "no cycles"),
        ([1], [1], "no cycles"),
        ([1], [-1], "parents come first"),
        ([4, 4], [0, 0], "token 4 twice below row 0"),
        ([1, 2, 3, 4, 5], [0] * 5, "5 nodes at depth 1, expected at most 4"),
        ([1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 2, 2], None),
        ([1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 2, 2, 1], "5 nodes at depth 2"),
        ([-1], [0], "token of a draft tree: got -1"),
        ([2**31], [0], "token of a draft tree"),
        ([1.5], [0], "flat sequence or array of integers"),
        (np.ones((2, 2), np.int32), [0, 0], "flat sequence or array of integers"),
        (["a"], [0], "flat sequence or array of integers"),
    ],
)
def test_bad_trees_are_refused(tokens: object, parents: object, message: str | None) -> None:
    if message is None:
        assert TokenTree.of_lists(tokens, parents).num_nodes == len(tokens)  # type: ignore[arg-type]
        return
    with pytest.raises(InvalidRequest, match=message):
        TokenTree.of_lists(tokens, parents)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_width": 5, "budget": 8}, r"max_width: got 5, expected .* \[1, 4\]"),
        ({"max_width": 0, "budget": 8}, "max_width: got 0"),
        ({"max_width": 4, "budget": 0}, "budget: got 0, expected at least 1"),
        ({"max_width": 4, "budget": 4}, "got 5, expected at most its budget of 4"),
        ({"max_width": 2, "budget": 8}, "got 3, expected at most 2 nodes in a layer"),
        ({"max_width": 4, "budget": 8, "vocab_size": 9}, "got 9, expected an id of the target's vocabulary of 9"),
    ],
)
def test_limits_are_checked(limits: dict[str, int], message: str) -> None:
    tree = TokenTree.of_lists([1, 2, 9, 4, 5], [0, 0, 0, 1, 4])
    with pytest.raises(InvalidRequest, match=message):
        tree.check(**limits)


def test_one_token_is_asked_for_each_row() -> None:
    tree = TokenTree.chain([1, 2])
    with pytest.raises(InvalidRequest, match="2 for 3 rows"):
        walk(tree, [1, 2])
    with pytest.raises(InvalidRequest, match="3 for 4 rows"):
        walk_batch([tree, TokenTree.empty()], np.array([1, 2, 3]))
    with pytest.raises(InvalidRequest, match="prefix"):
        tree.prefix(-1)
