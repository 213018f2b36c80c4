"""The controller's calls about what a dashboard shows.

Owns the rings of the recent past, which nothing else depends on: a controller that is made anew begins with empty
ones. A feed never waits for an engine: shards are asked in the background, more often while somebody looks, and it
tells how old their answers are. A mix-in, because Ray calls methods of the actor's class.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from actors.publications import Publications
from actors.shard_figures import ShardFigures
from rollout.feed import MAX_TEXT, FailureCount, Failures, Feed, FeedQuery, MismatchPoint, SyncPoint, Totals, shortened
from rollout.feed_fleet import ShardTile, fleet_of
from rollout.feed_groups import waiting_groups
from rollout.feed_history import FeedHistory
from rollout.fleet import Supervision, SyncReport
from rollout.mismatch import MismatchReport
from rollout.rate import RateWindow
from rollout.scheduler.ledger import Ledger
from rollout.scheduler.records import Dispatch, FinishedGroup, Flight, Phase
from rollout.scheduler.scheduler import Scheduler
from rollout.types import ChunkResult, Status

WATCHED_S = 15.0  # after the last feed somebody is taken to look


@dataclass(slots=True)
class FeedState:
    """Owned by FeedCalls; times are monotonic seconds."""

    started_s: float
    history: FeedHistory = field(default_factory=FeedHistory)
    figures: ShardFigures = field(default_factory=ShardFigures)
    followed: dict[str, Flight] = field(default_factory=dict)  # trajectories in the history that are under way
    looked_at_s: float | None = None  # when a feed was last asked for


class FeedCalls:
    """Mixed into the controller, which has what is declared here."""

    _shards: dict[int, Any]
    _groups: dict[int, int]
    _deaths: Counter[str]
    _num_groups_wanted: int
    _supervision: Supervision
    _scheduler: Scheduler
    _publications: Publications
    _ledger: Ledger
    _rate: RateWindow
    _num_internal_errors: int
    _feed: FeedState

    def _pump(self) -> None:
        raise NotImplementedError

    def _spawn(self, work: Coroutine[Any, Any, None], name: str, on_error: Callable[[str], None]) -> None:
        raise NotImplementedError

    def _on_shard_death(self, rank: int, reason: str) -> None:
        raise NotImplementedError

    async def feed(self, query: FeedQuery | None = None) -> Feed:
        """The service at this moment, for people; see rollout.feed."""
        now, state, book = time.monotonic(), self._feed, self._scheduler.book
        query = query or FeedQuery()
        state.looked_at_s = now
        self._keep_feed(now)
        answered_s = state.figures.answered_s
        age_s = None if answered_s is None else now - answered_s
        wanted = self._num_groups_wanted
        return Feed(
            now_s=now,
            wall_s=time.time(),
            started_s=state.started_s,
            totals=self._totals(),
            fleet=fleet_of(self._tiles(), num_groups_wanted=wanted, age_s=age_s, cell=query.cell),
            lanes=state.history.lanes(query, self._state_of),
            groups=waiting_groups(book, now),
            failures=self._failures(),
            rates=tuple(state.history.rates),
            syncs=tuple(state.history.syncs),
            mismatches=tuple(state.history.mismatches),
            speculation=state.figures.drafts.told(now),
        )

    async def note_mismatch(self, version: int, kl: float, report: MismatchReport | None = None) -> None:
        """A training step has compared sampling with training.

        Args:
            version: Of the weights after the step.
            kl: KL(sampling ‖ training) over the whole step, nats a token.
            report: The same by cause, on a slice; None in steps that do not measure it.
        """
        causes = {} if report is None else {name: getattr(report, name) for name in ("weights", "kv", "routing")}
        staleness = None if report is None else report.staleness
        point = MismatchPoint(version=version, at_s=time.monotonic(), all=kl, staleness=staleness, **causes)
        self._feed.history.mismatches.append(point)

    def _keep_feed(self, now: float) -> None:
        """Called by housekeeping and by every feed: settle what has ended, and ask the shards now and then."""
        state = self._feed
        for flight_id, flight in list(state.followed.items()):
            if flight.phase is Phase.FINAL:
                del state.followed[flight_id]
                self._note_ended(flight_id, flight, now)
        is_watched = state.looked_at_s is not None and now - state.looked_at_s < WATCHED_S
        rate = state.figures.tokens_per_s
        state.history.rate(self._rate.per_second if rate is None else rate, now)
        if state.figures.is_due(len(self._scheduler.live_shards), now, is_watched=is_watched):
            state.figures.begin(now)
            self._spawn(self._ask_shards(is_watched), "figures of shards", lambda reason: None)

    def _note_start(self, dispatch: Dispatch) -> None:
        chunk, history = dispatch.chunk, self._feed.history
        num_tokens = len(chunk.token_ids) - chunk.num_prompt_tokens
        is_followed = history.chunk_started(
            chunk.trajectory_id,
            dispatch.shard,
            time.monotonic(),
            num_prompt_tokens=chunk.num_prompt_tokens,
            num_tokens=num_tokens,
            max_tokens=chunk.sampling.max_tokens,
        )
        flight = self._scheduler.book.flights.get(chunk.trajectory_id)
        if is_followed and flight is not None:
            self._feed.followed[chunk.trajectory_id] = flight

    def _note_end(self, result: ChunkResult) -> None:
        self._feed.history.chunk_ended(
            result.trajectory_id,
            result.shard,
            time.monotonic(),
            result.finish_reason.value,
            num_tokens=len(result.token_ids),
            spans=result.spans,
            num_cached_tokens=result.num_cached_tokens,
        )

    def _note_lost(self, dispatch: Dispatch, end: str) -> None:
        """A chunk will not come back: "lost" with its engine, or "failed"."""
        self._feed.history.chunk_ended(dispatch.chunk.trajectory_id, dispatch.shard, time.monotonic(), end)

    def _note_finished(self, finished: FinishedGroup) -> None:
        """Failures of trajectories that are not followed are known from their group."""
        for trajectory in finished.group.trajectories:
            if finished.is_new and trajectory.status is Status.FAILED:
                kind = str(trajectory.metadata.get("failure_kind", "unknown"))
                flight_id = f"{finished.handle_id}:{trajectory.trajectory_id}"
                if not self._feed.history.has(flight_id):
                    self._feed.history.failed(flight_id, kind, trajectory.error or "", time.monotonic())

    def _note_sync(self, report: SyncReport, in_flight: str) -> None:
        self._feed.history.syncs.append(
            SyncPoint(
                version=report.version,
                at_s=time.monotonic(),
                in_flight=in_flight,
                num_bytes=report.num_bytes,
                num_bytes_full=report.num_bytes_full,
                stage_s=report.stage_s,
                flip_s=report.flip_s,
                stall_s=report.stall_s,
                num_lost=len(report.ranks_lost),
            )
        )

    def _note_refusal(self, version: int, reason: str) -> None:
        told = shortened(reason, MAX_TEXT)
        self._feed.history.syncs.append(SyncPoint(version=version, at_s=time.monotonic(), reason=told))

    def _note_given_up(self, version: int) -> None:
        """By its sender, unless that followed from a refusal."""
        last = next(reversed(self._feed.history.syncs), None)
        if last is None or last.version != version or last.reason is None:
            self._note_refusal(version, "its sender found a fault and gave it up")

    def _note_ended(self, flight_id: str, flight: Flight, now: float) -> None:
        trajectory = flight.trajectory
        ended_s = min(now, flight.submitted_at + trajectory.metadata["total_s"])
        self._feed.history.trajectory_ended(flight_id, trajectory.status.value, ended_s, trajectory.error)
        if trajectory.status is Status.FAILED:
            kind = str(trajectory.metadata.get("failure_kind", "unknown"))
            self._feed.history.failed(flight_id, kind, trajectory.error or "", ended_s)

    def _state_of(self, flight_id: str) -> str | None:
        flight = self._scheduler.book.flights.get(flight_id)
        return None if flight is None else flight.phase.value

    async def _ask_shards(self, is_watched: bool) -> None:
        live = {rank: self._shards[rank] for rank in self._scheduler.live_shards}
        dead = await self._feed.figures.ask(live, with_drafts=is_watched)
        for rank, reason in dead.items():
            if self._shards.get(rank) is live[rank]:
                self._on_shard_death(rank, reason)
        if dead:
            self._pump()

    def _tiles(self) -> list[ShardTile]:
        loads, tiles = self._scheduler.shard_book, []
        for rank, group in sorted(self._groups.items()):
            load, figures = loads[rank], self._feed.figures.of(rank)
            stats = figures.stats if figures is not None else None
            tiles.append(
                ShardTile(
                    rank=rank,
                    group=group,
                    is_live=load.is_live,
                    is_draining=load.is_draining,
                    num_running=len(load.running),
                    num_waiting=stats.num_waiting if stats else None,
                    kv_used=stats.kv_usage if stats else None,
                    kv_reserved=load.reserved_tokens / max(1, load.capacity.kv_tokens),
                    tokens_per_s=figures.tokens_per_s if figures else None,
                    version=stats.version if stats else None,
                    num_preemptions=stats.num_preemptions if stats else 0,
                )
            )
        return tiles

    def _totals(self) -> Totals:
        counts, dispatched = self._scheduler.counts, self._scheduler.dispatch_counts
        return Totals(
            live_version=self._publications.live_version,
            num_running=self._scheduler.num_running,
            num_queued=self._scheduler.num_queued,
            num_under_way=len(self._scheduler.book.flights),
            num_finished=counts.num_finished,
            num_aborted=counts.num_aborted,
            num_failed=sum(counts.num_failed.values()),
            num_tokens=counts.num_tokens_generated,
            num_tokens_discarded=counts.num_tokens_discarded,
            num_chunks=dispatched.num_chunks,
            num_migrations=dispatched.num_migrations,
            num_cuts=dispatched.num_cuts,
            num_clients=self._ledger.num_clients,
        )

    def _failures(self) -> Failures:
        counts = self._scheduler.counts
        return Failures(
            trajectories=_by_kind(counts.num_failed),
            groups=_by_kind(self._deaths),
            newest=tuple(self._feed.history.failures),
            num_retries=counts.num_retries,
            num_restarts=self._supervision.num_group_restarts,
            num_internal_errors=self._num_internal_errors,
        )


def _by_kind(counts: dict[str, int]) -> tuple[FailureCount, ...]:
    """The most frequent first."""
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return tuple(FailureCount(kind=kind, count=count) for kind, count in ordered if count)
