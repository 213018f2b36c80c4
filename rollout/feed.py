"""What a dashboard is told of the service: one bounded message, whatever the size of the fleet.

Owns the records, their limits, and how they become JSON. Knows nothing of who keeps what is in them
(`rollout.feed_history`, `rollout.feed_fleet`), who asks, or how it is drawn.

Times are seconds of the sender's monotonic clock; `Feed.now_s` is the moment on it at which the message was made, so
that a reader needs the differences only, and `Feed.wall_s` what a calendar says to it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from rollout.feed_fleet import Fleet

MAX_LANES = 32  # trajectories
MAX_BARS = 20  # newest chunks of each: 32K tokens in chunks of 2K, and some that were cut
MAX_SPANS = 6  # newest weight versions in a chunk
MAX_GROUPS = 24
MAX_SYNCS = 40
MAX_FAILURES = 20
MAX_MISMATCHES = 60
MAX_RATES = 300
MAX_ID = 96  # characters of an identifier, which clients choose
MAX_TEXT = 240  # characters of a reason


class LaneOrder(str, Enum):
    """Which trajectories to tell of."""

    LONGEST = "longest"  # under way, those with the most tokens first: what a step waits for
    NEWEST = "newest"  # whatever happened last, ended ones too
    MOVED = "moved"  # those that changed shards most often
    FAILED = "failed"  # failed or aborted, the last one first


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedQuery:
    """What a viewer wants to see beside the totals.

    Attributes:
        order: Which trajectories.
        find: Part of a trajectory's id; empty: any.
        cell: Place of a cell whose shards are to be told one by one; None: of none.
    """

    order: LaneOrder = LaneOrder.LONGEST
    find: str = ""
    cell: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionTokens:
    """So many tokens in a row were sampled under this weight version."""

    version: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A chunk on a shard. `end` is a finish reason, "lost" with its engine, "failed", or None while it runs."""

    started_s: float
    ended_s: float | None
    shard: int
    num_tokens: int
    is_moved: bool
    spans: tuple[VersionTokens, ...]
    num_cached_tokens: int
    end: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A trajectory.

    Attributes:
        trajectory_id: As the client named it, shortened.
        state: queued, running, landing, scoring; or its final status.
        num_prompt_tokens, num_tokens, max_tokens: Of the prompt, generated in chunks that came back, most of them.
        num_chunks, num_moves, num_lost: Chunks so far; of them elsewhere than the one before; lost with an engine.
        started_s, ended_s: Of its first chunk; of its end, None while it is under way.
        error: Why it failed.
        bars: Its newest chunks, in order.
    """

    trajectory_id: str
    state: str
    num_prompt_tokens: int
    num_tokens: int
    max_tokens: int
    num_chunks: int
    num_moves: int
    num_lost: int
    started_s: float
    ended_s: float | None
    error: str | None
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """Trajectories that were chosen, of `num_matching` among the `num_followed` whose chunks are kept."""

    shown: tuple[Lane, ...] = ()
    num_matching: int = 0
    num_followed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingGroup:
    """A group that is not finished. `most_tokens` has the member that has generated most."""

    group_id: str
    num_members: int
    num_done: int
    num_running: int
    num_queued: int
    most_tokens: int
    max_tokens: int
    waited_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Groups that a trainer waits for.

    Attributes:
        num_waiting: Not finished.
        num_whole: Of them, those none of whose members have ended.
        num_last: Those that wait for one last member.
        oldest_s: How long the oldest has waited.
        shown: Those that lack the fewest members, the oldest first.
    """

    num_waiting: int = 0
    num_whole: int = 0
    num_last: int = 0
    oldest_s: float = 0.0
    shown: tuple[WaitingGroup, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceAcceptance:
    """What one draft source came to; `by_depth` is the share of trials that hit, layer by layer, None without any."""

    source: str
    num_asked: int
    num_offered: int
    num_drafted: int
    num_accepted: int
    by_depth: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """Drafts over the last `span_s` seconds.

    Attributes:
        sources: In the order of their names.
        tokens_per_step: Of a sequence that was drafted for; None without any.
        off_share: Share of steps without drafts; None without steps.
        alarms: Sources whose acceptance fell at a sync, once for each time.
    """

    span_s: float
    sources: tuple[SourceAcceptance, ...]
    tokens_per_step: float | None
    off_share: float | None
    alarms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MismatchPoint:
    """KL(sampling ‖ training) of one training step in nats a token, by cause (rollout.mismatch); None: not measured."""

    version: int
    at_s: float
    all: float | None
    weights: float | None = None
    kv: float | None = None
    routing: float | None = None
    staleness: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncPoint:
    """A publication that succeeded or was refused; figures as in rollout.fleet.SyncReport.

    `reason` is None where it succeeded. `in_flight` says what became of running chunks; None where it did not get
    that far.
    """

    version: int
    at_s: float
    in_flight: str | None = None
    num_bytes: int = 0
    num_bytes_full: int = 0
    stage_s: float = 0.0
    flip_s: float = 0.0
    stall_s: float = 0.0
    num_lost: int = 0
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureCount:
    """`kind` is of rollout.scheduler.records: a FailureKind of trajectories, or a DeathKind of groups of shards."""

    kind: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FailurePoint:
    """A trajectory that failed."""

    trajectory_id: str
    at_s: float
    kind: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Since the controller's start. `num_restarts` counts groups of shards that were started again."""

    trajectories: tuple[FailureCount, ...] = ()
    groups: tuple[FailureCount, ...] = ()
    newest: tuple[FailurePoint, ...] = ()
    num_retries: int = 0
    num_restarts: int = 0
    num_internal_errors: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Tokens per second at a moment."""

    at_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Now, and counts since the start. `num_under_way` counts trajectories that are not final."""

    live_version: int
    num_running: int
    num_queued: int
    num_under_way: int
    num_finished: int = 0
    num_aborted: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    num_tokens_discarded: int = 0
    num_chunks: int = 0
    num_migrations: int = 0
    num_cuts: int = 0
    num_clients: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """The message. `is_simulated`: no engine is behind it; `notes` are for people."""

    now_s: float
    wall_s: float
    started_s: float
    totals: Totals
    fleet: Fleet
    lanes: Lanes
    groups: Groups
    failures: Failures
    rates: tuple[Rate, ...] = ()
    syncs: tuple[SyncPoint, ...] = ()
    mismatches: tuple[MismatchPoint, ...] = ()
    speculation: Speculation | None = None
    is_simulated: bool = False
    notes: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """UTF-8. A number that is none (NaN, infinite) becomes null, for JSON has no word for it."""
        return json.dumps(_plain(self), ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def shortened(text: str, most: int) -> str:
    """At most so many characters; what others wrote must not make a message large."""
    clean = text.encode("utf-8", "replace").decode()  # lone surrogates have no UTF-8
    return clean if len(clean) <= most else clean[: most - 1] + "…"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return round(value, 3) if abs(value) >= 1 else float(f"{value:.4g}")
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
