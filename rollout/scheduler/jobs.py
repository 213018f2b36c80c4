"""What the dispatcher knows of trajectories and shards: counts and times, never tokens.

Owns the records only; decisions are made in `dispatcher` and `policies`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class JobState(str, Enum):
    """Where a job is; a finished one is no longer known."""

    QUEUED = "queued"
    RUNNING = "running"
    HELD = "held"  # its chunk came back and is being made durable


@dataclass(slots=True, kw_only=True)
class Job:
    """A trajectory to be generated. Owned by the dispatcher from `Dispatcher.add` until it ends or is removed.

    Attributes:
        job_id: Unique among all jobs under way.
        group_id: Its group, unique in the service; siblings tell about its length.
        prompt_key: The same for every visit of the same prompt; None if it never comes again.
        priority: Lower is served first, whatever the policy.
        order: Its place in the order of submission.
        num_prompt_tokens: Tokens of its prompt.
        max_tokens: Most tokens it may generate in all.
        num_tokens: Generated so far.
        oldest_version: Weight version of its first token; None while it has none.
    """

    job_id: str
    group_id: str
    order: int
    num_prompt_tokens: int
    max_tokens: int
    prompt_key: str | None = None
    priority: int = 0
    num_tokens: int = 0
    oldest_version: int | None = None
    # Owned by the dispatcher:
    state: JobState = JobState.QUEUED
    shard: int | None = None  # where it runs
    home: int | None = None  # where it ran last, and may find its prefix
    kept: int | None = None  # where its slot is kept while its chunk is made durable
    budget_tokens: int = 0  # of the running chunk
    reserved_tokens: int = 0  # KV of the running chunk at its end
    is_probe: bool = False  # the member of its group that is to end early, so as to tell a length
    stamp: int = 0  # its newest entry in the queue
    started_at: float = 0.0

    @property
    def context_tokens(self) -> int:
        """Prompt and generated tokens."""
        return self.num_prompt_tokens + self.num_tokens

    @property
    def remaining_tokens(self) -> int:
        """Most tokens still to come."""
        return self.max_tokens - self.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCapacity:
    """What one shard can take.

    Attributes:
        max_running: Sequences decoded together.
        kv_tokens: Tokens its KV cache holds.
        block_tokens: Tokens of a KV block; reservations are whole blocks.
        group: Its expert-parallel group.
    """

    max_running: int
    kv_tokens: int
    block_tokens: int = 16
    group: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Start a chunk of this job on this shard, of at most so many tokens."""

    job_id: str
    shard: int
    budget_tokens: int
