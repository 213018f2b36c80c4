"""Records of the scheduler: what it hands out, and what it remembers of trajectories and shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from rollout.types import Chunk, Group, RolloutRequest, Trajectory


class Phase(str, Enum):
    """Where a trajectory is. Its `status` stays pending until generation has ended."""

    QUEUED = "queued"
    RUNNING = "running"
    SCORING = "scoring"
    FINAL = "final"


class FailureKind(str, Enum):
    """Why a trajectory failed; failures are counted by these."""

    ENGINE_DEAD = "engine_dead"
    ENGINE_ERROR = "engine_error"
    REWARD_RAISED = "reward_raised"
    REWARD_TIMEOUT = "reward_timeout"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Run this chunk on this shard, now."""

    shard: int
    chunk: Chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreJob:
    """Score this trajectory; its tokens do not change any more."""

    flight_id: str
    group: Group
    trajectory: Trajectory
    reward: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedGroup:
    """A group whose trajectories are all final."""

    handle_id: str
    group: Group


@dataclass(slots=True, kw_only=True)
class Flight:
    """A trajectory under way. Owned by the scheduler.

    Attributes:
        flight_id: "<handle>:<trajectory id>", so that two clients may use the same group ids.
        order: Its place in the order of submission; a continuation keeps it.
        shard: Where it runs; None unless running.
        home: The shard that ran it last and may hold its prefix.
        reserved_tokens: Longest context that the running chunk can reach.
        budget_tokens: Most new tokens of the running chunk.
        num_retries: Engine deaths since its last chunk that came back.
    """

    flight_id: str
    submission: Submission
    group: Group
    trajectory: Trajectory
    order: int
    submitted_at: float
    phase: Phase = Phase.QUEUED
    shard: int | None = None
    home: int | None = None
    reserved_tokens: int = 0
    budget_tokens: int = 0
    num_retries: int = 0


@dataclass(slots=True, kw_only=True)
class Submission:
    """A request under way. Owned by the scheduler until `Scheduler.forget`.

    Attributes:
        handle_id: Identifies it.
        request: What was asked for.
        num_groups_pending: Groups with a trajectory that is not final.
        is_aborted: The client gave it up; nothing of it is started any more.
        num_tokens: Tokens in its records.
        flights: Its trajectories that are not final.
        num_pending: How many of them each group has.
    """

    handle_id: str
    request: RolloutRequest
    num_groups_pending: int
    is_aborted: bool = False
    num_tokens: int = 0
    flights: dict[str, Flight] = field(default_factory=dict)
    num_pending: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class ShardLoad:
    """What runs on a shard. Owned by the scheduler."""

    running: set[str] = field(default_factory=set)
    reserved_tokens: int = 0
    is_live: bool = True


@dataclass(slots=True)
class Counts:
    """Totals since the start. `num_failed` is by `FailureKind` value."""

    num_finished: int = 0
    num_aborted: int = 0
    num_failed: dict[str, int] = field(default_factory=dict)
    num_tokens_generated: int = 0
    num_tokens_discarded: int = 0
    num_retries: int = 0
    num_stale_results: int = 0
