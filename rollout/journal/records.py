"""What the journal hands out: what is durable of groups and trajectories.

Owns the records only. Whoever receives one owns it: no later change of the journal reaches it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from rollout.errors import InvalidRequest
from rollout.types import FinishReason, Group, Prompt, SamplingParams, Status, Trajectory

NUM_SHARED_INTS = 2**18
"""More than any vocabulary in use."""


@lru_cache(maxsize=1)
def _int_table() -> np.ndarray:
    return np.array(range(NUM_SHARED_INTS), dtype=object)


def shared_ints(values: np.ndarray) -> list[int]:
    """Like `tolist`, with one object for each value: 8 bytes a token instead of 40."""
    if values.size and (int(values.min()) < 0 or int(values.max()) >= NUM_SHARED_INTS):
        return values.tolist()
    return _int_table()[values].tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryKey:
    """Identifies a trajectory in a journal.

    Attributes:
        run_id: Run of a trainer, chosen by the client; group ids are unique within it.
        group_id: The group.
        sample_index: Its place in the group.
    """

    run_id: str
    group_id: str
    sample_index: int

    @classmethod
    def parse(cls, run_id: str, trajectory_id: str) -> TrajectoryKey:
        """The key of a trajectory id, "<group_id>/<sample_index>".

        Raises:
            InvalidRequest: It has another form.
        """
        group_id, slash, index = trajectory_id.rpartition("/")
        if not slash or not index.isascii() or not index.isdigit():
            raise InvalidRequest("trajectory id", trajectory_id, "<group_id>/<sample_index>")
        return cls(run_id=run_id, group_id=group_id, sample_index=int(index))

    def __str__(self) -> str:
        return f"trajectory {self.group_id}/{self.sample_index} of run {self.run_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredChunk:
    """A durable chunk without its tokens, which are in the trajectory.

    Attributes:
        start: Tokens of the trajectory before it.
        num_tokens: Its own.
        finish_reason, shard, num_cached_tokens, ttft_s, duration_s: As in rollout.types.ChunkResult.
    """

    start: int
    num_tokens: int
    finish_reason: FinishReason
    shard: int
    num_cached_tokens: int
    ttft_s: float
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredTrajectory:
    """What is durable of one trajectory. Its tokens stay packed until `to_trajectory`, at a tenth of a list's size.

    Attributes:
        epoch: Times it was restarted from scratch.
        outline: The trajectory without token_ids, logprobs and loss_mask. While it is pending its metadata is the
            prompt's only, and whether its generation has ended is told by the last chunk's finish reason and by length.
        chunks: Those of the epoch, in order, without gaps.
        packed: Token ids int32 [n] and log-probabilities float32 or float64 [n] of each chunk.
    """

    epoch: int
    outline: Trajectory
    chunks: tuple[StoredChunk, ...] = ()
    packed: tuple[tuple[np.ndarray, np.ndarray], ...] = field(default=(), compare=False, repr=False)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    def to_trajectory(self) -> Trajectory:
        """A new record of the trajectory with all of its tokens."""
        outline = self.outline
        token_ids: list[int] = []
        logprobs: list[float] = []
        for some_ids, some_logprobs in self.packed:
            token_ids += shared_ints(some_ids)
            logprobs += some_logprobs.tolist()
        return replace(
            outline,
            token_ids=token_ids,
            logprobs=logprobs,
            loss_mask=[1] * self.num_tokens,
            weight_versions=list(outline.weight_versions),
            metadata=dict(outline.metadata),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredGroup:
    """What is durable of one group.

    Attributes:
        run_id: Its run.
        handle_id: The submission that asked for it last.
        group_id: Unique in the run.
        prompt: Its metadata is plain data: dataclasses have become mappings of their fields, tuples lists.
        sampling, reward, run_seed, priority: As submitted.
        trajectories: One a sample, in order.
        checkpoint: The trainer's checkpoint that has learned from it; None until acknowledged. Acknowledged groups
            come back from `submit` without tokens, since nobody is to see them again.
        is_compacted: Tokens and prompt were dropped after the retention time.
    """

    run_id: str
    handle_id: str
    group_id: str
    prompt: Prompt
    sampling: SamplingParams
    reward: str
    run_seed: int
    priority: int
    trajectories: tuple[RestoredTrajectory, ...]
    checkpoint: str | None = None
    is_compacted: bool = False

    @property
    def is_acknowledged(self) -> bool:
        return self.checkpoint is not None

    @property
    def is_finished(self) -> bool:
        return all(one.outline.status is not Status.PENDING for one in self.trajectories)

    def to_group(self) -> Group:
        """A new group with all tokens, as trainers get it."""
        members = [one.to_trajectory() for one in self.trajectories]
        return Group(group_id=self.group_id, prompt=self.prompt, trajectories=members)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryRecord:
    """One trajectory with what it takes to generate it again.

    Attributes:
        restored: The trajectory, its epoch and its chunks.
        prompt, sampling: As submitted.
    """

    restored: RestoredTrajectory
    prompt: Prompt
    sampling: SamplingParams


@dataclass(slots=True, kw_only=True)
class JournalCounts:
    """Totals since the journal was opened. Owned by the journal's thread; read by anybody.

    Attributes:
        num_commits: Transactions that became durable.
        num_calls: Calls they answered.
        num_chunks, num_tokens, num_bytes: Chunks that became durable, their tokens, and their bytes as stored.
        num_duplicates: Chunks that were there already.
        num_failed: Calls that raised, by the error's name.
        commit_s: Seconds spent in transactions.
        max_commit_s: The longest of them.
    """

    num_commits: int = 0
    num_calls: int = 0
    num_chunks: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_duplicates: int = 0
    num_failed: dict[str, int] = field(default_factory=dict)
    commit_s: float = 0.0
    max_commit_s: float = 0.0
