"""How a trajectory ended, as the columns of its row.

Owns the columns' form and their digest. Knows nothing of chunks or of databases.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from rollout.errors import InvalidRequest
from rollout.journal.encoding import damaged, decode_finish_reason, digest_of, to_json
from rollout.journal.records import TrajectoryKey
from rollout.types import Prompt, Status, Trajectory

PROMPT = "prompt"  # key of the prompt's metadata in a trajectory's; kept once, with the group


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The columns.

    Attributes:
        status, finish_reason: Values of their enums.
        reward: Finite, or None.
        rest: Error, metadata and number of tokens, as JSON.
        digest: Over key, epoch and the above.
    """

    status: str
    finish_reason: str | None
    reward: float | None
    rest: str
    digest: str

    def says_the_same_as(self, other: Outcome) -> bool:
        """Same end, reward and error; metadata (timings) may differ."""
        mine, theirs = json.loads(self.rest), json.loads(other.rest)
        return (self.status, self.finish_reason, self.reward, mine["error"], mine["num_tokens"]) == (
            other.status,
            other.finish_reason,
            other.reward,
            theirs["error"],
            theirs["num_tokens"],
        )


def encode_outcome(key: TrajectoryKey, epoch: int, trajectory: Trajectory) -> Outcome:
    """The end of a trajectory.

    Raises:
        InvalidRequest: It is pending, its reward is not finite, or its metadata is not plain data.
    """
    if trajectory.status is Status.PENDING:
        raise InvalidRequest(f"{key} status", "pending", "a final one")
    reward = None if trajectory.reward is None else float(trajectory.reward)
    if reward is not None and not math.isfinite(reward):
        raise InvalidRequest(f"{key} reward", reward, "a finite number, or None")
    metadata = {name: value for name, value in trajectory.metadata.items() if name != PROMPT}
    rest = to_json(
        f"{key} metadata",
        {"error": trajectory.error, "metadata": metadata, "num_tokens": len(trajectory.token_ids)},
    )
    status = trajectory.status.value
    reason = None if trajectory.finish_reason is None else trajectory.finish_reason.value
    digest = digest_of(key, epoch, status, reason, reward, rest)
    return Outcome(status=status, finish_reason=reason, reward=reward, rest=rest, digest=digest)


def restore_outcome(
    trajectory: Trajectory, key: TrajectoryKey, epoch: int, outcome: Outcome, prompt: Prompt, num_tokens: int
) -> None:
    """Put a stored end into a trajectory of which `num_tokens` tokens are stored.

    Raises:
        JournalBroken: The row is not the one that was written, or chunks are missing.
    """
    got = digest_of(key, epoch, outcome.status, outcome.finish_reason, outcome.reward, outcome.rest)
    rest: dict[str, Any] = json.loads(outcome.rest) if got == outcome.digest else {}
    if rest.get("num_tokens") != num_tokens:
        raise damaged(f"end of {key}")
    trajectory.status = Status(outcome.status)
    trajectory.finish_reason = decode_finish_reason(outcome.finish_reason)
    trajectory.reward, trajectory.error = outcome.reward, rest["error"]
    trajectory.metadata = {PROMPT: prompt.metadata} | rest["metadata"]
