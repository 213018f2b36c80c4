"""A simulation that can be looked at while it runs: the feed that the service would send.

Owns the dispatcher's and the fleet's events as a dashboard shows them, and the lock that makes a moment of them. The
decisions are those of the service's own dispatcher. Time passes as fast as `pace` lets it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping

from rollout.config import DispatchConfig
from rollout.feed import (
    MAX_GROUPS,
    FailureCount,
    Failures,
    Feed,
    FeedQuery,
    Groups,
    Speculation,
    SyncPoint,
    Totals,
    WaitingGroup,
)
from rollout.feed_fleet import ShardTile, fleet_of
from rollout.feed_history import FeedHistory
from rollout.rate import RateWindow
from rollout.scheduler.dispatcher import Dispatcher
from rollout.scheduler.jobs import Assignment, JobState, ShardCapacity
from rollout.simulate.costs import StepCosts
from rollout.simulate.lengths import GroupWork
from rollout.simulate.rank_group import ChunkEnd
from rollout.simulate.scenario import Scenario
from rollout.simulate.simulation import GroupUnderWay, Simulation
from rollout.types import VersionSpan

RATE_SPAN_S = 60.0  # of simulated time, like the next two
LOOK_EVERY_S = 30.0  # between two samples of the throughput, where nobody asks
LOOK_AGAIN_S = 5.0  # and at least, where somebody does


class WatchedDispatcher(Dispatcher):
    """Tells the history of every chunk; `version` is that of the weights."""

    def __init__(self, config: DispatchConfig, shards: Mapping[int, ShardCapacity], history: FeedHistory) -> None:
        super().__init__(config, shards)
        self._history, self._now, self.version = history, 0.0, 0

    def next_assignments(self, now: float) -> list[Assignment]:
        assignments = super().next_assignments(now)
        for assignment in assignments:
            job = self._jobs[assignment.job_id]
            self._history.chunk_started(
                job.job_id,
                assignment.shard,
                now,
                num_prompt_tokens=job.num_prompt_tokens,
                num_tokens=job.num_tokens,
                max_tokens=job.max_tokens,
            )
        return assignments

    def hold(
        self, job_id: str, num_tokens: int, now: float, *, goes_on: bool = True, duration_s: float | None = None
    ) -> None:
        shard = self._jobs[job_id].shard
        assert shard is not None, "only a running job has a chunk"
        super().hold(job_id, num_tokens, now, goes_on=goes_on, duration_s=duration_s)
        self._now = now
        spans = [VersionSpan(version=self.version, start=0, stop=num_tokens)] if num_tokens else []
        self._history.chunk_ended(job_id, shard, now, "length", num_tokens=num_tokens, spans=spans)

    def end(self, job_id: str) -> None:
        super().end(job_id)
        self._history.trajectory_ended(job_id, "completed", self._now)

    def on_lost(self, job_id: str, now: float) -> None:
        shard = self._jobs[job_id].shard
        super().on_lost(job_id, now)
        if shard is not None:
            self._history.chunk_ended(job_id, shard, self._now, "lost")


class WatchedSimulation(Simulation):
    """See the module; arguments as of Simulation.

    Args:
        pace: Told the simulated seconds after every event; time goes on when it returns.
    """

    def __init__(
        self,
        scenario: Scenario,
        policy: str,
        costs: StepCosts,
        kv_tokens: int,
        work: Iterable[GroupWork],
        *,
        pace: Callable[[float], None],
    ) -> None:
        self.history = FeedHistory()
        super().__init__(scenario, policy, costs, kv_tokens, work)
        config = DispatchConfig(policy=policy, chunk_tokens=scenario.chunk_tokens)
        self._dispatcher: WatchedDispatcher = WatchedDispatcher(config, self._capacity, self.history)
        self._pace = pace
        self._lock = threading.Lock()
        self._num_landed = [0] * scenario.gpus  # tokens of chunks that ended, by shard
        self._rates = [RateWindow(RATE_SPAN_S) for _ in range(scenario.gpus)]
        self._looked_at_s = 0.0
        self._num_revived = 0
        self.notes: tuple[str, ...] = ()
        self.speculation: Speculation | None = None  # what the owner wants told of drafts, which are not simulated

    @property
    def now_s(self) -> float:
        """Simulated seconds."""
        return self._now

    def feed(self, query: FeedQuery, wall_s: float) -> Feed:
        """This moment; may be called from another thread."""
        with self._lock:
            self._look(LOOK_AGAIN_S)
            return Feed(
                now_s=self._now,
                wall_s=wall_s,
                started_s=0.0,
                totals=self._totals(),
                fleet=fleet_of(self._tiles(), num_groups_wanted=len(self._groups), age_s=0.0, cell=query.cell),
                lanes=self.history.lanes(query, self._state_of),
                groups=self._waiting(),
                failures=self._told_failures(),
                rates=tuple(self.history.rates),
                syncs=tuple(self.history.syncs),
                mismatches=tuple(self.history.mismatches),
                speculation=self.speculation,
                is_simulated=True,
                notes=self.notes,
            )

    def _next_event(self) -> None:
        with self._lock:
            super()._next_event()
            self._look(LOOK_EVERY_S)
        self._pace(self._now)

    def _on_chunk(self, chunk: ChunkEnd) -> None:
        job = self._dispatcher.job(chunk.job_id)
        assert job is not None and job.shard is not None, "a chunk ends where it runs"
        self._num_landed[job.shard] += chunk.num_tokens
        super()._on_chunk(chunk)

    def _end_step(self) -> None:
        with self._lock:
            super()._end_step()
            version = self._dispatcher.version = self._version + 1
            stall_s = self._scenario.sync_stall_s
            self.history.syncs.append(
                SyncPoint(version=version, at_s=self._now, in_flight="abort", flip_s=stall_s, stall_s=stall_s)
            )

    def _revive(self, index: int) -> None:
        super()._revive(index)
        self._num_revived += 1

    def _look(self, pause_s: float) -> None:
        """Sample the throughput, unless that was done so short a time ago."""
        if self._now - self._looked_at_s < pause_s:
            return
        self._looked_at_s = self._now
        for group in self._groups:
            for rank, engine in group.ranks.items():
                running = sum(sequence.num_tokens(engine.progress) for sequence in engine.running.values())
                self._rates[rank].sample(self._now, self._num_landed[rank] + running)
        self.history.rate(sum(max(0.0, rate.per_second) for rate in self._rates), self._now)

    def _tiles(self) -> list[ShardTile]:
        tiles = []
        for index, group in enumerate(self._groups):
            for rank, engine in group.ranks.items():
                load = self._dispatcher.book[rank]
                tiles.append(
                    ShardTile(
                        rank=rank,
                        group=index,
                        is_live=group.is_live,
                        num_running=len(load.running),
                        num_waiting=len(engine.waiting),
                        kv_used=min(1.0, engine.used_tokens / self._kv_tokens),
                        kv_reserved=load.reserved_tokens / self._kv_tokens,
                        tokens_per_s=max(0.0, self._rates[rank].per_second),
                        version=self._version,
                        num_preemptions=engine.counts.num_preemptions,
                    )
                )
        return tiles

    def _totals(self) -> Totals:
        counts = self._dispatcher.counts
        return Totals(
            live_version=self._version,
            num_running=self._dispatcher.num_running,
            num_queued=self._dispatcher.num_queued,
            num_under_way=len(self._members),
            num_finished=len(self.record.finished_s),
            num_tokens=sum(self._num_landed),
            num_tokens_discarded=self.record.num_tokens_lost,
            num_chunks=counts.num_chunks,
            num_migrations=counts.num_migrations,
            num_cuts=counts.num_cuts,
            num_clients=1,
        )

    def _state_of(self, job_id: str) -> str | None:
        job = self._dispatcher.job(job_id)
        if job is None:
            return None
        return "landing" if job.state is JobState.HELD else job.state.value

    def _waiting(self) -> Groups:
        waiting = sorted(self._under_way.values(), key=lambda group: (group.num_left, group.members[0].order))
        return Groups(
            num_waiting=len(waiting),
            num_whole=sum(group.num_left == len(group.members) for group in waiting),
            num_last=sum(group.num_left == 1 < len(group.members) for group in waiting),
            oldest_s=max((self._now - group.members[0].submitted_at for group in waiting), default=0.0),
            shown=tuple(self._waiting_group(group) for group in waiting[:MAX_GROUPS]),
        )

    def _waiting_group(self, group: GroupUnderWay) -> WaitingGroup:
        pending = [member for member in group.members if member.job_id in self._members]
        states = [self._state_of(member.job_id) for member in pending]
        return WaitingGroup(
            group_id=group.work.group_id,
            num_members=len(group.members),
            num_done=len(group.members) - len(pending),
            num_running=states.count("running"),
            num_queued=states.count("queued"),
            most_tokens=max(member.num_tokens for member in pending),
            max_tokens=self._scenario.output_tokens,
            waited_s=self._now - group.members[0].submitted_at,
        )

    def _told_failures(self) -> Failures:
        num_failures = self.record.num_failures
        died = (FailureCount(kind="died", count=num_failures),) if num_failures else ()
        return Failures(groups=died, num_restarts=self._num_revived)
