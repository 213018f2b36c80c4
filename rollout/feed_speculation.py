"""What drafts came to in the last minutes, by source, for a dashboard.

Owns a ring of the governors' records and their sum. Decides nothing about drafting.
"""

from __future__ import annotations

from collections import deque

from rollout.feed import MAX_ID, SourceAcceptance, Speculation, shortened
from rollout.governor.statistics import SpeculationRecord
from rollout.governor.tally import Tally

WINDOW_S = 120.0
MAX_SOURCES = 8
MAX_DEPTH = 8


class SpeculationWindow:
    """Records of the last `WINDOW_S` seconds, of all shards together."""

    def __init__(self) -> None:
        self._records: deque[tuple[float, SpeculationRecord]] = deque()

    def add(self, record: SpeculationRecord, now: float) -> None:
        """What happened since the record before, on one shard or on several."""
        self._records.append((now, record))
        self._forget(now)

    def told(self, now: float) -> Speculation | None:
        """The sum; None where nothing was recorded."""
        self._forget(now)
        if not self._records:
            return None
        total = SpeculationRecord(max_depth=max(record.max_depth for _, record in self._records))
        for _, record in self._records:
            if record.max_depth == total.max_depth:  # all engines of a service are configured alike
                total.merge(record)
        return Speculation(
            span_s=now - self._records[0][0],
            sources=tuple(_source(name, tally) for name, tally in sorted(total.by_source.items())[:MAX_SOURCES]),
            tokens_per_step=total.drafting_tokens / total.drafting_sequences if total.drafting_sequences else None,
            off_share=total.num_off_steps / total.num_steps if total.num_steps else None,
            alarms=tuple(sorted(shortened(name, MAX_ID) for name, count in total.num_alarms.items() if count)),
        )

    def _forget(self, now: float) -> None:
        while self._records and now - self._records[0][0] > WINDOW_S:
            self._records.popleft()


def _source(name: str, tally: Tally) -> SourceAcceptance:
    by_depth = [
        float(hits.sum() / trials[0]) if trials[0] else None
        for trials, hits in zip(tally.trials[:MAX_DEPTH], tally.hits[:MAX_DEPTH], strict=True)
    ]
    return SourceAcceptance(
        source=shortened(name, MAX_ID),
        num_asked=tally.asked,
        num_offered=tally.offered,
        num_drafted=tally.nodes,
        num_accepted=tally.accepted,
        by_depth=tuple(by_depth),
    )
