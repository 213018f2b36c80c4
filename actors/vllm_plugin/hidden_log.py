"""The target's hidden states of the last steps, by request and position, until a draft model asks for them.

A draft model that is turned off for a while must be able to catch up when it is turned on again, and most steps it is
off. So a step's rows are copied into a ring, and looked through when asked for. A ring, because memory that a step
leaves behind is memory that the next one cannot use again: its tensors would move through all of the heap, and a small
model's would be in no cache. Knows nothing of who asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(slots=True)
class Entry:
    """One step: the arguments of `HiddenLog.add`, and an index of them that most entries never need.

    Attributes:
        begin, end: Of its rows in the ring, counted from the first that was ever written.
    """

    request_ids: tuple[str, ...]
    counts: np.ndarray
    first: np.ndarray
    begin: int
    end: int
    _places: dict[str, tuple[int, int, int]] | None = None

    def place_of(self, request_id: str) -> tuple[int, int, int] | None:
        """The first of a request's rows, how many, and the position of the first; None if it was not in the step."""
        if self._places is None:
            starts = self.counts.cumsum() - self.counts
            columns = zip(starts.tolist(), self.counts.tolist(), self.first.tolist(), strict=True)
            self._places = dict(zip(self.request_ids, columns, strict=True))
        return self._places.get(request_id)


class HiddenLog:
    """Owns what it keeps of the steps; the oldest are dropped beyond a bound.

    Args:
        max_bytes: Of hidden states.
        max_steps: That are looked through for a request, and whose objects Python's garbage collector looks through.
    """

    def __init__(self, max_bytes: int, max_steps: int) -> None:
        self._max_bytes, self._max_steps = max_bytes, max_steps
        self._entries: deque[Entry] = deque()
        self._ring: torch.Tensor | None = None  # [capacity, H]
        self._capacity = 0
        self._end = 0  # rows ever written, and skipped at the ring's end

    @property
    def num_bytes(self) -> int:
        """Of the states that are kept."""
        if self._ring is None:
            return 0
        return sum(entry.end - entry.begin for entry in self._entries) * self._ring[0].nbytes

    def add(self, request_ids: Sequence[str], counts: np.ndarray, first: np.ndarray, rows: torch.Tensor) -> None:
        """A step.

        Args:
            request_ids: b of them.
            counts: [b] rows of each, one request after the other.
            first: [b] position of each one's first row; the others follow it.
            rows: [sum of counts, H]; copied. A step of more rows than there is room for is not kept.
        """
        num_rows, width = rows.shape
        if self._ring is None:
            self._capacity = max(1, self._max_bytes // (width * rows.element_size()))
            self._ring = rows.new_empty(self._capacity, width)
        if num_rows > self._capacity:
            self._entries.clear()
            return
        begin, entries = self._end, self._entries
        place = begin % self._capacity
        if place + num_rows > self._capacity:  # an entry lies in one piece
            begin, place = begin + self._capacity - place, 0
        self._end = end = begin + num_rows
        while entries and (entries[0].begin < end - self._capacity or len(entries) >= self._max_steps):
            entries.popleft()
        self._ring[place : place + num_rows].copy_(rows)
        entries.append(Entry(tuple(request_ids), counts, first, begin, end))

    def since(self, request_id: str, position: int, stop: int) -> tuple[int, torch.Tensor | None]:
        """The states at positions up to `stop`, from `position` on if they are here, else from the first on that is.

        Returns:
            (position of the first row, [n, H]); (stop, None) where nothing is here.
        """
        parts: list[torch.Tensor] = []
        begin = stop
        for entry in reversed(self._entries):
            place = entry.place_of(request_id)
            if place is None:
                continue
            row, count, first = place
            if first >= begin:  # computed anew since, as those of a request that was preempted
                continue
            if first + count < begin:
                break
            start = max(first, position)
            assert self._ring is not None
            row += entry.begin % self._capacity - first
            parts.append(self._ring[row + start : row + begin])
            begin = start
            if begin <= position:
                break
        return (begin, torch.cat(parts[::-1])) if parts else (stop, None)
