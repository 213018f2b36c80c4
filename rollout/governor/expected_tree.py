"""What a tree of so many nodes is expected to bring, from how often a node of each depth and rank is accepted.

The best tree under a budget takes the nodes of greatest path probability (as Sequoia, arXiv 2402.12374, and EAGLE-2,
arXiv 2406.16858, grow theirs), here with at most `max_width` in a layer. Its expected accepted tokens are the sum of
its nodes' path probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rollout.speculation_config import MAX_WIDTH


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedTrees:
    """The best tree for each limit of depth and each budget; all arrays are [max_depth, budgets].

    Attributes:
        nodes: Of the tree; fewer than the budget where there are no more.
        accepted: Tokens that it is expected to bring.
        depth, width: Of its deepest and of its widest layer.
    """

    nodes: np.ndarray
    accepted: np.ndarray
    depth: np.ndarray
    width: np.ndarray


def best_nodes(chances: Sequence[Sequence[float]], max_width: int) -> list[tuple[float, int, int]]:
    """All nodes worth having, best first; any first part of the list is the best tree of its size.

    Args:
        chances: [depth][rank]: probability that a node of that rank carries the target's token, given that the walk
            came to its parent. The sum over ranks is at most 1.
        max_width: Nodes in a layer, 1 to MAX_WIDTH.

    Returns:
        (probability that the node is accepted, its layer from 1, its place in the layer from 1).
    """
    nodes = []
    paths = [1.0]
    for depth, layer in enumerate(chances, start=1):
        paths = sorted([path * chance for path in paths for chance in layer[:MAX_WIDTH]], reverse=True)[:max_width]
        nodes += [(path, depth, place) for place, path in enumerate(paths, start=1)]
    # A child is no more probable than its parent; among equals the shallower comes first, so parents do.
    nodes.sort(key=lambda node: (-node[0], node[1]))
    return nodes


def best_trees(chances: Sequence[Sequence[float]], max_width: int, budgets: Sequence[int]) -> ExpectedTrees:
    """The best tree under every limit of depth, 1 to len(chances), and every budget."""
    probabilities, depths, places = (np.array(column) for column in zip(*best_nodes(chances, max_width), strict=True))
    max_depth, most = len(chances), len(depths)
    is_kept = depths <= np.arange(1, max_depth + 1)[:, None]
    sizes = is_kept.cumsum(axis=1)
    # Column b of each table is the tree of b nodes; where there are no more nodes, the largest tree goes on.
    rows, columns = is_kept.nonzero()
    tables = np.zeros((3, max_depth, most + 1))
    at = (rows, sizes[rows, columns])
    tables[0][at] = probabilities[columns]
    tables[1][at] = depths[columns]
    tables[2][at] = places[columns]
    wanted = np.minimum(budgets, most)
    return ExpectedTrees(
        nodes=np.minimum(wanted, sizes[:, -1:]),
        accepted=tables[0].cumsum(axis=1)[:, wanted],
        depth=np.maximum.accumulate(tables[1], axis=1)[:, wanted].astype(int),
        width=np.maximum.accumulate(tables[2], axis=1)[:, wanted].astype(int),
    )
