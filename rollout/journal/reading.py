"""Rows back into groups and trajectories, each checked against its digest.

Owns the queries that only read. Anything here may run beside a writer: on a connection of its own it sees what was
durable when each query began.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from rollout.errors import InvalidRequest
from rollout.journal.encoding import (
    EncodedChunk,
    damaged,
    decode_finish_reason,
    decode_payload,
    decode_prompt,
    decode_routing,
    decode_sampling,
    digest_of,
    spans_of,
)
from rollout.journal.outcome import PROMPT, Outcome, restore_outcome
from rollout.journal.records import (
    RestoredGroup,
    RestoredTrajectory,
    StoredChunk,
    TrajectoryKey,
    TrajectoryRecord,
)
from rollout.journal.schema import Statements
from rollout.seeds import trajectory_seed
from rollout.types import FinishReason, Prompt, Status, Trajectory, VersionSpan, append_span

SLICE_GROUPS = 32
_GROUP = (
    "SELECT group_key, run_id, handle_id, group_id, prompt_tokens, prompt, prompt_digest, request, digest, priority, "
    "checkpoint_name, is_compacted FROM groups WHERE group_key IN "
)
_TRAJECTORY = (
    "SELECT group_key, sample_index, epoch, status, finish_reason, reward, outcome, digest FROM trajectories "
    "WHERE group_key IN "
)
_CHUNK = (
    "SELECT c.group_key, c.sample_index, c.start, c.num_tokens, c.finish_reason, c.details, c.payload FROM chunks c "
    "JOIN trajectories t ON t.group_key = c.group_key AND t.sample_index = c.sample_index AND t.epoch = c.epoch "
    "WHERE c.group_key IN "
)
_LENGTHS = (
    "SELECT g.prompt, t.outcome FROM trajectories t JOIN groups g ON g.group_key = t.group_key WHERE g.run_id = ? "
    "AND g.is_compacted = 0 AND t.status IN (?, ?) ORDER BY g.group_key DESC, t.sample_index DESC LIMIT ?"
)
_Row = tuple[Any, ...]


def slices(keys: Sequence[int], size: int = SLICE_GROUPS) -> Iterator[Sequence[int]]:
    """Runs of at most `size` keys."""
    return (keys[i : i + size] for i in range(0, len(keys), size))


def in_list(keys: Sequence[object]) -> str:
    """Placeholders for an IN."""
    return f"({', '.join('?' * len(keys))})"


class Reader:
    """Reads a journal through a database connection that it does not own."""

    def __init__(self, database: Statements) -> None:
        self._database = database

    def run_ids(self) -> list[str]:
        return [row[0] for row in self._database.execute("SELECT DISTINCT run_id FROM groups ORDER BY run_id")]

    def unfinished_keys(self) -> list[int]:
        """Rows of groups with a pending trajectory, of all runs, in the order of submission."""
        sql = "SELECT group_key FROM groups WHERE num_pending > 0 ORDER BY group_key"
        return [row[0] for row in self._database.execute(sql)]

    def run_keys(self, run_id: str) -> list[int]:
        """Rows of all groups of a run, in the order of submission."""
        sql = "SELECT group_key FROM groups WHERE run_id = ? ORDER BY group_key"
        return [row[0] for row in self._database.execute(sql, (run_id,))]

    def lengths(self, run_id: str, most: int) -> list[tuple[str, int]]:
        """(prompt id, tokens) of the run's newest outputs that ended by themselves or at their limit, oldest first.

        Compacted ones are left out: their prompts are gone.
        """
        ended = (Status.COMPLETED.value, Status.TRUNCATED.value)
        rows = self._database.execute(_LENGTHS, (run_id, *ended, most))
        return [(json.loads(prompt)["prompt_id"], json.loads(rest)["num_tokens"]) for prompt, rest in reversed(rows)]

    def group_keys(self, run_id: str, group_ids: Iterable[str]) -> dict[str, int]:
        """Rows of those groups that the journal knows."""
        sql = "SELECT group_key FROM groups WHERE run_id = ? AND group_id = ?"
        found = {group_id: self._database.execute(sql, (run_id, group_id)) for group_id in group_ids}
        return {group_id: rows[0][0] for group_id, rows in found.items() if rows}

    def load(self, keys: Sequence[int]) -> list[RestoredGroup]:
        """Groups with all that is durable of them, in the order of `keys`; at most a few hundred at a time.

        Raises:
            JournalBroken: A row is damaged or missing.
        """
        if not keys:
            return []
        chunks: dict[tuple[int, int], list[_Row]] = {}
        for row in self._rows(_CHUNK, keys, "c.group_key, c.sample_index, c.start"):
            chunks.setdefault((row[0], row[1]), []).append(row)
        return self._groups(keys, chunks)

    def load_outlines(self, keys: Sequence[int]) -> list[RestoredGroup]:
        """Like `load`, without tokens."""
        return self._groups(keys, None) if keys else []

    def group(self, run_id: str, group_id: str) -> RestoredGroup:
        """One group. Raises InvalidRequest if the journal has not got its tokens, JournalBroken."""
        group_key = self.group_keys(run_id, [group_id]).get(group_id)
        if group_key is None:
            raise InvalidRequest("group", f"{group_id} of run {run_id}", "one that was submitted")
        group = self.load([group_key])[0]
        if group.is_compacted:
            raise InvalidRequest("group", f"{group_id} of run {run_id}", "one within its tokens' retention time")
        return group

    def trajectory(self, key: TrajectoryKey) -> TrajectoryRecord:
        """One trajectory. Raises InvalidRequest if the journal has not got its tokens, JournalBroken."""
        group = self.group(key.run_id, key.group_id)
        if not 0 <= key.sample_index < len(group.trajectories):
            raise InvalidRequest("trajectory", str(key), "one that was submitted")
        restored = group.trajectories[key.sample_index]
        return TrajectoryRecord(restored=restored, prompt=group.prompt, sampling=group.sampling)

    def _rows(self, sql: str, keys: Sequence[int], order: str) -> list[_Row]:
        return self._database.execute(f"{sql}{in_list(keys)} ORDER BY {order}", tuple(keys))

    def _groups(self, keys: Sequence[int], chunks: dict[tuple[int, int], list[_Row]] | None) -> list[RestoredGroup]:
        members: dict[int, list[_Row]] = {}
        for row in self._rows(_TRAJECTORY, keys, "group_key, sample_index"):
            members.setdefault(row[0], []).append(row)
        groups = {row[0]: row for row in self._rows(_GROUP, keys, "group_key")}
        return [_group(groups[key], members.get(key, []), chunks) for key in keys]


def _group(row: _Row, members: list[_Row], chunks: dict[tuple[int, int], list[_Row]] | None) -> RestoredGroup:
    group_key, run_id, handle_id, group_id, tokens, prompt_text, prompt_digest, request_text, digest = row[:9]
    priority, checkpoint, is_compacted = row[9:]
    what = f"group {group_id} of run {run_id}"
    is_sound = digest_of(run_id, group_id, prompt_digest, request_text) == digest
    if not is_sound or (not is_compacted and digest_of(tokens, prompt_text) != prompt_digest):
        raise damaged(what)
    request, prompt = json.loads(request_text), decode_prompt(prompt_text, tokens)
    if [member[1] for member in members] != list(range(request["n_samples_per_prompt"])):
        raise damaged(f"trajectories of {what}")
    restored = []
    for member in members:
        key = TrajectoryKey(run_id=run_id, group_id=group_id, sample_index=member[1])
        own = chunks.get((group_key, member[1]), []) if chunks is not None else None
        restored.append(_trajectory(key, member, own, prompt, request["run_seed"], bool(is_compacted)))
    return RestoredGroup(
        run_id=run_id,
        handle_id=handle_id,
        group_id=group_id,
        prompt=prompt,
        sampling=decode_sampling(request["sampling"]),
        reward=request["reward"],
        run_seed=request["run_seed"],
        priority=priority,
        trajectories=tuple(restored),
        checkpoint=checkpoint,
        is_compacted=bool(is_compacted),
    )


def _trajectory(
    key: TrajectoryKey, row: _Row, chunks: list[_Row] | None, prompt: Prompt, run_seed: int, is_compacted: bool
) -> RestoredTrajectory:
    epoch, status, finish_reason, reward, rest, digest = row[2:]
    trajectory = Trajectory(
        group_id=key.group_id,
        sample_index=key.sample_index,
        seed=trajectory_seed(run_seed, key.group_id, key.sample_index),
        prompt_token_ids=prompt.token_ids,
        metadata={PROMPT: prompt.metadata},
    )
    if is_compacted or chunks is None:
        try:
            trajectory.status, trajectory.reward = Status(status), reward
            trajectory.finish_reason = decode_finish_reason(finish_reason)
        except ValueError:
            raise damaged(f"end of {key}") from None
        return RestoredTrajectory(epoch=epoch, outline=trajectory)
    stored, packed, stop = [], [], 0
    for chunk in chunks:
        one, arrays = _chunk(trajectory, key, epoch, chunk, stop)
        stored.append(one)
        packed.append(arrays)
        stop += one.num_tokens
    if status != Status.PENDING.value:
        outcome = Outcome(status=status, finish_reason=finish_reason, reward=reward, rest=rest, digest=digest)
        restore_outcome(trajectory, key, epoch, outcome, prompt, stop)
    return RestoredTrajectory(epoch=epoch, outline=trajectory, chunks=tuple(stored), packed=tuple(packed))


def _chunk(
    outline: Trajectory, key: TrajectoryKey, epoch: int, row: _Row, stop: int
) -> tuple[StoredChunk, tuple[np.ndarray, np.ndarray]]:
    """Check a chunk's row; versions and routing go to the outline, tokens stay as they are."""
    start, num_tokens, finish_reason, details_text, payload = row[2:]
    what = f"chunk of {key} at token {start}"
    chunk = EncodedChunk(num_tokens=num_tokens, finish_reason=finish_reason, details=details_text, payload=payload)
    arrays = decode_payload(what, (key, epoch, start), chunk)
    if start != stop:
        raise damaged(f"chunk before the {what}")
    details = json.loads(details_text)
    for span in spans_of(details["spans"]):
        moved = VersionSpan(version=span.version, start=start + span.start, stop=start + span.stop)
        append_span(outline.weight_versions, moved)
    if details["routing"] is not None:
        outline.routed_experts += (decode_routing(details["routing"]),)
    stored = StoredChunk(
        start=start,
        num_tokens=num_tokens,
        finish_reason=FinishReason(finish_reason),
        shard=details["shard"],
        num_cached_tokens=details["cached"],
        ttft_s=details["ttft_s"],
        duration_s=details["duration_s"],
    )
    return stored, arrays
