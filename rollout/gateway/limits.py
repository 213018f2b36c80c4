"""How many requests each caller may send. Time is passed in.

A token bucket: it fills at a steady rate up to its size, and every request takes one token out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_at: float


class RateLimiter:
    """One bucket for each caller; the callers are the holders of keys, so there are few.

    Args:
        per_second: Rate at which a bucket fills.
        burst: Its size.
    """

    def __init__(self, per_second: float, burst: int) -> None:
        self._per_second, self._burst = per_second, burst
        self._buckets: dict[str, _Bucket] = {}

    def take(self, caller: str, now: float) -> float | None:
        """Count a request. Returns None if it is within the limit, else the seconds until one would be."""
        bucket = self._buckets.get(caller)
        if bucket is None:
            bucket = self._buckets[caller] = _Bucket(self._burst, now)
        elapsed = max(0.0, now - bucket.filled_at)
        bucket.tokens, bucket.filled_at = min(self._burst, bucket.tokens + elapsed * self._per_second), now
        if bucket.tokens >= 1:
            bucket.tokens -= 1
            return None
        return (1 - bucket.tokens) / self._per_second
