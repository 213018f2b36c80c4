"""Who runs next, where, and for how many tokens: the one place where that is decided.

Owns the queue of jobs and the loads of the shards; a policy says what it prefers. Counts only: it never sees a
token, so the service and the simulator drive the same class. Time is passed in. Knows nothing of clients,
records, engines or rewards.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from rollout.config import DispatchConfig
from rollout.scheduler.jobs import Assignment, Job, JobState, ShardCapacity
from rollout.scheduler.policies import Divided, Partial, Policy, Static
from rollout.scheduler.prediction import LengthPredictor
from rollout.scheduler.shard_book import ShardBook
from rollout.scheduler.step_costs import StepCosts

LOOKAHEAD = 8  # jobs that may pass one for which there is no room
MAX_PASSED = 256  # passes; after them nobody passes it any more

Entry = tuple[int, tuple[float, float], int, int, str]  # priority, the policy's key, order, stamp, job


@dataclass(slots=True)
class GroupJobs:
    """Members of a group under way. Owned by the dispatcher."""

    queued: set[str] = field(default_factory=set)
    num_jobs: int = 0
    has_probe: bool = False


@dataclass(slots=True)
class DispatchCounts:
    """Totals since the start.

    Attributes:
        num_chunks: Started.
        num_migrations: Chunks of a begun job that started elsewhere than its last one.
        num_trimmed: Chunks shorter than wanted, for want of KV.
        num_cuts: Chunks cut for something more urgent or for a shard that drains.
    """

    num_chunks: int = 0
    num_migrations: int = 0
    num_trimmed: int = 0
    num_cuts: int = 0


class Dispatcher:
    """See the module.

    Args:
        config: Policy and chunk length.
        shards: What every shard of the fleet can take, by rank.
    """

    def __init__(self, config: DispatchConfig, shards: Mapping[int, ShardCapacity]) -> None:
        self._book = ShardBook(shards)
        self._predictor, self._costs = LengthPredictor(), StepCosts()
        self._jobs: dict[str, Job] = {}
        self._static = Static(self._book) if config.policy == "static" else None
        self._policy: Policy = self._static or (
            Partial(self._book)
            if config.policy == "partial"
            else Divided(config.chunk_tokens, self._book, self._predictor, self._costs, self._jobs)
        )
        self._is_divided = config.policy == "divided"
        self._groups: dict[str, GroupJobs] = {}
        self._lanes: dict[int | None, list[Entry]] = {}  # queues: one, or under static one a shard
        self._open_lanes: set[int | None] = set()  # in which something may have become possible
        self._stamp = 0
        self._running_by_priority: dict[int, dict[str, None]] = {}
        self._queued_by_priority: Counter[int] = Counter()
        self._cutting: set[str] = set()
        self._draining: set[int] = set()
        self._passed: dict[str, int] = {}
        self.num_queued = 0
        self.counts = DispatchCounts()

    @property
    def book(self) -> ShardBook:
        """Loads of the shards; to be read only."""
        return self._book

    @property
    def num_running(self) -> int:
        return self._book.num_running

    def job(self, job_id: str) -> Job | None:
        """A job under way."""
        return self._jobs.get(job_id)

    def running_on(self, shard: int) -> list[str]:
        """Jobs whose chunk runs there, in the order of submission."""
        return sorted(self._book[shard].running, key=lambda job_id: self._jobs[job_id].order)

    def num_waiting_before(self, priority: int) -> int:
        """How many running jobs must end before a new one of this priority has a slot; 0: it has one at once.

        Those that are queued before it need slots too. What is less urgent gives way at once to all of them.
        """
        num_ahead = sum(number for other, number in self._queued_by_priority.items() if other <= priority)
        num_to_cut = sum(len(jobs) for other, jobs in self._running_by_priority.items() if other > priority)
        has_slot = self._book.emptiest() is not None
        return max(0, num_ahead + (not has_slot) - num_to_cut)

    def expected_tokens(self, job_id: str) -> float:
        """Expected length of a job's whole output."""
        return self._predictor.total_tokens(self._jobs[job_id])

    def remember(self, prompt_key: str, num_tokens: int) -> None:
        """An output of this prompt was so long, at a time that this dispatcher does not know of."""
        self._predictor.remember(prompt_key, num_tokens)

    def add(self, job: Job, now: float) -> None:
        """Queue a job, which may have tokens already."""
        assert job.job_id not in self._jobs, f"{job.job_id} was added twice"
        group = self._groups.get(job.group_id)
        if group is None:
            group = self._groups[job.group_id] = GroupJobs()
            self._predictor.open_group(job.group_id, job.prompt_key)
        group.num_jobs += 1
        job.is_probe = not group.has_probe
        group.has_probe = True
        self._jobs[job.job_id] = job
        self._enqueue(job)

    def next_assignments(self, now: float) -> list[Assignment]:
        """What to start now. Whoever calls it starts it; the answer comes back through `on_chunk` or `on_lost`."""
        assignments: list[Assignment] = []
        for lane in sorted(self._open_lanes, key=str):
            assignments += self._assign(self._lanes.get(lane, []), now)
        self._open_lanes.clear()
        return assignments

    def _assign(self, heap: list[Entry], now: float) -> list[Assignment]:
        assignments: list[Assignment] = []
        aside: list[Entry] = []
        while heap:
            entry = heap[0]
            job = self._current(entry)
            if job is None:
                heapq.heappop(heap)
                continue
            place = self._policy.place(job, is_queue_empty=self.num_queued == 1)
            if place is not None:
                heapq.heappop(heap)
                assignments.append(self._start(job, *place, now))
                continue
            if not self._is_divided or self._book.emptiest() is None:
                break  # not a slot is free
            passed = self._passed[job.job_id] = self._passed.get(job.job_id, 0) + 1
            if len(aside) >= LOOKAHEAD or passed > MAX_PASSED:
                break
            aside.append(heapq.heappop(heap))
        for entry in aside:
            heapq.heappush(heap, entry)
        return assignments

    def _current(self, entry: Entry) -> Job | None:
        """The job of an entry, unless that is void: the job is gone, or has a newer entry."""
        job = self._jobs.get(entry[4])
        return job if job is not None and job.stamp == entry[3] and job.state is JobState.QUEUED else None

    def on_chunk(
        self, job_id: str, num_tokens: int, is_ended: bool, now: float, *, duration_s: float | None = None
    ) -> None:
        """A chunk came back; a job that has not ended is queued again. See `hold`."""
        self.hold(job_id, num_tokens, now, goes_on=not is_ended, duration_s=duration_s)
        if is_ended:
            self.end(job_id)
        else:
            self.resume(job_id)

    def hold(
        self, job_id: str, num_tokens: int, now: float, *, goes_on: bool = True, duration_s: float | None = None
    ) -> None:
        """A chunk came back: its job waits for `resume`, `end` or `remove`.

        Under divided the slot of a job that goes on is kept for it: whoever took it for the moment of a write would
        have begun before its turn, and the job would find its prefix on a shard that is full.

        Args:
            job_id: A running job.
            num_tokens: New tokens.
            now: Seconds.
            goes_on: Another chunk is likely to follow.
            duration_s: That the engine took, to learn from.
        """
        job = self._jobs[job_id]
        assert job.shard is not None, "only a running job has a chunk"
        if duration_s is not None and self._is_divided:
            reserved = self._book[job.shard].reserved_tokens
            self._costs.learn(num_tokens, duration_s, self._book.batch(job.shard), reserved)
        keeps_slot = goes_on and self._is_divided and job_id not in self._cutting
        self._release(job)
        if keeps_slot and job.home is not None:
            self._book.keep(job, job.home)
        job.num_tokens += num_tokens
        job.state = JobState.HELD

    def resume(self, job_id: str) -> None:
        """A job that was held goes on."""
        self._enqueue(self._jobs[job_id])

    def end(self, job_id: str) -> None:
        """The generation of a job that was held is over: its length is known."""
        job = self._jobs[job_id]
        assert job.state is JobState.HELD, "a job ends with a chunk"
        self._predictor.ended(job)
        self._forget(job)
        self._order_again(job.group_id)

    def on_lost(self, job_id: str, now: float) -> None:
        """A chunk was lost with its engine, or failed: the job is queued again, to be prefilled anywhere."""
        job = self._jobs[job_id]
        self._release(job)
        job.home = None
        self._enqueue(job)

    def set_tokens(self, job_id: str, num_tokens: int) -> None:
        """A job that does not run has other tokens than before: they were dropped, or restored."""
        job = self._jobs[job_id]
        assert job.state is not JobState.RUNNING, "a running job changes with its chunk"
        self._book.wait_no_more(job)
        job.num_tokens = num_tokens
        if num_tokens == 0:
            job.home = None
        if job.state is JobState.QUEUED:
            self._book.wait(job)
            self._requeue(job)

    def remove(self, job_id: str) -> None:
        """A job is over without having ended by itself; harmless for one that is not known."""
        job = self._jobs.get(job_id)
        if job is None:
            return
        if job.state is JobState.RUNNING:
            self._release(job)
        self._forget(job)

    def on_shard_down(self, rank: int) -> list[str]:
        """A shard is gone; what it ran is queued again. Returns those jobs, in the order of submission."""
        if rank not in self._book or not self._book[rank].is_live:
            return []
        lost = self.running_on(rank)
        self._book.take_down(rank)
        for job_id in lost:
            self.on_lost(job_id, 0.0)
        self._deal_again(rank)
        return lost

    def on_shard_up(self, rank: int, capacity: ShardCapacity) -> None:
        """A shard serves: a new one, or one that was down, with nothing on it."""
        self._draining.discard(rank)
        self._book.put_up(rank, capacity)
        self._open(rank)

    def drain(self, rank: int) -> None:
        """A shard gets nothing new; what it runs is cut at once and goes on elsewhere."""
        self._book.drain(rank)
        self._draining.add(rank)
        self._deal_again(rank)

    def undrain(self, rank: int) -> None:
        """A shard that was drained gets chunks again; harmless for one that was not."""
        if rank in self._draining:
            self._draining.discard(rank)
            self._book.undrain(rank)
            self._open(rank)

    def _open(self, rank: int) -> None:
        """A shard has room: what waits may start."""
        if self._static is not None:
            self._open_lanes.add(rank)
            self._deal_again(None)
        else:
            self._open_lanes.add(None)

    def take_cuts(self, now: float) -> list[tuple[int, str]]:
        """Running chunks to be cut now, each named once; their tokens so far come back through `on_chunk`."""
        cuts: list[tuple[int, str]] = []
        for rank in self._draining:
            cuts += [(rank, job_id) for job_id in self.running_on(rank) if job_id not in self._cutting]
        self._cutting.update(job_id for _, job_id in cuts)
        urgent = self._cuts_for_the_urgent()
        self._cutting.update(job_id for _, job_id in urgent)
        cuts += urgent
        self.counts.num_cuts += len(cuts)
        return cuts

    def _cuts_for_the_urgent(self) -> list[tuple[int, str]]:
        """One chunk of the least urgent kind for every waiting job that is more urgent, the newest first."""
        if not self._running_by_priority:
            return []
        worst = max(self._running_by_priority)
        num_waiting = sum(number for priority, number in self._queued_by_priority.items() if priority < worst)
        num_wanted = num_waiting - len(self._cutting)
        cuts: list[tuple[int, str]] = []
        for job_id in reversed(self._running_by_priority[worst]):
            if num_wanted <= len(cuts):
                break
            shard = self._jobs[job_id].shard
            if job_id not in self._cutting and shard is not None:
                cuts.append((shard, job_id))
        return cuts

    def _start(self, job: Job, shard: int, budget_tokens: int, now: float) -> Assignment:
        self.counts.num_chunks += 1
        self.counts.num_migrations += job.num_tokens > 0 and job.home != shard
        self.counts.num_trimmed += budget_tokens < self._policy.chunk_tokens(job)
        self._passed.pop(job.job_id, None)
        self._book.wait_no_more(job)
        job.state, job.home, job.started_at = JobState.RUNNING, shard, now
        self._book.reserve(job, shard, budget_tokens)
        self._running_by_priority.setdefault(job.priority, {})[job.job_id] = None
        self._groups[job.group_id].queued.discard(job.job_id)
        self._count_queued(job, -1)
        return Assignment(job_id=job.job_id, shard=shard, budget_tokens=budget_tokens)

    def _release(self, job: Job) -> None:
        self._open_lanes.add(job.shard if self._static is not None else None)
        self._book.release(job)
        self._cutting.discard(job.job_id)
        peers = self._running_by_priority[job.priority]
        del peers[job.job_id]
        if not peers:
            del self._running_by_priority[job.priority]

    def _enqueue(self, job: Job) -> None:
        job.state = JobState.QUEUED
        self._book.give_up(job)
        self._book.wait(job)
        self._groups[job.group_id].queued.add(job.job_id)
        self._count_queued(job, 1)
        self._requeue(job)

    def _count_queued(self, job: Job, change: int) -> None:
        self.num_queued += change
        self._queued_by_priority[job.priority] += change
        if not self._queued_by_priority[job.priority]:
            del self._queued_by_priority[job.priority]

    def _requeue(self, job: Job) -> None:
        """Put a queued job where the policy wants it now; its older entry is void."""
        self._stamp += 1
        job.stamp = self._stamp
        lane = self._static.lane(job) if self._static is not None else None
        entry = (job.priority, self._policy.key(job), job.order, job.stamp, job.job_id)
        heapq.heappush(self._lanes.setdefault(lane, []), entry)
        self._open_lanes.add(lane)

    def _deal_again(self, lane: int | None) -> None:
        """Under static: what waits for a shard that takes nothing more, or for any to serve, gets another one."""
        if self._static is None:
            return
        for entry in self._lanes.pop(lane, []):
            waiting = self._current(entry)
            if waiting is not None:
                self._requeue(waiting)

    def _order_again(self, group_id: str) -> None:
        """A member has ended: what is expected of its siblings has changed."""
        group = self._groups.get(group_id)
        if group is not None and self._is_divided:
            for job_id in group.queued:
                self._requeue(self._jobs[job_id])

    def _forget(self, job: Job) -> None:
        group = self._groups[job.group_id]
        if job.kept is not None:
            self._book.give_up(job)
            self._open_lanes.add(None)
        self._book.wait_no_more(job)
        if job.state is JobState.QUEUED:
            group.queued.discard(job.job_id)
            self._count_queued(job, -1)
        del self._jobs[job.job_id]
        self._passed.pop(job.job_id, None)
        group.num_jobs -= 1
        if group.num_jobs == 0:
            del self._groups[job.group_id]
            self._predictor.close_group(job.group_id)
            if self._static is not None:
                self._static.close_group(job.group_id)
