"""What the outcomes of a run say: latencies, the share within targets, rates and how much they vary.

Pure arithmetic; measures nothing itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from launch.http_load import Outcome
from rollout.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Of a request: time to first token, and mean time per output token after it, in seconds."""

    ttft_s: float = 0.200
    tpot_s: float = 0.050

    def are_met(self, outcome: Outcome) -> bool:
        """Whether it was answered in full and in time. One token has no time per output token."""
        if not outcome.is_good or outcome.ttft_s is None:
            return False
        return outcome.ttft_s <= self.ttft_s and (outcome.tpot_s is None or outcome.tpot_s <= self.tpot_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median, 95th and 99th percentile, and the largest, in milliseconds; NaN of nothing."""

    p50: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run.

    Attributes:
        num_requests, num_good, num_refused, num_errors: Sent; answered in full; 429; everything else.
        duration_s: From the first sending to the last end.
        requests_per_s, tokens_per_s: Answered in full, over the duration.
        share_within: Of the requests that were not refused, those within the targets.
        error_rate: Of the requests that were not refused.
        share_with_retry_after: Of the refusals, those that said when to come again; None where none was refused.
        ttft_ms, tpot_ms: Of those answered in full.
        qps_variation: Standard deviation over mean of the requests completed in a second, window by window; None where
            there are fewer than three whole windows.
        offered_variation: The same of the requests sent: what a Poisson process varies by itself.
        send_lag_ms: 99th percentile of how late the client sent.
        errors: The first few, as text.
    """

    num_requests: int
    num_good: int
    num_refused: int
    num_errors: int
    duration_s: float
    requests_per_s: float
    tokens_per_s: float
    share_within: float
    error_rate: float
    share_with_retry_after: float | None
    ttft_ms: Spread
    tpot_ms: Spread
    qps_variation: float | None
    offered_variation: float | None
    send_lag_ms: float
    errors: tuple[str, ...] = ()


def quantile(values: Sequence[float], share: float) -> float:
    """Smallest value that at least `share` of them do not exceed; NaN of nothing."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def spread_ms(seconds: Sequence[float]) -> Spread:
    p50, p95, p99, largest = (1e3 * quantile(seconds, share) for share in (0.5, 0.95, 0.99, 1.0))
    return Spread(p50=p50, p95=p95, p99=p99, max=largest)


def variation(times: Sequence[float], duration_s: float, window_s: float) -> float | None:
    """Standard deviation over mean of the number of events in each whole window of [0, duration_s)."""
    num_windows = int(duration_s // window_s)
    counts = [0] * num_windows
    for time in times:
        if 0 <= time < num_windows * window_s:
            counts[int(time // window_s)] += 1
    if num_windows < 3 or not any(counts):
        return None
    return statistics.pstdev(counts) / statistics.mean(counts)


def summarise(
    outcomes: Sequence[Outcome], targets: Targets, *, window_s: float = 30.0, steady_s: float | None = None
) -> Summary:
    """Everything of one run.

    Args:
        window_s: Of the variation.
        steady_s: The variation looks at [0, steady_s); None: up to the last sending.

    Raises:
        InvalidRequest: There are no outcomes.
    """
    if not outcomes:
        raise InvalidRequest("outcomes", "none", "at least one request")
    good = [one for one in outcomes if one.is_good]
    refused = [one for one in outcomes if one.is_refused]
    admitted = len(outcomes) - len(refused)
    duration_s = max(one.end_s for one in outcomes) - min(one.sent_s for one in outcomes)
    steady_s = max(one.sent_s for one in outcomes) if steady_s is None else steady_s
    errors = [one.error or f"HTTP {one.status}" for one in outcomes if not one.is_good and not one.is_refused]
    return Summary(
        num_requests=len(outcomes),
        num_good=len(good),
        num_refused=len(refused),
        num_errors=len(errors),
        duration_s=duration_s,
        requests_per_s=len(good) / duration_s,
        tokens_per_s=sum(one.num_tokens for one in good) / duration_s,
        share_within=sum(map(targets.are_met, outcomes)) / admitted if admitted else 0.0,
        error_rate=len(errors) / admitted if admitted else 0.0,
        share_with_retry_after=sum(one.retry_after_s is not None for one in refused) / len(refused)
        if refused
        else None,
        ttft_ms=spread_ms([one.ttft_s for one in good if one.ttft_s is not None]),
        tpot_ms=spread_ms([one.tpot_s for one in good if one.tpot_s is not None]),
        qps_variation=variation([one.end_s for one in good], steady_s, window_s),
        offered_variation=variation([one.sent_s for one in outcomes], steady_s, window_s),
        send_lag_ms=1e3 * quantile([one.sent_s - one.planned_s for one in outcomes], 0.99),
        errors=tuple(errors[:5]),
    )
