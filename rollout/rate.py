"""How fast a count grows, over the last few seconds. Time is passed in."""

from __future__ import annotations

from collections import deque


class RateWindow:
    """Samples of a count that only grows.

    Args:
        window_s: Span of the rate; samples older than that are forgotten, but for one.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, int]] = deque()

    def sample(self, now: float, count: int) -> None:
        self._samples.append((now, count))
        while len(self._samples) > 2 and now - self._samples[1][0] >= self._window_s:
            self._samples.popleft()

    @property
    def per_second(self) -> float:
        """0 with fewer than two samples."""
        if not self._samples:
            return 0.0
        (began, before), (ended, after) = self._samples[0], self._samples[-1]
        return (after - before) / (ended - began) if ended > began else 0.0
