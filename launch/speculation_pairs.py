"""What drafts cost or gain within one engine: its steps, governed and on hold by turns. A part of
launch.bench_speculation.

From records of steps to pairs of turns; which steps are in which is `rollout.governor.comparison`'s.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from actors.vllm_plugin.steps import Step
from rollout.governor.comparison import is_on_hold, turn_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two turns, one after the other, in either order.

    Attributes:
        governed_s, on_hold_s: Of a step, in the mean.
        drafted_share: Of governed steps, those that verified trees.
        start: Number of the engines' start.
    """

    governed_s: float
    on_hold_s: float
    drafted_share: float
    start: int = 0


def pairs_of(steps: Sequence[Step], num_sequences: int, start: int = 0) -> list[Pair]:
    """Pairs of turns, of the steps with all sequences; those of which one turn has none are left out.

    A step is governed that verifies a tree, or at whose end one might have been drafted: all that drafts cost.

    Args:
        steps: One after the other.
        num_sequences: In a step that counts, and in the one before it: others prefill, or some have ended.
        start: Number of the engines' start.
    """
    seconds: dict[int, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    num_drafted: dict[int, int] = defaultdict(int)
    for before, step in itertools.pairwise(steps):
        if before.num_requests == step.num_requests == num_sequences:
            is_governed = step.num_trees or not is_on_hold(step.vote)
            pair = turn_of(step.vote) // 2
            seconds[pair][not is_governed].append(step.ended_at - before.ended_at)
            num_drafted[pair] += step.num_trees > 0
    return [
        Pair(
            governed_s=statistics.fmean(governed),
            on_hold_s=statistics.fmean(on_hold),
            drafted_share=num_drafted[pair] / len(governed),
            start=start,
        )
        for pair, (governed, on_hold) in seconds.items()
        if governed and on_hold
    ]
