"""What runs on every shard and what it has reserved, with the emptiest shard at hand.

Owns the loads. Knows nothing of queues or of why a job runs where it does.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rollout.scheduler.jobs import Job, ShardCapacity

KEPT = 0.2
"""Of a shard's slots, at most, that nobody takes while they are kept; one at least. Chunks that began together come
back together, and an engine that then waited for all their writes would stand still."""


@dataclass(slots=True, kw_only=True)
class ShardLoad:
    """One shard. Owned by the book.

    Attributes:
        capacity: What it can take.
        running: Jobs whose chunk it runs.
        reserved_tokens: KV that they may need before their chunks end.
        kept: Jobs whose chunk came back and whose next one is to have the same slot.
        waiting: Contexts of jobs that ran here last and wait; their KV stays until its room is needed.
        waiting_tokens: Sum of these.
        is_live: It serves.
        is_draining: It finishes what it runs and starts nothing.
    """

    capacity: ShardCapacity
    running: set[str] = field(default_factory=set)
    reserved_tokens: int = 0
    kept: set[str] = field(default_factory=set)
    waiting: dict[str, int] = field(default_factory=dict)
    waiting_tokens: int = 0
    is_live: bool = True
    is_draining: bool = False
    stamp: int = 0

    @property
    def free_tokens(self) -> int:
        return self.capacity.kv_tokens - self.reserved_tokens

    @property
    def has_slot(self) -> bool:
        num_kept = min(len(self.kept), max(1, int(KEPT * self.capacity.max_running)))
        num_taken = len(self.running) + num_kept
        return self.is_live and not self.is_draining and num_taken < self.capacity.max_running


class ShardBook:
    """Loads of all shards by rank.

    Args:
        shards: The fleet.
    """

    def __init__(self, shards: Mapping[int, ShardCapacity]) -> None:
        self._loads: dict[int, ShardLoad] = {}
        self._groups: dict[int, list[int]] = {}
        self._heap: list[tuple[int, int, int, int]] = []
        self.num_running = 0
        self.block_tokens = 1
        for rank, capacity in sorted(shards.items()):
            self.put_up(rank, capacity)

    def __getitem__(self, rank: int) -> ShardLoad:
        return self._loads[rank]

    def __contains__(self, rank: int) -> bool:
        return rank in self._loads

    @property
    def live(self) -> list[int]:
        return [rank for rank, load in self._loads.items() if load.is_live]

    @property
    def open(self) -> list[int]:
        """Shards that take new chunks, or will when one ends."""
        return [rank for rank, load in self._loads.items() if load.is_live and not load.is_draining]

    @property
    def ranks(self) -> list[int]:
        """Every shard ever known, in order; also those that are down."""
        return list(self._loads)

    def put_up(self, rank: int, capacity: ShardCapacity) -> None:
        """A shard serves, with nothing on it."""
        before = self._loads.get(rank)
        self.block_tokens = max(self.block_tokens, capacity.block_tokens)
        if before is None:
            self._groups.setdefault(capacity.group, []).append(rank)
        self._loads[rank] = ShardLoad(capacity=capacity, stamp=before.stamp + 1 if before else 0)
        self._offer(rank)

    def take_down(self, rank: int) -> list[str]:
        """A shard serves no longer; returns what ran on it, which the caller must `release`."""
        load = self._loads[rank]
        load.is_live = False
        return list(load.running)

    def drain(self, rank: int) -> None:
        self._loads[rank].is_draining = True

    def undrain(self, rank: int) -> None:
        self._loads[rank].is_draining = False
        self._offer(rank)

    def reserve(self, job: Job, rank: int, budget_tokens: int) -> None:
        """A chunk of a job starts."""
        load = self._loads[rank]
        job.shard, job.budget_tokens = rank, budget_tokens
        job.reserved_tokens = whole_blocks(job.context_tokens + budget_tokens, load.capacity.block_tokens)
        load.running.add(job.job_id)
        load.reserved_tokens += job.reserved_tokens
        self.num_running += 1
        self._offer(rank)

    def release(self, job: Job) -> None:
        """Its chunk is over."""
        assert job.shard is not None, "only a running job holds anything"
        load = self._loads[job.shard]
        load.running.discard(job.job_id)
        load.reserved_tokens -= job.reserved_tokens
        self.num_running -= 1
        self._offer(job.shard)
        job.shard, job.reserved_tokens, job.budget_tokens = None, 0, 0

    def keep(self, job: Job, rank: int) -> None:
        """Nobody else gets the slot that a job has just left, until `give_up`."""
        job.kept = rank
        self._loads[rank].kept.add(job.job_id)

    def give_up(self, job: Job) -> None:
        """The slot that was kept for a job is free; harmless without one."""
        if job.kept is not None:
            self._loads[job.kept].kept.discard(job.job_id)
            self._offer(job.kept)
            job.kept = None

    def wait(self, job: Job) -> None:
        """A job waits whose prefix its home may have."""
        if job.home is not None:
            load = self._loads[job.home]
            load.waiting[job.job_id] = job.context_tokens
            load.waiting_tokens += job.context_tokens

    def wait_no_more(self, job: Job) -> None:
        """A job starts, is over or has lost its tokens; harmless for one that did not wait."""
        if job.home is not None:
            load = self._loads[job.home]
            load.waiting_tokens -= load.waiting.pop(job.job_id, 0)

    def emptiest(self) -> int | None:
        """The shard with a free slot and the most free KV; then the fewest running, then the lowest rank."""
        while self._heap:
            _, _, rank, stamp = self._heap[0]
            load = self._loads[rank]
            if stamp == load.stamp and load.has_slot:
                return rank
            heapq.heappop(self._heap)
        return None

    def batch(self, rank: int) -> int:
        """Sequences in the largest batch of this shard's group, whose ranks step together."""
        group = self._groups[self._loads[rank].capacity.group]
        return max(len(self._loads[peer].running) for peer in group)

    def loads(self) -> Iterator[tuple[int, ShardLoad]]:
        yield from self._loads.items()

    def _offer(self, rank: int) -> None:
        load = self._loads[rank]
        load.stamp += 1
        if load.has_slot:
            heapq.heappush(self._heap, (-load.free_tokens, len(load.running), rank, load.stamp))


def whole_blocks(num_tokens: int, block_tokens: int) -> int:
    """Tokens rounded up to KV blocks."""
    return -(-num_tokens // block_tokens) * block_tokens
