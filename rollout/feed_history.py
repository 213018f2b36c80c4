"""What a dashboard shows of the recent past: chunks of trajectories, throughput, syncs, mismatch, drafts, failures.

Owns bounded rings of these, filled by whoever makes the things happen, and the choice of what is told. Nothing
depends on them: they are lost with their process. Time is passed in. Knows nothing of engines, clients or clocks, so
the service and the simulator fill the same class.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rollout.feed import (
    MAX_BARS,
    MAX_FAILURES,
    MAX_ID,
    MAX_LANES,
    MAX_MISMATCHES,
    MAX_RATES,
    MAX_SPANS,
    MAX_SYNCS,
    MAX_TEXT,
    Bar,
    FailurePoint,
    FeedQuery,
    Lane,
    LaneOrder,
    Lanes,
    MismatchPoint,
    Rate,
    SyncPoint,
    VersionTokens,
    shortened,
)
from rollout.types import VersionSpan

MAX_FOLLOWED = 4096  # trajectories; at MAX_BARS chunks of about 200 bytes they take 16 MB
RATE_EVERY_S = 2.0


@dataclass(slots=True)
class Track:
    """A trajectory that is followed. Owned by the history; its attributes are those of rollout.feed.Lane."""

    num_prompt_tokens: int
    max_tokens: int
    started_s: float
    num_tokens: int = 0
    num_chunks: int = 0
    num_moves: int = 0
    num_lost: int = 0
    touched_s: float = 0.0
    ended_s: float | None = None
    status: str | None = None
    error: str | None = None
    bars: deque[Bar] = field(default_factory=lambda: deque(maxlen=MAX_BARS))


class FeedHistory:
    """See the module. Identifiers are those of flights, "<handle>:<trajectory id>".

    Up to MAX_FOLLOWED trajectories are followed from their next chunk on. While all places are taken by trajectories
    under way, others are not: what is followed is then whole histories of some and not fragments of all.
    """

    def __init__(self) -> None:
        self._tracks: dict[str, Track] = {}
        self._ended: deque[str] = deque()  # followed and over, the oldest first
        self.syncs: deque[SyncPoint] = deque(maxlen=MAX_SYNCS)
        self.mismatches: deque[MismatchPoint] = deque(maxlen=MAX_MISMATCHES)
        self.failures: deque[FailurePoint] = deque(maxlen=MAX_FAILURES)
        self.rates: deque[Rate] = deque(maxlen=MAX_RATES)

    def has(self, flight_id: str) -> bool:
        """Whether it is followed, or was when it ended."""
        return flight_id in self._tracks

    def chunk_started(
        self, flight_id: str, shard: int, now: float, *, num_prompt_tokens: int, num_tokens: int, max_tokens: int
    ) -> bool:
        """A chunk was given to a shard.

        Args:
            flight_id: Whose.
            shard: Where.
            now: Seconds.
            num_prompt_tokens, num_tokens, max_tokens: Of the trajectory: prompt, generated before, most.

        Returns:
            Whether the trajectory is followed.
        """
        track = self._tracks.get(flight_id)
        if track is None or track.ended_s is not None:
            track = self._open(flight_id, num_prompt_tokens, max_tokens, now)
            if track is None:
                return False
        last = track.bars[-1] if track.bars else None
        if last is not None and last.ended_s is None:  # nobody said what became of it
            track.bars[-1] = _closed(last, now, "lost")
        is_moved = last is not None and last.shard != shard
        track.num_moves += is_moved
        track.num_tokens, track.touched_s = num_tokens, now
        track.num_chunks += 1
        track.bars.append(
            Bar(
                started_s=now,
                ended_s=None,
                shard=shard,
                num_tokens=0,
                is_moved=is_moved,
                spans=(),
                num_cached_tokens=0,
                end=None,
            )
        )
        return True

    def chunk_ended(
        self,
        flight_id: str,
        shard: int,
        now: float,
        end: str,
        *,
        num_tokens: int = 0,
        spans: Iterable[VersionSpan] = (),
        num_cached_tokens: int = 0,
    ) -> None:
        """A chunk came back, or will not; harmless for one that is not followed, or has been given up before.

        Args:
            flight_id: Whose.
            shard: Where it ran.
            now: Seconds.
            end: See rollout.feed.Bar.
            num_tokens: That it added.
            spans: Their weight versions.
            num_cached_tokens: Found in the prefix cache.
        """
        track = self._tracks.get(flight_id)
        if track is None or not track.bars or track.bars[-1].ended_s is not None or track.bars[-1].shard != shard:
            return
        told = tuple(VersionTokens(version=s.version, num_tokens=s.stop - s.start) for s in spans)[-MAX_SPANS:]
        track.bars[-1] = _closed(track.bars[-1], now, end, num_tokens, told, num_cached_tokens)
        track.num_tokens += num_tokens
        track.num_lost += end == "lost"
        track.touched_s = now

    def trajectory_ended(self, flight_id: str, status: str, now: float, error: str | None = None) -> None:
        """A trajectory is final; harmless for one that is not followed."""
        track = self._tracks.get(flight_id)
        if track is None or track.ended_s is not None:
            return
        if track.bars and track.bars[-1].ended_s is None:
            track.bars[-1] = _closed(track.bars[-1], now, "lost")
        track.ended_s = track.touched_s = now
        track.status, track.error = status, None if error is None else shortened(error, MAX_TEXT)
        self._ended.append(flight_id)

    def failed(self, flight_id: str, kind: str, reason: str, now: float) -> None:
        """A trajectory failed."""
        told = shortened(reason, MAX_TEXT)
        self.failures.append(FailurePoint(trajectory_id=shown_id(flight_id), at_s=now, kind=kind, reason=told))

    def rate(self, tokens_per_s: float, now: float) -> None:
        """Throughput of the fleet, kept every RATE_EVERY_S at most."""
        if not self.rates or now - self.rates[-1].at_s >= RATE_EVERY_S:
            self.rates.append(Rate(at_s=now, tokens_per_s=tokens_per_s))

    def lanes(self, query: FeedQuery, state_of: Callable[[str], str | None]) -> Lanes:
        """What is told of trajectories.

        Args:
            query: Which, and in what order.
            state_of: Where a trajectory is that is under way, by flight id; None where that is not known.
        """
        wanted = query.find.casefold()
        found = [
            (flight_id, track)
            for flight_id, track in self._tracks.items()
            if _belongs(track, query.order) and (not wanted or wanted in _bare(flight_id).casefold())
        ]
        found.sort(key=lambda entry: _key(entry[1], query.order))
        return Lanes(
            shown=tuple(_lane(flight_id, track, state_of) for flight_id, track in found[:MAX_LANES]),
            num_matching=len(found),
            num_followed=len(self._tracks),
        )

    def _open(self, flight_id: str, num_prompt_tokens: int, max_tokens: int, now: float) -> Track | None:
        while len(self._tracks) >= MAX_FOLLOWED and self._ended:
            oldest = self._ended.popleft()
            track = self._tracks.get(oldest)
            if track is not None and track.ended_s is not None:  # not one that began again under the same id
                del self._tracks[oldest]
        if len(self._tracks) >= MAX_FOLLOWED and flight_id not in self._tracks:
            return None
        self._tracks.pop(flight_id, None)
        track = Track(num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens, started_s=now, touched_s=now)
        self._tracks[flight_id] = track
        return track


def shown_id(flight_id: str) -> str:
    """A trajectory's id as it is shown: without its client's handle, shortened."""
    return shortened(_bare(flight_id), MAX_ID)


def _bare(flight_id: str) -> str:
    handle, colon, rest = flight_id.partition(":")
    return rest if colon else handle


def _closed(
    bar: Bar,
    now: float,
    end: str,
    num_tokens: int = 0,
    spans: tuple[VersionTokens, ...] = (),
    num_cached_tokens: int = 0,
) -> Bar:
    return Bar(
        started_s=bar.started_s,
        ended_s=now,
        shard=bar.shard,
        num_tokens=num_tokens,
        is_moved=bar.is_moved,
        spans=spans,
        num_cached_tokens=num_cached_tokens,
        end=end,
    )


def _belongs(track: Track, order: LaneOrder) -> bool:
    if order is LaneOrder.LONGEST:
        return track.ended_s is None
    if order is LaneOrder.MOVED:
        return track.num_moves > 0
    if order is LaneOrder.FAILED:
        return track.status in ("failed", "aborted")
    return True


def _key(track: Track, order: LaneOrder) -> tuple[float, float]:
    if order is LaneOrder.LONGEST:
        return -track.num_tokens, track.started_s
    if order is LaneOrder.MOVED:
        return -track.num_moves, -track.touched_s
    return -track.touched_s, track.started_s


def _lane(flight_id: str, track: Track, state_of: Callable[[str], str | None]) -> Lane:
    is_running = bool(track.bars) and track.bars[-1].ended_s is None
    return Lane(
        trajectory_id=shown_id(flight_id),
        state=track.status or state_of(flight_id) or ("running" if is_running else "queued"),
        num_prompt_tokens=track.num_prompt_tokens,
        num_tokens=track.num_tokens,
        max_tokens=track.max_tokens,
        num_chunks=track.num_chunks,
        num_moves=track.num_moves,
        num_lost=track.num_lost,
        started_s=track.started_s,
        ended_s=track.ended_s,
        error=track.error,
        bars=tuple(track.bars),
    )
