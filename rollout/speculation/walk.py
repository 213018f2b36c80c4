"""The keyed verification walk: which drafted rows the target itself would have drawn.

Owns the walk and the moves of KV that it implies. Knows nothing of how tokens are sampled: it is told the
token that the target draws after every row, which with position-keyed sampling is a function of the row's
path alone, so the walk is exact for any tree and any drafter (drafter-invariant speculative decoding,
arXiv 2408.07978).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rollout.errors import InvalidRequest
from rollout.speculation.tree import TokenTree


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """What one verification pass yields for one request; `tokens` and `rows` are equally long, at least 1.

    Row legend as in `rollout.speculation.tree`. tokens[k] is the target's token after rows[k]; the KV of
    rows[k] belongs at slot base + k, and the last token has no KV yet: it is the root of the next step.
    """

    tokens: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def num_drafted(self) -> int:
        """Tokens that came from the draft: all but the last."""
        return len(self.tokens) - 1


def walk(tree: TokenTree, sampled: Sequence[int] | np.ndarray) -> Accepted:
    """Follow the target's own tokens from the root for as long as the tree has them.

    Args:
        tree: N drafted nodes.
        sampled: [N + 1] ids: sampled[r] is the target's keyed token after row r, at position base + depth[r] + 1.

    Returns:
        The tokens to emit and the rows they follow. The first row is always 0, so at least one token is emitted.

    Raises:
        InvalidRequest: `sampled` does not have one token for each row.
    """
    ids = sampled.tolist() if isinstance(sampled, np.ndarray) else sampled
    if len(ids) != tree.num_rows:
        raise InvalidRequest("sampled tokens", f"{len(ids)} for {tree.num_rows} rows", "one for each row of the tree")
    return _walk(tree, ids, 0)


def walk_batch(trees: Sequence[TokenTree], sampled: np.ndarray) -> list[Accepted]:
    """`walk` for a batch whose rows lie one request after the other.

    Args:
        trees: B trees; a request without a draft has `TokenTree.empty()`.
        sampled: [sum of num_rows] integers.

    Raises:
        InvalidRequest: `sampled` does not have one token for each row.
    """
    ids = sampled.tolist()
    num_rows = sum(tree.num_rows for tree in trees)
    if len(ids) != num_rows:
        raise InvalidRequest("sampled tokens", f"{len(ids)} for {num_rows} rows", "one for each row of the trees")
    accepted, start = [], 0
    for tree in trees:
        accepted.append(_walk(tree, ids, start))
        start += tree.num_rows
    return accepted


def kv_moves(trees: Sequence[TokenTree], accepted: Sequence[Accepted]) -> tuple[np.ndarray, np.ndarray]:
    """Which rows' KV must move so that accepted tokens are consecutive.

    Every row was written to the slot of its own index (row r of a request at slot base + r); rows[k] belongs
    at base + k. A row never moves up, and rows are ascending, but reading all before writing any is simplest.

    Args:
        trees: B trees, in the order of the batch's rows.
        accepted: B walks over them.

    Returns:
        (sources, destinations), int64 indices of rows of the flat batch; rows that stay are left out.
    """
    sources, destinations, start = [], [], 0
    for tree, walked in zip(trees, accepted, strict=True):
        for place, row in enumerate(walked.rows):
            if place != row:
                sources.append(start + row)
                destinations.append(start + place)
        start += tree.num_rows
    return np.array(sources, dtype=np.int64), np.array(destinations, dtype=np.int64)


def _walk(tree: TokenTree, sampled: Sequence[int], start: int) -> Accepted:
    row = 0
    token = int(sampled[start])
    tokens, rows = [token], [0]
    # Parents come first, so the children of the row just reached are all still to come: one pass does.
    for place, (candidate, parent) in enumerate(tree, 1):
        if parent == row and candidate == token:
            row = place
            token = int(sampled[start + row])
            tokens.append(token)
            rows.append(row)
    return Accepted(tokens=tuple(tokens), rows=tuple(rows))
