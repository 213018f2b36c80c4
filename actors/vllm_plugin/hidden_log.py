"""The target's hidden states of the last steps, by request and position, until a draft model asks for them.

A draft model that is turned off for a while must be able to catch up when it is turned on again, and most steps it is
off. So a step's rows are copied into a ring, and looked through when asked for. A ring, because memory that a step
leaves behind is memory that the next one cannot use again: its tensors would move through all of the heap, and a small
model's would be in no cache. On a CPU a few decoding steps are copied together, as what is done in every step is never
in its caches and costs ten times what it costs in a loop. Knows nothing of who asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

HELD_STEPS = 64  # decoding steps that are copied together
HELD_BYTES = 64 * 2**10  # that they are at most: a sixteenth of a core's cache, so that the heap hardly moves


@dataclass(slots=True, kw_only=True)
class Entry:
    """Steps that lie together in the ring, and an index of them that most entries never need.

    Attributes:
        request_ids: b of them.
        counts: [b] rows of each, one request after the other; None: one each, of each of `num_steps` steps in turn.
        first: [b] position of each one's first row; the others follow it.
        num_steps: 1 where there are counts.
        begin, end: Of the rows in the ring, counted from the first that was ever written.
    """

    request_ids: Sequence[str]
    counts: np.ndarray | None
    first: np.ndarray
    num_steps: int = 1
    begin: int = 0
    end: int = 0
    _places: dict[str, tuple[int, int, int]] | None = None

    @property
    def stride(self) -> int:
        """From one row of a request to the next."""
        return len(self.request_ids) if self.counts is None else 1

    def place_of(self, request_id: str) -> tuple[int, int, int] | None:
        """The first of a request's rows, how many, and the position of the first; None if it is not in here."""
        if self._places is None:
            number = len(self.request_ids)
            if self.counts is None:
                columns = zip(range(number), [self.num_steps] * number, self.first.tolist(), strict=True)
            else:
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
        self._num_steps = 0  # of the entries
        self._ring: torch.Tensor | None = None  # [capacity, H]
        self._capacity = 0
        self._end = 0  # rows ever written, and skipped at the ring's end
        self._held: list[torch.Tensor] = []  # decoding steps of the same requests, not copied yet
        self._held_ids: list[str] = []
        self._held_first: np.ndarray = np.empty(0, dtype=np.int64)
        self._held_most = 0
        self._next_position = 0  # of the first request, in the step that would go on with them

    @property
    def num_bytes(self) -> int:
        """Of the states that are kept."""
        self._copy_held()
        if self._ring is None:
            return 0
        return sum(entry.end - entry.begin for entry in self._entries) * self._ring[0].nbytes

    def add(self, request_ids: Sequence[str], counts: np.ndarray | None, first: np.ndarray, rows: torch.Tensor) -> None:
        """A step.

        Args:
            request_ids: b of them.
            counts: [b] rows of each, one request after the other; None: one each.
            first: [b] position of each one's first row; the others follow it. Valid in this call.
            rows: [sum of counts, H]; copied, but on a CPU not always in this call where there are no counts: nobody may
                write to them any more. A step of more rows than there is room for is not kept.
        """
        if counts is None and rows.is_cpu:
            self._hold(request_ids, first, rows)
            return
        self._copy_held()
        self._keep([rows], Entry(request_ids=list(request_ids), counts=counts, first=first.copy()))

    def _hold(self, request_ids: Sequence[str], first: np.ndarray, rows: torch.Tensor) -> None:
        position = int(first[0])
        if position != self._next_position or request_ids != self._held_ids:
            self._copy_held()
        if not self._held:
            self._held_ids, self._held_first = list(request_ids), first.copy()
            self._held_most = min(HELD_STEPS, min(HELD_BYTES, self._max_bytes) // rows.nbytes)
        self._held.append(rows)
        self._next_position = position + 1
        if len(self._held) >= self._held_most:
            self._copy_held()

    def _copy_held(self) -> None:
        held = self._held
        if held:
            self._held = []
            entry = Entry(request_ids=self._held_ids, counts=None, first=self._held_first, num_steps=len(held))
            self._keep(held, entry)

    def _keep(self, parts: Sequence[torch.Tensor], entry: Entry) -> None:
        """Copy these rows; the entry that tells what they are is told where they are."""
        num_rows, width = sum(map(len, parts)), parts[0].shape[1]
        if self._ring is None:
            self._capacity = max(1, self._max_bytes // (width * parts[0].element_size()))
            self._ring = parts[0].new_zeros(self._capacity, width)  # written to, so that no later step waits for pages
        entries = self._entries
        if num_rows > self._capacity:
            entries.clear()
            self._num_steps = 0
            return
        begin = self._end
        place = begin % self._capacity
        if place + num_rows > self._capacity:  # an entry lies in one piece
            begin, place = begin + self._capacity - place, 0
        entry.begin, entry.end = begin, begin + num_rows
        self._end = entry.end
        self._num_steps += entry.num_steps
        while entries and (entries[0].begin < self._end - self._capacity or self._num_steps > self._max_steps):
            self._num_steps -= entries.popleft().num_steps
        torch.cat(parts, out=self._ring[place : place + num_rows])
        entries.append(entry)

    def since(self, request_id: str, position: int, stop: int) -> tuple[int, torch.Tensor | None]:
        """The states at positions up to `stop`, from `position` on if they are here, else from the first on that is.

        Returns:
            (position of the first row, [n, H]); (stop, None) where nothing is here.
        """
        self._copy_held()
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
            row += entry.begin % self._capacity
            stride = entry.stride
            parts.append(self._ring[row + (start - first) * stride : row + (begin - first) * stride : stride])
            begin = start
            if begin <= position:
                break
        return (begin, torch.cat(parts[::-1])) if parts else (stop, None)
