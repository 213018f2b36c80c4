"""The newest figures of every shard, for whoever watches: asked in the background, each as old as its last answer.

Owns them and the questions under way. Decides nothing: a shard that does not answer is the watch's concern, one that is
dead the controller's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.receivers import answer
from rollout.errors import EngineDead
from rollout.feed_speculation import SpeculationWindow
from rollout.fleet import ShardStats
from rollout.governor.statistics import SpeculationRecord
from rollout.rate import RateWindow

logger = logging.getLogger(__name__)
ASK_EVERY_S = 1.0  # while somebody looks
ASK_RARELY_S = 10.0  # otherwise, for the throughput of the last minutes
ASKED_AT_ONCE = 256  # shards that may be asked so often; of more each is asked more rarely
DRAFTS_EVERY_S = 10.0
ANSWER_TIMEOUT_S = 5.0
RATE_SPAN_S = 6.0


@dataclass(slots=True)
class Figures:
    """What a shard said last, and how fast its count of sampled tokens grows. Owned by ShardFigures."""

    stats: ShardStats
    rate: RateWindow = field(default_factory=lambda: RateWindow(RATE_SPAN_S))
    num_answers: int = 0

    @property
    def tokens_per_s(self) -> float | None:
        """None until it has spoken twice."""
        return self.rate.per_second if self.num_answers > 1 else None


class ShardFigures:
    """See the module.

    Attributes:
        drafts: What drafts came to. Taking it from the shards resets their own counts.
        answered_s: When all had answered last, or had been given up; None: never.
    """

    def __init__(self) -> None:
        self.drafts = SpeculationWindow()
        self.answered_s: float | None = None
        self._by_rank: dict[int, Figures] = {}
        self._asked_s: float | None = None
        self._drafts_asked_s: float | None = None
        self._has_drafts = True  # until all say that they never have any
        self._is_asking = False

    def of(self, rank: int) -> Figures | None:
        """What is known of a shard."""
        return self._by_rank.get(rank)

    @property
    def tokens_per_s(self) -> float | None:
        """Of all shards together; None where nobody is known."""
        known = [rate for figures in self._by_rank.values() if (rate := figures.tokens_per_s) is not None]
        return sum(known) if known else None

    def is_due(self, num_shards: int, now: float, *, is_watched: bool) -> bool:
        """Whether they should be asked again; a first time only when somebody looks or ASK_RARELY_S have passed."""
        if self._asked_s is None:
            self._asked_s = now
        pause_s = (ASK_EVERY_S if is_watched else ASK_RARELY_S) * max(1.0, num_shards / ASKED_AT_ONCE)
        is_first = is_watched and self.answered_s is None
        return not self._is_asking and (is_first or now - self._asked_s >= pause_s)

    def begin(self, now: float) -> None:
        """They are about to be asked; see `ask`."""
        self._asked_s, self._is_asking = now, True

    async def ask(self, live: Mapping[int, Any], *, with_drafts: bool) -> dict[int, str]:
        """Ask them all at once.

        Args:
            live: Actors by rank.
            with_drafts: Also what drafts came to, every DRAFTS_EVERY_S.

        Returns:
            Those that are dead, and why.
        """
        try:
            reasons = await asyncio.gather(*(self._ask(rank, shard) for rank, shard in live.items()))
            self._by_rank = {rank: figures for rank, figures in self._by_rank.items() if rank in live}
            self.answered_s = now = time.monotonic()
            is_due = self._drafts_asked_s is None or now - self._drafts_asked_s >= DRAFTS_EVERY_S
            if with_drafts and live and self._has_drafts and is_due:
                self._drafts_asked_s = now
                await self._ask_for_drafts(live)
        finally:
            self._is_asking = False
        return {rank: reason for rank, reason in zip(live, reasons, strict=True) if reason is not None}

    async def _ask(self, rank: int, shard: Any) -> str | None:
        try:
            stats: ShardStats = await asyncio.wait_for(answer(shard.stats.remote()), ANSWER_TIMEOUT_S)
        except EngineDead as error:
            return str(error)
        except Exception as error:  # its figures grow old
            logger.warning("shard %d gave no statistics: %r", rank, error)
            if rank in self._by_rank:
                self._by_rank[rank] = Figures(self._by_rank[rank].stats)  # nobody knows how fast it is now
            return None
        known = self._by_rank.get(rank)
        if known is None or stats.num_tokens_sampled < known.stats.num_tokens_sampled:  # new, or started anew
            known = self._by_rank[rank] = Figures(stats)
        known.stats = stats
        known.num_answers += 1
        known.rate.sample(time.monotonic(), stats.num_tokens_sampled)
        return None

    async def _ask_for_drafts(self, live: Mapping[int, Any]) -> None:
        calls = [asyncio.wait_for(answer(shard.take_speculation.remote()), ANSWER_TIMEOUT_S) for shard in live.values()]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        records = [record for record in answers if isinstance(record, SpeculationRecord)]
        self._has_drafts = any(record is not None for record in answers)
        if records:
            total = SpeculationRecord(max_depth=records[0].max_depth)
            for record in records:
                total.merge(record)
            self.drafts.add(total, time.monotonic())
