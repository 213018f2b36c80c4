"""Tokens that wait for their subscriber to ask for them, gathered so that few messages carry them.

A message between processes costs far more than what is in it, so all streams of a subscriber share one, which is sent
when its oldest token has waited for `coalesce_s`. Those of a stream that begins, or whose chunk ends, are sent as soon
as they are there, and alone if no others are due: whoever receives them waits for nothing else. Time is passed in
through a clock. Knows nothing of engines or of how the answer travels.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rollout.streaming import ChunkEnd, TokenDelta, TopLogprobs


@dataclass(slots=True)
class _Pending:
    """Neighbouring tokens of one stream. Owned by the outbox."""

    start: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TopLogprobs | None, ...] = ()
    end: ChunkEnd | None = None


class Outbox:
    """One subscriber's. Lives in one event loop, and is read by one poll at a time.

    Args:
        patience_s: A subscriber that has not asked for so long is gone: nothing is kept for it any more.
        clock: Seconds, monotonic.
    """

    def __init__(self, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience_s, self._clock = patience_s, clock
        self._pending: dict[str, list[_Pending]] = {}
        self._urgent: dict[str, None] = {}  # streams whose first token, or whose chunk's end, is pending
        self._oldest_at = self._asked_at = clock()
        self._num_polls = 0
        self._changed = asyncio.Event()

    @property
    def is_abandoned(self) -> bool:
        """Its subscriber is gone."""
        return self._num_polls == 0 and self._clock() - self._asked_at > self._patience_s

    def put(
        self,
        stream_id: str,
        start: int,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        top_logprobs: Sequence[TopLogprobs] = (),
        prompt_logprobs: tuple[TopLogprobs | None, ...] = (),
        end: ChunkEnd | None = None,
    ) -> None:
        """Tokens that follow others of their stream, or begin one. See TokenDelta."""
        if not self._pending:
            self._oldest_at = self._clock()
            self._changed.set()
        of_stream = self._pending.setdefault(stream_id, [])
        last = of_stream[-1] if of_stream else None
        if last is None or last.end is not None or last.start + len(last.token_ids) != start:
            last = _Pending(start)
            of_stream.append(last)
        last.token_ids.extend(token_ids)
        last.logprobs.extend(logprobs)
        last.top_logprobs.extend(top_logprobs)
        if prompt_logprobs:
            last.prompt_logprobs = prompt_logprobs
        last.end = end
        if start == 0 or end is not None:
            self._urgent[stream_id] = None
            self._changed.set()

    async def take(self, timeout_s: float, coalesce_s: float) -> tuple[TokenDelta, ...]:
        """Wait for tokens, and for others to join them.

        Args:
            timeout_s: Longest wait for any; the answer is empty after it.
            coalesce_s: Longest time that a token is kept for others to join it.
        """
        deadline = self._clock() + timeout_s
        self._num_polls += 1
        try:
            while True:
                now = self._clock()
                due = self._oldest_at + coalesce_s
                if self._urgent and now < due:
                    return self._drain(list(self._urgent))
                if self._pending and due <= now:
                    return self._drain([*self._urgent, *(name for name in self._pending if name not in self._urgent)])
                if not self._pending and deadline <= now:
                    return ()
                self._changed.clear()
                try:
                    async with asyncio.timeout((due if self._pending else deadline) - now):
                        await self._changed.wait()
                except TimeoutError:
                    continue  # look again
        finally:
            self._num_polls -= 1
            self._asked_at = self._clock()

    def _drain(self, stream_ids: Sequence[str]) -> tuple[TokenDelta, ...]:
        """All that is pending of these streams, the urgent ones among them."""
        self._urgent.clear()
        return tuple(
            TokenDelta(
                stream_id=stream_id,
                start=some.start,
                token_ids=tuple(some.token_ids),
                logprobs=tuple(some.logprobs),
                top_logprobs=tuple(some.top_logprobs),
                prompt_logprobs=some.prompt_logprobs,
                end=some.end,
            )
            for stream_id in stream_ids
            for some in self._pending.pop(stream_id)
        )


class Outboxes:
    """Of all subscribers of one shard.

    Args:
        patience_s: See Outbox.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._of: dict[str, Outbox] = {}

    def of(self, subscriber: str) -> Outbox:
        """The subscriber's, made when it is needed first; those of subscribers that are gone are dropped."""
        box = self._of.get(subscriber)
        if box is None:
            for name in [name for name, other in self._of.items() if other.is_abandoned]:
                del self._of[name]
            box = self._of[subscriber] = Outbox(self._patience_s)
        return box

    def find(self, subscriber: str) -> Outbox | None:
        """The outbox to put tokens into; None for a subscriber that is gone."""
        box = self.of(subscriber)
        return None if box.is_abandoned else box
