"""Counts what the drafts of one step came to: by depth, by rank among siblings, and by source.

A trial of (depth, rank) is a node of that rank among the children of a row that was accepted, so that the target's
token for this place is known; a hit is the one that carries it. Ranks follow the order of the nodes in the tree,
which is the drafter's order of preference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rollout.errors import InvalidRequest
from rollout.speculation_config import MAX_WIDTH


@dataclass(slots=True, kw_only=True)
class Tally:
    """Of one source, or of all that drafted together. Owned by the StepTally that fills it.

    Attributes:
        trials, hits: float64 [max_depth, MAX_WIDTH]; row 0 is the first layer of the trees.
        asked: Requests that were to be drafted for.
        offered: Of those, requests that got at least one node.
        nodes: Drafted.
        accepted: Of those, on the path that was accepted.
    """

    trials: np.ndarray
    hits: np.ndarray
    asked: int = 0
    offered: int = 0
    nodes: int = 0
    accepted: int = 0

    @staticmethod
    def empty(max_depth: int) -> Tally:
        return Tally(trials=np.zeros((max_depth, MAX_WIDTH)), hits=np.zeros((max_depth, MAX_WIDTH)))

    def add(self, other: Tally) -> None:
        self.trials = self.trials + other.trials  # not in place: arrays that came through Ray cannot be written
        self.hits = self.hits + other.hits
        self.asked += other.asked
        self.offered += other.offered
        self.nodes += other.nodes
        self.accepted += other.accepted


@dataclass(slots=True)
class StepTally:
    """Of the trees of one step. Owned by whoever verifies; read by the governor.

    Attributes:
        max_depth: Layers that are told apart; deeper ones count as the last.
        together: Over all nodes, whoever drafted them.
        by_source: Over each source's nodes; ranks are among its own.
    """

    max_depth: int
    together: Tally = field(init=False)
    by_source: dict[str, Tally] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.together = Tally.empty(self.max_depth)

    def add(
        self, asked: Iterable[str], parents: Sequence[int], sources: Sequence[str], accepted_rows: Sequence[int]
    ) -> None:
        """One request's tree, verified.

        Args:
            asked: Sources that were to draft for it.
            parents: Of each node, its parent's row: 0 = the root, i + 1 = node i; parents come first.
            sources: Of each node, who drafted it.
            accepted_rows: Rows that the walk went through, the root included.

        Raises:
            InvalidRequest: Lengths differ, or a node was drafted by one who was not asked.
        """
        if len(parents) != len(sources):
            raise InvalidRequest(
                "tree", f"{len(parents)} parents, {len(sources)} sources", "one of each for every node"
            )
        tallies = {source: self._of(source) for source in asked}
        depth_of = {row: depth for depth, row in enumerate(accepted_rows)}
        ranks: dict[tuple[int, str | None], int] = {}
        offered = set()
        for node, (parent, source) in enumerate(zip(parents, sources, strict=True)):
            if source not in tallies:
                raise InvalidRequest("source of a node", source, f"one that was asked: {sorted(tallies)}")
            offered.add(source)
            tallies[source].nodes += 1
            if parent in depth_of:
                layer = min(depth_of[parent], self.max_depth - 1)
                is_hit = node + 1 in depth_of
                self._count(self.together, ranks, (parent, None), layer, is_hit)
                self._count(tallies[source], ranks, (parent, source), layer, is_hit)
        self.together.asked += 1
        self.together.offered += bool(offered)
        self.together.nodes += len(parents)
        for source, tally in tallies.items():
            tally.asked += 1
            tally.offered += source in offered

    def _of(self, source: str) -> Tally:
        tally = self.by_source.get(source)
        if tally is None:
            tally = self.by_source[source] = Tally.empty(self.max_depth)
        return tally

    @staticmethod
    def _count(
        tally: Tally, ranks: dict[tuple[int, str | None], int], key: tuple[int, str | None], layer: int, is_hit: bool
    ) -> None:
        rank = ranks.get(key, 0)
        ranks[key] = rank + 1
        rank = min(rank, MAX_WIDTH - 1)
        tally.trials[layer, rank] += 1
        if is_hit:
            tally.hits[layer, rank] += 1
            tally.accepted += 1
