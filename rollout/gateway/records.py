"""Groups and reports as JSON, the way the rollout API sends them.

Token ids, log-probabilities, version spans and verdicts keep the names that trainers know. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rollout.fleet import SyncReport
from rollout.journal.encoding import to_json
from rollout.types import Group, Trajectory


def group_line(group: Group) -> bytes:
    """One line of NDJSON. Raises InvalidRequest if its metadata is not plain data."""
    record = {
        "group_id": group.group_id,
        "prompt_id": group.prompt.prompt_id,
        "prompt_token_ids": group.prompt.token_ids,
        "metadata": group.prompt.metadata,
        "trajectories": [_trajectory(trajectory) for trajectory in group.trajectories],
    }
    return to_json(f"group {group.group_id}", record).encode() + b"\n"


def _trajectory(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "sample_index": trajectory.sample_index,
        "seed": trajectory.seed,
        "token_ids": trajectory.token_ids,
        "logprobs": trajectory.logprobs,
        "loss_mask": trajectory.loss_mask,
        "weight_versions": [asdict(span) for span in trajectory.weight_versions],
        "finish_reason": None if trajectory.finish_reason is None else trajectory.finish_reason.value,
        "status": trajectory.status.value,
        "reward": trajectory.reward,
        "error": trajectory.error,
        "metadata": {name: value for name, value in trajectory.metadata.items() if name != "prompt"},
    }


def report_json(report: SyncReport) -> dict[str, Any]:
    """A publication that succeeded."""
    return asdict(report) | {"ranks_lost": list(report.ranks_lost)}


def first_difference(recorded: Sequence[int], again: Sequence[int]) -> int | None:
    """Index of the first token that differs, or at which one of the two ends; None if they are the same."""
    for place, (one, other) in enumerate(zip(recorded, again, strict=False)):
        if one != other:
            return place
    return None if len(recorded) == len(again) else min(len(recorded), len(again))
