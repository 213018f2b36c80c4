"""How long a trajectory will become: from its siblings, and from earlier visits of its prompt.

Members of a group answer the same prompt, and their lengths resemble each other far more than those of
different prompts (Seer, arXiv 2511.14617, uses the same signal). Until one has ended a group is taken
for as long as it may become, so that what could be the longest starts first. Lengths have heavy tails:
a trajectory that outlives its estimate is expected to go on for as long again as it has already.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from rollout.scheduler.jobs import Job

MAX_PROMPTS = 1_000_000  # remembered between visits; the longest unvisited are forgotten
VISIT_WEIGHT = 0.5  # of what earlier visits say, in siblings: the policy has changed since
UNSEEN = 8.0  # before anything has ended, limits are taken for so many mean lengths
OUTLIVED = 2.0  # expected length of what has outlived its estimate, in what it has already


@dataclass(slots=True)
class Lengths:
    """Lengths seen: how many, and their sum, in tokens."""

    count: float = 0.0
    total: float = 0.0

    def add(self, num_tokens: float, weight: float = 1.0) -> None:
        self.count += weight
        self.total += weight * num_tokens


class LengthPredictor:
    """Owns what is known of groups under way and of prompts seen before."""

    def __init__(self, max_prompts: int = MAX_PROMPTS) -> None:
        self._max_prompts = max_prompts
        self._groups: dict[str, Lengths] = {}
        self._prompts: OrderedDict[str, float] = OrderedDict()  # mean length at the last visits
        self._all = Lengths()

    def open_group(self, group_id: str, prompt_key: str | None) -> None:
        """A group has begun; what earlier visits of its prompt tell counts for it."""
        lengths = self._groups[group_id] = Lengths()
        if prompt_key is not None and prompt_key in self._prompts:
            lengths.add(self._prompts[prompt_key], VISIT_WEIGHT)

    def close_group(self, group_id: str) -> None:
        """No member of the group is under way any more."""
        del self._groups[group_id]

    def ended(self, job: Job) -> None:
        """A member has ended by itself or at its limit, with `job.num_tokens`."""
        self._groups[job.group_id].add(job.num_tokens)
        self.remember(job.prompt_key, job.num_tokens)

    def remember(self, prompt_key: str | None, num_tokens: int) -> None:
        """An output of this prompt was so long: one that has just ended, or one of an earlier life of the service."""
        self._all.add(num_tokens)
        if prompt_key is None:
            return
        before = self._prompts.pop(prompt_key, float(num_tokens))
        self._prompts[prompt_key] = VISIT_WEIGHT * before + (1 - VISIT_WEIGHT) * num_tokens
        if len(self._prompts) > self._max_prompts:
            self._prompts.popitem(last=False)

    def is_known(self, group_id: str) -> bool:
        """Whether anything tells about the group's length."""
        return self._groups[group_id].count > 0

    def total_tokens(self, job: Job) -> float:
        """Expected length of a job's output in tokens, at least what it has and at most what it may have."""
        lengths = self._groups[job.group_id]
        if lengths.count == 0:
            return float(job.max_tokens)
        expected = lengths.total / lengths.count
        if job.num_tokens >= expected:
            expected = OUTLIVED * job.num_tokens
        return min(expected, float(job.max_tokens))

    def likely_remaining_tokens(self, job: Job) -> float:
        """Tokens still to come as a bet and not as a precaution: where nothing is known, as for the average of all."""
        if self.is_known(job.group_id):
            return self.remaining_tokens(job)
        mean = self._all.total / self._all.count if self._all.count else job.max_tokens / UNSEEN
        return min(max(mean - job.num_tokens, float(job.num_tokens)), float(job.remaining_tokens))

    def remaining_tokens(self, job: Job) -> float:
        """Expected tokens still to come."""
        return self.total_tokens(job) - job.num_tokens
