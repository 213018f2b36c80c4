"""The ways to choose who runs next, where, and for how long: static, partial, divided.

A policy is pure and small: it sees jobs, the shards' loads and the predictor, and keeps no queue.

- static: what synchronous trainers do. Groups are dealt to the shards in turn as they arrive; trajectories run
  whole, first come first served, as many as the engine takes; where its KV overflows the engine preempts.
- partial: as APRIL (arXiv 2509.18521) does. Trajectories run whole on the least loaded shard; those that an
  abort of the excess cut short are continued first.
- divided: chunks, as Seer (arXiv 2511.14617) does. What has begun goes on first, where its prefix is, unless a move
  pays for the prefill. Then one probe of every group, then the longest expected first; they start where the KV that
  everybody there is likely to need at once has room, and a chunk only where its KV is reserved up to its end, so that
  no engine preempts. What has begun gives way between two chunks to one that is sure to need longer, where its KV can
  wait: with more long ones than slots all end at about the same time. It is the rule of the longest remaining time,
  which is the best for the makespan where lengths are known (Pinedo, Scheduling, 2016, section 5.2), kept to what is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from rollout.scheduler.jobs import Job
from rollout.scheduler.prediction import LengthPredictor
from rollout.scheduler.shard_book import ShardBook, whole_blocks
from rollout.scheduler.step_costs import StepCosts

MIN_CHUNK_TOKENS = 64  # a shorter chunk is not worth a visit, unless it is the last of its trajectory
LONG = 0.5  # of the limit: what is expected to exceed it may be as long as anything that has begun
ROOMY = 0.5  # of a shard's KV: with so much in use what waits stays there, for what runs grows
PAYS = 1.5  # a move must save so many times what its prefill costs: both are estimates

Key = tuple[float, float]


class Policy(Protocol):
    """Decides for one job at a time."""

    def key(self, job: Job) -> Key:
        """Its place in the queue among jobs of its priority; the smallest goes first."""

    def chunk_tokens(self, job: Job) -> int:
        """Most tokens of its next chunk, if there is room."""

    def place(self, job: Job, *, is_queue_empty: bool) -> tuple[int, int] | None:
        """Shard and tokens of its next chunk; None while there is no room."""


class Whole:
    """A part of static and partial: everything at once, KV left to the engine."""

    def chunk_tokens(self, job: Job) -> int:
        return job.remaining_tokens


class Static(Whole):
    """See the module."""

    def __init__(self, book: ShardBook) -> None:
        self._book = book
        self._dealt: dict[str, int] = {}
        self._num_dealt = 0

    def key(self, job: Job) -> Key:
        return (0.0, 0.0)

    def lane(self, job: Job) -> int | None:
        """The shard that its group was dealt to; None while no shard serves."""
        rank = self._dealt.get(job.group_id)
        if rank is None or not self._book[rank].is_live or self._book[rank].is_draining:
            ranks = self._book.open
            if not ranks:
                return None
            rank = self._dealt[job.group_id] = ranks[self._num_dealt % len(ranks)]
            self._num_dealt += 1
        return rank

    def place(self, job: Job, *, is_queue_empty: bool) -> tuple[int, int] | None:
        rank = self.lane(job)
        return (rank, job.remaining_tokens) if rank is not None and self._book[rank].has_slot else None

    def close_group(self, group_id: str) -> None:
        self._dealt.pop(group_id, None)


class Partial(Whole):
    """See the module."""

    def __init__(self, book: ShardBook) -> None:
        self._book = book

    def key(self, job: Job) -> Key:
        return (0.0 if job.num_tokens else 1.0, 0.0)

    def place(self, job: Job, *, is_queue_empty: bool) -> tuple[int, int] | None:
        free = [(len(load.running), rank) for rank, load in self._book.loads() if load.has_slot]
        return (min(free)[1], job.remaining_tokens) if free else None


class Divided:
    """See the module.

    Args:
        chunk_tokens: Tokens of a chunk, see `chunk_tokens`; None does not cut.
        book, predictor, costs, jobs: What it reads.
    """

    def __init__(
        self,
        chunk_tokens: int | None,
        book: ShardBook,
        predictor: LengthPredictor,
        costs: StepCosts,
        jobs: Mapping[str, Job],
    ) -> None:
        self._chunk_tokens = chunk_tokens
        self._book, self._predictor, self._costs, self._jobs = book, predictor, costs, jobs

    def key(self, job: Job) -> Key:
        if job.home is not None:
            if not self._can_wait(job.home):  # it would have to be prefilled again
                return (0.0, -float(job.num_tokens))
            return (1.0, -float(job.remaining_tokens))  # at most: it gives way to nothing that it may outlast
        is_known = self._predictor.is_known(job.group_id)
        if job.is_probe and not is_known:
            return (2.0, float(job.num_tokens))
        remaining = self._predictor.remaining_tokens(job)
        return (1.0 if is_known and remaining > LONG * job.max_tokens else 3.0, -remaining)

    def chunk_tokens(self, job: Job) -> int:
        """Tokens of its next chunk: up to a block of KV more than configured, so that it ends one token into a block.

        The last token that is sampled has no KV yet, so all that there is lies in whole blocks, which a continuation
        finds; from any other end it computes the last block again.
        """
        chunk, left, block = self._chunk_tokens, job.remaining_tokens, self._book.block_tokens
        if chunk is None or chunk >= left:
            return left
        if 2 * block > chunk:
            return chunk
        return min(left, whole_blocks(job.context_tokens + chunk - 1, block) + 1 - job.context_tokens)

    def place(self, job: Job, *, is_queue_empty: bool) -> tuple[int, int] | None:
        emptiest = self._book.emptiest()
        home = job.home
        if home is not None and self._book[home].has_slot:
            if emptiest is not None and emptiest != home and is_queue_empty and self._pays(job, home, emptiest):
                budget = self._budget(job, emptiest)
                if budget:
                    return emptiest, budget
            budget = self._budget(job, home)
            if budget:
                return home, budget
        if emptiest is None or not self._fits(job, emptiest):
            return None
        budget = self._budget(job, emptiest)
        return (emptiest, budget) if budget else None

    def _can_wait(self, rank: int) -> bool:
        """Whether the KV of all that wait for this shard has room beside what is reserved on it."""
        load = self._book[rank]
        return load.reserved_tokens + load.waiting_tokens <= ROOMY * load.capacity.kv_tokens

    def _fits(self, job: Job, rank: int) -> bool:
        """Whether the KV of all that run there and of this one is likely to have room at every moment.

        The most is needed when one of them ends: those that go on have each grown by as much as it still had to.
        """
        load = self._book[rank]
        if not load.running:
            return True
        members = [job, *(self._jobs[job_id] for job_id in load.running)]
        left = sorted(((self._predictor.likely_remaining_tokens(m), m.context_tokens) for m in members), reverse=True)
        context = 0
        for number, (remaining, tokens) in enumerate(left, 1):
            context += tokens
            if context + number * remaining > load.capacity.kv_tokens:
                return False
        return True

    def _budget(self, job: Job, rank: int) -> int:
        """Tokens for which there is room, trimmed if need be; 0 if there is none to speak of."""
        load, wanted = self._book[rank], self.chunk_tokens(job)
        block = load.capacity.block_tokens
        if whole_blocks(job.context_tokens + wanted, block) <= load.free_tokens:
            return wanted
        room = load.free_tokens // block * block - job.context_tokens
        # A shard that runs nothing must not refuse for ever.
        enough = min(MIN_CHUNK_TOKENS, wanted) if load.running else 1
        return min(wanted, room) if room >= enough else 0

    def _pays(self, job: Job, home: int, other: int) -> bool:
        """Whether moving saves more than the prefill of its context costs, now that nothing else waits."""
        if not self._costs.is_known:
            return False
        here, there = self._book[home], self._book[other]
        if len(here.running) <= len(there.running):
            return False
        stay_s = self._costs.token_s(self._batch_with(home), here.reserved_tokens + job.context_tokens)
        move_s = self._costs.token_s(self._batch_with(other), there.reserved_tokens + job.context_tokens)
        saved_s = (stay_s - move_s) * self._predictor.remaining_tokens(job)
        return saved_s > PAYS * self._costs.prefill_s(job.context_tokens)

    def _batch_with(self, rank: int) -> int:
        return max(self._book.batch(rank), len(self._book[rank].running) + 1)
