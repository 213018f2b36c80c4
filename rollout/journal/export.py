"""A run as JSONL or Parquet: one row a trajectory, with the fields under which RL engineers know them; or as a trace.

Groups are read and written one slice at a time, so a run of any size passes through little memory. Groups whose tokens
were dropped after their retention time are left out and counted. Owns the two formats; knows nothing of databases.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from rollout.errors import InvalidRequest
from rollout.journal.encoding import to_json
from rollout.journal.reading import Reader, slices
from rollout.journal.records import RestoredGroup
from rollout.routing import RoutingRef
from rollout.types import FinishReason, Status, Trajectory, VersionSpan

EXPORT_GROUPS = 8  # groups of one Parquet row group, and most held in memory
_ENDED = (Status.COMPLETED, Status.TRUNCATED)
_SPAN = pa.struct([("version", pa.int64()), ("start", pa.int64()), ("stop", pa.int64())])
_ROUTING = pa.struct(
    [("ref", pa.string()), ("num_bytes", pa.int64()), ("first_token", pa.int64()), ("num_tokens", pa.int64())]
)
SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("group_id", pa.string()),
        ("sample_index", pa.int64()),
        ("seed", pa.int64()),
        ("prompt_id", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float64())),
        ("loss_mask", pa.list_(pa.int8())),
        ("weight_versions", pa.list_(_SPAN)),
        ("routed_experts", pa.list_(_ROUTING)),
        ("finish_reason", pa.string()),
        ("status", pa.string()),
        ("reward", pa.float64()),
        ("error", pa.string()),
        ("epoch", pa.int64()),
        ("checkpoint", pa.string()),
        ("metadata", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportCounts:
    """What was written, and how many groups were left out: without tokens by now, or (in a trace) unfinished."""

    num_groups: int
    num_trajectories: int
    num_compacted: int
    num_unfinished: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedTrajectory:
    """A row read back.

    Attributes:
        run_id: Its run.
        prompt_id: Its prompt.
        epoch: Times it was restarted from scratch.
        checkpoint: The checkpoint that has learned from its group, if any.
        trajectory: The trajectory; its metadata as plain data.
    """

    run_id: str
    prompt_id: str
    epoch: int
    checkpoint: str | None
    trajectory: Trajectory


def export_run(reader: Reader, run_id: str, path: Path) -> ExportCounts:
    """Write all groups of a run, in the order of submission, pending ones with what they have so far.

    Args:
        reader: The journal.
        run_id: The run.
        path: Ends in .jsonl or .parquet; replaced as a whole when the export is complete.

    Raises:
        InvalidRequest: Another ending, or a run without groups.
        JournalBroken: A row is damaged; `path` is as it was.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise InvalidRequest("export path", str(path), "a name that ends in .jsonl or .parquet")
    keys = _keys(reader, run_id)
    draft = path.with_name(path.name + ".draft")
    num_kept, num_rows = 0, 0
    try:
        with _writer(draft, path.suffix) as write:
            for some in slices(keys, EXPORT_GROUPS):
                kept = [group for group in reader.load(some) if not group.is_compacted]
                rows = [row for group in kept for row in _rows(group)]
                write(rows)
                num_kept, num_rows = num_kept + len(kept), num_rows + len(rows)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return ExportCounts(num_groups=num_kept, num_trajectories=num_rows, num_compacted=len(keys) - num_kept)


def export_trace(reader: Reader, run_id: str, path: Path) -> ExportCounts:
    """Write how long the members of a run's groups became, as rollout.simulate.lengths reads it.

    Groups count whose members have all ended by themselves or at their limit: of others the length is not known.

    Args:
        reader: The journal.
        run_id: The run.
        path: JSONL; replaced as a whole when it is complete.

    Raises:
        InvalidRequest: A run without groups.
        JournalBroken: A row is damaged; `path` is as it was.
    """
    keys = _keys(reader, run_id)
    draft = path.with_name(path.name + ".draft")
    num_groups, num_rows, num_compacted = 0, 0, 0
    try:
        with _JsonlWriter(draft) as write:
            for some in slices(keys, EXPORT_GROUPS):
                kept = [group for group in reader.load(some) if not group.is_compacted]
                num_compacted += len(some) - len(kept)
                ended = [group for group in kept if all(t.outline.status in _ENDED for t in group.trajectories)]
                rows = [row for group in ended for row in _lengths(group)]
                write(rows)
                num_groups, num_rows = num_groups + len(ended), num_rows + len(rows)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return ExportCounts(
        num_groups=num_groups,
        num_trajectories=num_rows,
        num_compacted=num_compacted,
        num_unfinished=len(keys) - num_compacted - num_groups,
    )


def load_export(path: Path) -> Iterator[ExportedTrajectory]:
    """Rows of a file that `export_run` wrote, in order."""
    rows = _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path)
    return (_exported(row) for row in rows)


class _JsonlWriter:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def __enter__(self) -> _JsonlWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __call__(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._file.write(json.dumps(row, separators=(",", ":")) + "\n")


class _ParquetWriter:
    def __init__(self, path: Path) -> None:
        self._writer = parquet.ParquetWriter(path, SCHEMA, compression="zstd")

    def __enter__(self) -> _ParquetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def __call__(self, rows: list[dict[str, Any]]) -> None:
        if rows:
            texts = [row | {"metadata": to_json("metadata", row["metadata"])} for row in rows]
            self._writer.write_table(pa.Table.from_pylist(texts, schema=SCHEMA))


def _writer(path: Path, suffix: str) -> _JsonlWriter | _ParquetWriter:
    return _JsonlWriter(path) if suffix == ".jsonl" else _ParquetWriter(path)


def _rows(group: RestoredGroup) -> Iterator[dict[str, Any]]:
    for restored in group.trajectories:
        one = restored.to_trajectory()
        yield {
            "run_id": group.run_id,
            "group_id": one.group_id,
            "sample_index": one.sample_index,
            "seed": one.seed,
            "prompt_id": group.prompt.prompt_id,
            "prompt_token_ids": list(one.prompt_token_ids),
            "token_ids": one.token_ids,
            "logprobs": one.logprobs,
            "loss_mask": one.loss_mask,
            "weight_versions": [{"version": s.version, "start": s.start, "stop": s.stop} for s in one.weight_versions],
            "routed_experts": [_routing_row(ref) for ref in one.routed_experts],
            "finish_reason": None if one.finish_reason is None else one.finish_reason.value,
            "status": one.status.value,
            "reward": one.reward,
            "error": one.error,
            "epoch": restored.epoch,
            "checkpoint": group.checkpoint,
            "metadata": one.metadata,
        }


def _lengths(group: RestoredGroup) -> Iterator[dict[str, Any]]:
    for one in group.trajectories:
        yield {
            "group_id": group.group_id,
            "sample_index": one.outline.sample_index,
            "prompt_tokens": len(one.outline.prompt_token_ids),
            "output_tokens": one.num_tokens,
        }


def _keys(reader: Reader, run_id: str) -> list[int]:
    keys = reader.run_keys(run_id)
    if not keys:
        raise InvalidRequest("run", run_id, f"one of {', '.join(reader.run_ids()) or 'none'}")
    return keys


def _routing_row(ref: RoutingRef) -> dict[str, Any]:
    return {
        "ref": ref.ref,
        "num_bytes": ref.num_bytes,
        "first_token": ref.first_token,
        "num_tokens": ref.num_tokens,
    }


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                yield row | {"metadata": json.loads(row["metadata"])}


def _exported(row: dict[str, Any]) -> ExportedTrajectory:
    reason = row["finish_reason"]
    spans: Iterable[dict[str, int]] = row["weight_versions"]
    trajectory = Trajectory(
        group_id=row["group_id"],
        sample_index=row["sample_index"],
        seed=row["seed"],
        prompt_token_ids=tuple(row["prompt_token_ids"]),
        token_ids=row["token_ids"],
        logprobs=row["logprobs"],
        loss_mask=row["loss_mask"],
        weight_versions=[VersionSpan(**span) for span in spans],
        routed_experts=tuple(RoutingRef(**ref) for ref in row["routed_experts"]),
        finish_reason=None if reason is None else FinishReason(reason),
        status=Status(row["status"]),
        reward=row["reward"],
        error=row["error"],
        metadata=row["metadata"],
    )
    return ExportedTrajectory(
        run_id=row["run_id"],
        prompt_id=row["prompt_id"],
        epoch=row["epoch"],
        checkpoint=row["checkpoint"],
        trajectory=trajectory,
    )
