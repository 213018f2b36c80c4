"""Records of the scheduler: what it hands out, and what it remembers of trajectories and shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from rollout.types import Chunk, ChunkResult, FinishReason, Group, RolloutRequest, Trajectory


class Phase(str, Enum):
    """Where a trajectory is. Its `status` stays pending until generation has ended."""

    QUEUED = "queued"
    RUNNING = "running"
    LANDING = "landing"
    SCORING = "scoring"
    FINAL = "final"


class FailureKind(str, Enum):
    """Why a trajectory failed; failures are counted by these."""

    ENGINE_DEAD = "engine_dead"
    ENGINE_ERROR = "engine_error"
    REWARD_RAISED = "reward_raised"
    REWARD_TIMEOUT = "reward_timeout"
    STALE = "stale"
    INTERNAL = "internal"


class DeathKind(str, Enum):
    """Why a group of shards serves no longer; deaths are counted by these."""

    DIED = "died"  # a process of it is gone
    HUNG = "hung"  # busy, and no step for too long
    SYNC = "sync"  # nobody knows which weights it serves
    BEHIND = "behind"  # a new controller found it gone, or at another version than the fleet


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Run this chunk on this shard, now."""

    shard: int
    chunk: Chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Landing:
    """A chunk that came back and must be durable before `Scheduler.landed`: where it goes in the journal.

    Attributes:
        flight_id: The trajectory under way.
        run_id, group_id, sample_index: The trajectory's key.
        epoch: Times it was restarted from scratch.
        start: Its tokens before this chunk.
        result: The chunk.
    """

    flight_id: str
    run_id: str
    group_id: str
    sample_index: int
    epoch: int
    start: int
    result: ChunkResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """The tokens of a trajectory were dropped; the chunks of its new epoch begin at token 0."""

    run_id: str
    group_id: str
    sample_index: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreJob:
    """Score this trajectory; its tokens do not change any more."""

    flight_id: str
    group: Group
    trajectory: Trajectory
    reward: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedGroup:
    """A group whose trajectories are all final.

    Attributes:
        handle_id, run_id: Whose it is.
        group: With all its tokens.
        epochs: Of its trajectories.
        is_new: False for what the journal had complete.
        is_whole: Every member ended, with a result or a failure; False after an abort by the client.
    """

    handle_id: str
    run_id: str
    group: Group
    epochs: tuple[int, ...]
    is_new: bool
    is_whole: bool


@dataclass(slots=True, kw_only=True)
class Flight:
    """A trajectory under way. Owned by the scheduler.

    Attributes:
        flight_id: "<handle>:<trajectory id>", so that two clients may use the same group ids.
        epoch: Times it was restarted from scratch.
        num_retries: Engine deaths since its last chunk that came back.
        landing: Why the chunk ended that is being made durable.
    """

    flight_id: str
    submission: Submission
    group: Group
    trajectory: Trajectory
    submitted_at: float
    phase: Phase = Phase.QUEUED
    epoch: int = 0
    num_retries: int = 0
    landing: FinishReason | None = None


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
    epochs: dict[str, list[int]] = field(default_factory=dict)  # of the members of each group
    restored: set[str] = field(default_factory=set)  # groups that were complete in the journal

    @property
    def run_id(self) -> str:
        """Under which its trajectories are durable."""
        return self.request.run_id or self.handle_id


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
    num_regenerated: int = 0  # trajectories whose tokens were dropped for being too stale
    num_tokens_restored: int = 0  # that the journal had
