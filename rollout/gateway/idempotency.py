"""Answers that are given again to a request that is made again under the same Idempotency-Key.

A key belongs to whoever used it: the same key of another caller is another key. A request that comes while its first
is under way waits for that one. Only answers worth keeping are kept (see `Claim`); the oldest go first, by age and by
bytes. Owns the answers; time is passed in through a clock. Knows nothing of HTTP routes.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from rollout.errors import LongrollError

OVERHEAD_BYTES = 512  # of an entry beside its body


class IdempotencyConflict(LongrollError):
    """An Idempotency-Key was used for another request before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was answered."""

    status: int
    media_type: str
    body: bytes


@dataclass(slots=True)
class _Entry:
    digest: bytes
    made_at: float
    answer: Answer | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)


class Claim:
    """A request that is the first with its key. It ends with exactly one of `keep` and `drop`."""

    def __init__(self, store: IdempotencyStore, name: tuple[str, str], entry: _Entry) -> None:
        self._store, self._name, self._entry = store, name, entry

    def keep(self, answer: Answer) -> None:
        """The answer is given again from now on."""
        self._store._settle(self._name, self._entry, answer)

    def drop(self) -> None:
        """There is no answer worth keeping: the next request with this key is a first one."""
        self._store._settle(self._name, self._entry, None)


class IdempotencyStore:
    """Lives in one event loop.

    Args:
        ttl_s: How long an answer is kept.
        max_bytes: Of all answers together.
        clock: Seconds, monotonic.
    """

    def __init__(self, ttl_s: float, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s, self._max_bytes, self._clock = ttl_s, max_bytes, clock
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self.num_bytes = 0

    async def claim(self, caller: str, key: str, digest: bytes) -> Claim | Answer:
        """Begin a request, or get its answer, for which this may wait.

        Args:
            caller: Whose key it is.
            key: The Idempotency-Key.
            digest: Of everything that the answer depends on.

        Raises:
            IdempotencyConflict: The key was used with another digest.
        """
        name = (caller, key)
        while True:
            self._expire()
            entry = self._entries.get(name)
            if entry is None:
                entry = self._entries[name] = _Entry(digest, self._clock())
                self.num_bytes += OVERHEAD_BYTES
                return Claim(self, name, entry)
            if entry.digest != digest:
                raise IdempotencyConflict("Idempotency-Key: got one that was used with another request before")
            if entry.answer is not None:
                return entry.answer
            await entry.settled.wait()
            if entry.answer is not None:  # even if it was too large to be kept
                return entry.answer

    def _settle(self, name: tuple[str, str], entry: _Entry, answer: Answer | None) -> None:
        entry.answer = answer
        entry.settled.set()
        if answer is None:
            self._forget(name, 0)
            return
        self.num_bytes += len(answer.body)
        self._expire()

    def _expire(self) -> None:
        """Drop answers that are too old or too many; requests under way stay."""
        now = self._clock()
        for name, entry in list(self._entries.items()):
            is_old = now - entry.made_at > self._ttl_s
            if not is_old and self.num_bytes <= self._max_bytes:
                return
            if entry.answer is not None:
                self._forget(name, len(entry.answer.body))

    def _forget(self, name: tuple[str, str], num_bytes: int) -> None:
        if self._entries.pop(name, None) is not None:
            self.num_bytes -= num_bytes + OVERHEAD_BYTES
