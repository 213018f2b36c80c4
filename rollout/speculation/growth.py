"""The best tree under a budget: from scored candidates, of one drafter or of several, to what is verified.

Owns the scores of nodes and the choice among them. Knows nothing of how drafters find candidates or of what a
verified row costs; the caller turns that into a budget and a least score.

A node's score is the logarithm of the probability that the walk reaches it: its parents' were right, and the target
draws its token. The expected gain of a step is the sum of these probabilities over the nodes, so the best tree of N
nodes is that of the N highest scores, and because a path is never likelier than its beginning, those form a tree.
The dynamic width of Clover-2 (arXiv 2408.00264) and the re-ranking of EAGLE-2 (arXiv 2406.16858) are this choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rollout.errors import InvalidRequest
from rollout.speculation.tree import Ints, TokenTree, check_limits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredTree:
    """A tree whose nodes come best first, so that a trimmed prefix is again the best tree of its size.

    Attributes:
        tree: N nodes.
        scores: [N] float64, logarithm of the probability that the walk reaches the node; never rises along the nodes.
        sources: [N] int32 bit sets of the drafters that proposed the node; the bits are the caller's.
    """

    tree: TokenTree
    scores: np.ndarray
    sources: np.ndarray

    @classmethod
    def empty(cls) -> ScoredTree:
        """No draft."""
        return _EMPTY

    @property
    def num_nodes(self) -> int:
        """Drafted tokens."""
        return self.tree.num_nodes

    @property
    def expected_accepted(self) -> float:
        """Drafted tokens that the walk takes on average, if the scores are right."""
        return float(np.exp(self.scores).sum())

    def prefix(self, num_nodes: int) -> ScoredTree:
        """The best `num_nodes` nodes."""
        return ScoredTree(
            tree=self.tree.prefix(num_nodes), scores=self.scores[:num_nodes], sources=self.sources[:num_nodes]
        )


def best_tree(
    tokens: Ints,
    parents: Ints,
    scores: Sequence[float] | np.ndarray,
    *,
    max_width: int,
    budget: int,
    source: int = 1,
    min_score: float = -math.inf,
) -> ScoredTree:
    """Choose the nodes to verify among the candidates of one drafter.

    Args:
        tokens: [M] ids. One token twice below one parent is one candidate, with the higher score.
        parents: [M] rows of the candidates, parents first: parents[i] in [0, i], 0 the root.
        scores: [M] log-probabilities of the paths. One above its parent's counts as its parent's.
        max_width: Nodes in one layer, at most; in [1, MAX_WIDTH].
        budget: Nodes, at most; at least 1.
        source: Bit of the drafter.
        min_score: Leave out what is less likely.

    Returns:
        At most `budget` nodes, best first.

    Raises:
        InvalidRequest: A limit, a parent or a score is impossible, or the lengths differ.
    """
    check_limits(max_width=max_width, budget=budget)
    union = _Union()
    union.add(np.asarray(tokens).tolist(), np.asarray(parents).tolist(), np.asarray(scores).tolist(), source)
    return union.best(max_width, budget, min_score)


def beam_tree(
    tokens: Sequence[int], parents: Sequence[int], scores: Sequence[float], *, budget: int, source: int = 1
) -> ScoredTree:
    """`best_tree` of a beam, in a fifth of the time: its candidates differ, and its layers keep their width.

    Args:
        tokens, parents, scores, budget, source: As of `best_tree`, M of each.

    Returns:
        At most `budget` nodes, best first. A score that is no number counts as impossible.
    """
    paths = [0.0]
    for parent, score in zip(parents, scores, strict=True):
        paths.append(min(score, paths[parent]) if score == score else -math.inf)
    # The sort keeps the order of equals, so a parent, at least as likely, comes before its children.
    order = sorted(range(1, len(paths)), key=lambda row: -paths[row])[:budget]
    order = [row for row in order if paths[row] > -math.inf]
    if not order:
        return _EMPTY
    rows = [0] * len(paths)
    for place, row in enumerate(order, 1):
        rows[row] = place
    return ScoredTree(
        tree=TokenTree.of_lists([tokens[row - 1] for row in order], [rows[parents[row - 1]] for row in order]),
        scores=np.array([paths[row] for row in order]),
        sources=np.full(len(order), source, dtype=np.int32),
    )


def merge(trees: Sequence[ScoredTree], *, max_width: int, budget: int, min_score: float = -math.inf) -> ScoredTree:
    """One tree of what several drafters propose, under one budget.

    A node that several propose has the highest of its scores: they are estimates of one event, not several chances.

    Args:
        trees: The proposals; empty ones are welcome.
        max_width: Nodes in one layer, at most; in [1, MAX_WIDTH].
        budget: Nodes, at most; at least 1.
        min_score: Leave out what is less likely.

    Returns:
        At most `budget` nodes, best first, each with the union of its sources.

    Raises:
        InvalidRequest: A limit is impossible.
    """
    check_limits(max_width=max_width, budget=budget)
    union = _Union()
    for scored in trees:
        union.add(*scored.tree.to_lists(), scored.scores.tolist(), scored.sources.tolist())
    return union.best(max_width, budget, min_score)


class TreeGrowth:
    """Candidates of a drafter that goes layer by layer, the width of each layer bounded as it grows.

    Owned by one proposal. `extend` is called once a layer; `finish` chooses among all that was kept.

    Args:
        max_width: Nodes in one layer, at most.
        budget: Nodes of the tree in the end, at most; at least 1.
        source: Bit of the drafter.
    """

    def __init__(self, *, max_width: int, budget: int, source: int = 1) -> None:
        check_limits(max_width=max_width, budget=budget)
        self._max_width, self._budget, self._source = max_width, budget, source
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._scores: list[float] = []

    def extend(self, tokens: Ints, parents: Ints, logprobs: Sequence[float] | np.ndarray) -> list[int]:
        """Keep the likeliest candidates of the next layer.

        Args:
            tokens: [C] ids.
            parents: [C] rows, 0 or what the call before returned.
            logprobs: [C] log-probability that the target draws the token, its parent being right.

        Returns:
            Rows of the at most `max_width` candidates kept, likeliest first; empty if none can be among the best.
        """
        floor = self._floor()
        layer = sorted(
            (
                (min(logprob, 0.0) + (self._scores[parent - 1] if parent else 0.0), parent, token)
                for token, parent, logprob in zip(
                    np.asarray(tokens).tolist(),
                    np.asarray(parents).tolist(),
                    np.asarray(logprobs).tolist(),
                    strict=True,
                )
            ),
            key=lambda candidate: -candidate[0],
        )
        rows = []
        for score, parent, token in layer[: self._max_width]:
            if score <= floor:
                break
            self._tokens.append(token)
            self._parents.append(parent)
            self._scores.append(score)
            rows.append(len(self._tokens))
        return rows

    def nodes(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """(token, row of the parent) of candidates kept."""
        return [(self._tokens[row - 1], self._parents[row - 1]) for row in rows]

    def finish(self) -> ScoredTree:
        """The best of all candidates."""
        return best_tree(
            self._tokens,
            self._parents,
            self._scores,
            max_width=self._max_width,
            budget=self._budget,
            source=self._source,
        )

    def _floor(self) -> float:
        """A score that no longer makes it into the tree: the budget is full of better ones."""
        if len(self._scores) < self._budget:
            return -math.inf
        return sorted(self._scores, reverse=True)[self._budget - 1]


class _Union:
    """Candidates by (row of the parent, token); parents come first and are at least as likely as their children."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], int] = {}
        self._scores: list[float] = []
        self._sources: list[int] = []

    def add(self, tokens: list[int], parents: list[int], scores: list[float], sources: int | list[int]) -> None:
        if not len(tokens) == len(parents) == len(scores):
            raise InvalidRequest(
                "candidates", f"{len(tokens)} tokens, {len(parents)} parents, {len(scores)} scores", "as many of each"
            )
        bits = [sources] * len(tokens) if isinstance(sources, int) else sources
        rows, paths = [0], [0.0]
        for node, (token, parent, score, source) in enumerate(zip(tokens, parents, scores, bits, strict=True)):
            if not 0 <= parent <= node:
                raise InvalidRequest(
                    "candidates", f"parent {parent} of candidate {node}", f"a row in [0, {node}]: parents come first"
                )
            if score != score:
                raise InvalidRequest("score of a candidate", score, "a log-probability")
            paths.append(path := min(score, paths[parent]))
            edge = rows[parent], token
            row = self._rows.get(edge)
            if row is None:
                self._scores.append(path)
                self._sources.append(source)
                row = self._rows[edge] = len(self._scores)
            else:
                self._scores[row - 1] = max(self._scores[row - 1], path)
                self._sources[row - 1] |= source
            rows.append(row)

    def best(self, max_width: int, budget: int, min_score: float) -> ScoredTree:
        """Take nodes from the best down while their parent was taken and their layer has room.

        Where a layer is full this is greedy: a likelier leaf may take the place of a node with more below it.
        """
        edges, scores = list(self._rows), self._scores
        # The sort keeps the order of equals, so a parent, at least as likely, comes before its children.
        order = sorted(range(len(scores)), key=lambda node: -scores[node])
        taken = {0: (0, 0)}  # row here: (row in the tree, depth)
        widths: dict[int, int] = {}
        nodes: list[int] = []
        tokens: list[int] = []
        parents: list[int] = []
        for node in order:
            if len(nodes) == budget or scores[node] < min_score or scores[node] == -math.inf:
                break
            row, token = edges[node]
            if row not in taken:
                continue
            parent, depth = taken[row][0], taken[row][1] + 1
            width = widths.get(depth, 0)
            if width == max_width:
                continue
            widths[depth] = width + 1
            nodes.append(node)
            tokens.append(token)
            parents.append(parent)
            taken[node + 1] = len(nodes), depth
        if not nodes:
            return _EMPTY
        return ScoredTree(
            tree=TokenTree.of_lists(tokens, parents),
            scores=np.array([scores[node] for node in nodes]),
            sources=np.array([self._sources[node] for node in nodes], dtype=np.int32),
        )


_EMPTY = ScoredTree(tree=TokenTree.empty(), scores=np.empty(0), sources=np.empty(0, np.int32))
