"""The target's hidden states of the last steps, by request and position, until a draft model asks for them.

A draft model that is turned off for a while must be able to catch up when it is turned on again, and most steps it is
off. So a step only leaves a reference here, and rows are picked out when asked for. Knows nothing of who asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass(kw_only=True)
class Entry:
    """One step: the arguments of `HiddenLog.add`, and an index of them that most entries never need."""

    request_ids: tuple[str, ...]
    counts: np.ndarray
    first: np.ndarray
    rows: torch.Tensor

    @cached_property
    def places(self) -> dict[str, tuple[int, int, int]]:
        """For each request the first of its rows, how many, and the position of the first."""
        starts = self.counts.cumsum() - self.counts
        columns = zip(starts.tolist(), self.counts.tolist(), self.first.tolist(), strict=True)
        return dict(zip(self.request_ids, columns, strict=True))


class HiddenLog:
    """Owns what it keeps of the steps; the oldest are dropped beyond a bound.

    Args:
        max_bytes: Of hidden states.
        max_steps: That are looked through for a request, and whose objects Python's garbage collector looks through.
    """

    def __init__(self, max_bytes: int, max_steps: int) -> None:
        self._max_bytes, self._max_steps = max_bytes, max_steps
        self._entries: deque[Entry] = deque()
        self.num_bytes = 0

    def add(self, request_ids: Sequence[str], counts: np.ndarray, first: np.ndarray, rows: torch.Tensor) -> None:
        """A step.

        Args:
            request_ids: b of them.
            counts: [b] rows of each, one request after the other.
            first: [b] position of each one's first row; the others follow it.
            rows: [sum of counts, H]; must not be overwritten later.
        """
        self._entries.append(Entry(request_ids=tuple(request_ids), counts=counts, first=first, rows=rows))
        self.num_bytes += rows.nbytes
        while self.num_bytes > self._max_bytes or len(self._entries) > self._max_steps:
            self.num_bytes -= self._entries.popleft().rows.nbytes

    def since(self, request_id: str, position: int, stop: int) -> tuple[int, torch.Tensor | None]:
        """The states at positions up to `stop`, from `position` on if they are here, else from the first on that is.

        Returns:
            (position of the first row, [n, H]); (stop, None) where nothing is here.
        """
        parts: list[torch.Tensor] = []
        begin = stop
        for entry in reversed(self._entries):
            place = entry.places.get(request_id)
            if place is None:
                continue
            row, count, first = place
            if first >= begin:  # computed anew since, as those of a request that was preempted
                continue
            if first + count < begin:
                break
            start = max(first, position)
            parts.append(entry.rows[row + start - first : row + begin - first])
            begin = start
            if begin <= position:
                break
        return (begin, torch.cat(parts[::-1])) if parts else (stop, None)
