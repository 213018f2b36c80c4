"""Finds engines that hang: busy, and without a step for too long. A process that was stopped looks the same.

Owns when each shard last made progress, and how long tokens took meanwhile. What becomes of one that hangs is its
caller's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.receivers import answer
from rollout.fleet import Pace


@dataclass(slots=True)
class _Seen:
    shard: Any
    at: float
    pace: Pace | None = None
    question: asyncio.Task[Pace] | None = None


class ShardWatch:
    """Looks at all shards when told to; never waits for an answer.

    Args:
        hang_timeout_s: Longest time that a shard with chunks may take for a step.
    """

    def __init__(self, hang_timeout_s: float) -> None:
        self._timeout_s = hang_timeout_s
        self._seen: dict[int, _Seen] = {}
        self._num_tokens, self._token_s = 0, 0.0

    def take_tokens(self) -> tuple[float, int]:
        """Seconds that tokens took together, and how many they were, since the last call; see Pace."""
        taken = self._token_s, self._num_tokens
        self._num_tokens, self._token_s = 0, 0.0
        return taken

    def look(self, shards: Mapping[int, Any], busy: set[int], now: float) -> list[int]:
        """Ask every shard for its pace, and return the ranks that hang.

        Args:
            shards: Live actors by rank.
            busy: Ranks that have been given chunks.
            now: Seconds, monotonic.
        """
        hanging = []
        for rank, shard in shards.items():
            seen = self._seen.get(rank)
            if seen is None or seen.shard is not shard or rank not in busy:
                if seen is not None and seen.question is not None:
                    seen.question.cancel()
                seen = self._seen[rank] = _Seen(shard=shard, at=now)
            if rank not in busy:
                continue
            self._take_answer(seen, now)
            if now - seen.at > self._timeout_s:
                hanging.append(rank)
            elif seen.question is None:
                seen.question = asyncio.ensure_future(answer(shard.pace.remote()))
        return hanging

    def _take_answer(self, seen: _Seen, now: float) -> None:
        if seen.question is None or not seen.question.done():
            return
        question, seen.question = seen.question, None
        if question.cancelled() or question.exception() is not None:
            return  # a shard that is gone is noticed where its chunks are
        before, seen.pace = seen.pace, question.result()
        if before is None:
            seen.at = now if seen.pace.num_steps else seen.at
        elif seen.pace.num_steps != before.num_steps:
            seen.at = now
            self._num_tokens += seen.pace.num_tokens - before.num_tokens
            self._token_s += seen.pace.token_s - before.token_s
