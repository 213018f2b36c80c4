"""What drafts of a source, or of several together, are accepted: by depth and rank, forgetting what is old.

Counts decay by the number of trials, not by time: what is not tried does not change. A depth that was hardly reached
is judged by the one above it. What a tree was expected to bring is compared with what it brought, by budget, since a
drafter that knows which of its nodes are good does better than averages tell, and one that repeats itself worse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rollout.governor.expected_tree import best_trees
from rollout.governor.tally import Tally
from rollout.speculation_config import MAX_WIDTH

PRIOR_CHANCES = (0.5, 0.15, 0.08, 0.04)  # by rank, before anything was tried; hopeful enough to be tried
PRIOR_TRIALS = 2.0  # what they count
DEEPER_TRIALS = 4.0  # what the depth above counts for the next
MAX_CHANCE = 0.98  # of all ranks together
PRIOR_ASKED = 4.0  # requests that "all get an offer" counts
FACTOR_SIGMA = 0.1  # of that comparison, where a budget was never used
PRIOR_NODES = 16.0  # nodes that "all that was possible" counts
PRIOR_ACCEPTED = 16.0  # tokens that "as expected" counts in the comparison
STALE_SHARE = 0.02  # new trials, of those known, after which estimates are worked out again, once asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What trees bring, by limit of depth and by budget: nested lists [max_depth][budgets].

    Attributes:
        nodes: Mean of a request.
        accepted: Mean tokens of a request.
        depth, width: Of the best tree.
        relative_error: Standard error of `accepted`, in itself, by budget.
        offer: Chance that a request gets any node.
        first_layer: Chance that the first layer is accepted, if there is one.
    """

    nodes: list[list[float]]
    accepted: list[list[float]]
    depth: list[list[int]]
    width: list[list[int]]
    relative_error: list[float]
    offer: float
    first_layer: float


class Acceptance:
    """Of one source, or of one set of sources drafting together.

    Args:
        budgets: Numbers of nodes that can be chosen, ascending.
        max_depth, max_width: Limits of a tree.
        memory_trials: Trials of the first layer that are remembered.
    """

    def __init__(self, budgets: Sequence[int], max_depth: int, max_width: int, memory_trials: float) -> None:
        self._budgets, self._max_depth, self._max_width = tuple(budgets), max_depth, max_width
        self._memory = memory_trials
        self._trials = np.zeros((max_depth, MAX_WIDTH))
        self._hits = np.zeros((max_depth, MAX_WIDTH))
        self._asked = self._offered = 0.0
        self._drafted = np.zeros((max_depth, len(self._budgets)))  # requests, by limits of their trees
        self._brought = np.zeros((2, len(self._budgets)))  # nodes that they got, tokens accepted
        self._fresh = 0.0  # trials that the estimate does not know of
        self._estimate = self._work_out()

    @property
    def num_trials(self) -> float:
        """Requests that were drafted for and are remembered, with or without an offer."""
        return self._asked

    def chances(self) -> list[list[float]]:
        """[depth][rank], each given that the walk came to the node's parent."""
        above = np.array(PRIOR_CHANCES)
        strength = PRIOR_TRIALS
        result = []
        for trials, hits in zip(self._trials, self._hits, strict=True):
            above = (hits + strength * above) / (trials + strength)
            total = above.sum()
            if total > MAX_CHANCE:
                above = above * (MAX_CHANCE / total)
            above = np.maximum.accumulate(above[::-1])[::-1]  # a later rank is never the better one
            above = above * min(1.0, MAX_CHANCE / above.sum())
            result.append(above.tolist())
            strength = DEEPER_TRIALS
        return result

    def by_depth(self) -> list[float]:
        """Share of the trials of each layer that were accepted, whatever the rank; 0 where there were none."""
        first = self._trials[:, 0]
        return np.divide(self._hits.sum(axis=1), first, out=np.zeros(len(first)), where=first > 0).tolist()

    def estimate(self) -> Estimate:
        """What trees would bring now."""
        if self._fresh > STALE_SHARE * self._asked:
            self._estimate = self._work_out()
        return self._estimate

    def learn(self, tally: Tally, budget_index: int, max_depth: int) -> None:
        """Drafts of one step, made under that budget and depth."""
        if not tally.asked:
            return
        layer = min(max_depth, self._max_depth) - 1
        self._scale(math.exp(-tally.asked / self._memory))
        self._trials += tally.trials
        self._hits += tally.hits
        self._asked += tally.asked
        self._offered += tally.offered
        self._drafted[layer, budget_index] += tally.asked
        self._brought[0, budget_index] += tally.nodes
        self._brought[1, budget_index] += tally.accepted
        self._fresh += tally.asked

    def weaken(self, max_trials: float) -> None:
        """The weights, or the drafter, changed: what is known counts for at most so many trials from now on."""
        if self._asked > max_trials:
            self._scale(max_trials / self._asked)
        self._fresh = math.inf

    def _scale(self, factor: float) -> None:
        """Everything counts that much less."""
        for counts in (self._trials, self._hits, self._drafted, self._brought):
            counts *= factor
        self._asked *= factor
        self._offered *= factor

    def _work_out(self) -> Estimate:
        self._fresh = 0.0
        chances = self.chances()
        trees = best_trees(chances, self._max_width, self._budgets)
        offer = (self._offered + PRIOR_ASKED) / (self._asked + PRIOR_ASKED)
        plain = offer * trees.accepted
        (got, accepted), possible = self._brought, (self._drafted * trees.nodes).sum(axis=0)
        expected = (self._drafted * plain).sum(axis=0)  # by the averages alone, had they been known all along
        pooled = (accepted.sum() + PRIOR_ACCEPTED) / (expected.sum() + PRIOR_ACCEPTED)
        factors = (accepted + PRIOR_ACCEPTED * pooled) / (expected + PRIOR_ACCEPTED)
        filled = (got.sum() + PRIOR_NODES) / (possible.sum() + PRIOR_NODES)
        fills = (got + PRIOR_NODES * filled) / (possible + PRIOR_NODES)
        first = min(sum(chances[0][: self._max_width]), MAX_CHANCE)
        chance_error = math.sqrt((1 - first) / (max(first, 1e-3) * (self._asked * offer + PRIOR_TRIALS)))
        own = expected + PRIOR_ACCEPTED
        return Estimate(
            nodes=(np.minimum(fills, 1.0) * trees.nodes).tolist(),
            accepted=np.minimum(factors * plain, trees.nodes).tolist(),
            depth=trees.depth.tolist(),
            width=trees.width.tolist(),
            # Of the first layer's chance, carried to all tokens, which it multiplies; and of the budget's own factor.
            relative_error=np.hypot(chance_error, FACTOR_SIGMA * np.sqrt(PRIOR_ACCEPTED / own)).tolist(),
            offer=offer,
            first_layer=first,
        )
