"""How many nodes each request of a step gets: all the same, but less for those whose drafts keep failing.

Knows of requests only their names and what became of their drafts. What one request does not get, no other gets: the
budget that was chosen is the one whose step time is known.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from rollout.governor.records import Choice

MAX_REQUESTS = 4096  # remembered; those longest unseen are forgotten
MEMORY_STEPS = 16.0  # of a request's own drafts
PRIOR_STEPS = 8.0  # that the mean of all requests counts for one of them
HOPELESS = 0.125  # of the mean, below which a request is drafted for only now and then
RETRY_STEPS = 32  # how often then
FLEET_MEMORY = 512.0  # drafts of all requests that their mean remembers


@dataclass(slots=True)
class RequestRecord:
    """Decaying sums over one request's drafts, and steps since it was last drafted for."""

    drafted: float = 0.0
    accepted: float = 0.0
    waited: int = 0


class RequestBudgets:
    """Owns what became of each request's drafts."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, RequestRecord] = OrderedDict()
        self._drafted = self._accepted = 0.0
        self._turn = 0

    def learn(self, request_id: str, accepted: int) -> None:
        """A request's tree was verified, and so many of its nodes were accepted."""
        record = self._records.pop(request_id, None) or RequestRecord()
        record.drafted += 1 - record.drafted / MEMORY_STEPS
        record.accepted += accepted - record.accepted / MEMORY_STEPS
        self._records[request_id] = record
        if len(self._records) > MAX_REQUESTS:
            self._records.popitem(last=False)
        self._drafted += 1 - self._drafted / FLEET_MEMORY
        self._accepted += accepted - self._accepted / FLEET_MEMORY

    def forget(self, request_id: str) -> None:
        """The request ended."""
        self._records.pop(request_id, None)

    def budgets(self, choice: Choice, request_ids: Sequence[str]) -> list[int]:
        """Nodes for each request, 0 to choice.budget_nodes; at most choice.max_requests are above 0."""
        if choice.is_off:
            return [0] * len(request_ids)
        if choice.is_trial:
            return self._sounding(choice, len(request_ids))
        mean = self._accepted / self._drafted if self._drafted else 0.0
        return [self._budget(self._records.get(request_id), choice.budget_nodes, mean) for request_id in request_ids]

    def _sounding(self, choice: Choice, num_requests: int) -> list[int]:
        """Everybody the same, so that what is learned is the plan's; by turns, where not all are to be drafted for."""
        wanted = num_requests if choice.max_requests is None else min(choice.max_requests, num_requests)
        result = [0] * num_requests
        for offset in range(wanted):
            result[(self._turn + offset) % num_requests] = choice.budget_nodes
        self._turn += wanted
        return result

    def _budget(self, record: RequestRecord | None, budget: int, mean: float) -> int:
        if record is None or mean <= 0:
            return budget
        share = (record.accepted + PRIOR_STEPS * mean) / ((record.drafted + PRIOR_STEPS) * mean)
        # Only what the request did itself makes it hopeless; the prior alone would keep it above for ever.
        own = record.accepted / (record.drafted * mean) if record.drafted >= PRIOR_STEPS else 1.0
        if own < HOPELESS:
            record.waited += 1
            if record.waited < RETRY_STEPS:
                return 0
            record.waited = 0
        return max(1, min(budget, math.ceil(budget * share)))
