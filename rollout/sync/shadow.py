"""One worker's copy of the canonical bytes of every tensor it needs, and what undoes a staged version.

A version is staged in place, row by row, beside the live weights, which are built from it later. Of a
delta the rows that it overwrites are kept until the version is committed or dropped, so the extra memory
is that of the rows that changed. Of a full version nothing is kept: one that is dropped half-way leaves a
shadow of no version, which takes only full versions until one is committed; the live weights are others
and serve on. Not thread-safe. Knows nothing of attempts, votes or live weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import xxhash

from rollout.errors import SyncRefused
from rollout.sync.delta import Overwritten, apply, overwrite
from rollout.sync.encoding import TensorPlan
from rollout.sync.manifest import BucketRef, Entry, Piece, digest, tiling_faults
from rollout.sync.segments import Segment


class Shadow:
    """Rows of one version, and of at most one version being staged over it.

    Args:
        plans: Encoding of every tensor of the model, by name.
        rows: uint8 [num_rows, row_bytes], contiguous, on the CPU, of the tensors this worker needs; the
            shadow owns them from now on.
        version: Which version these are.

    Raises:
        ValueError: Rows are not as planned.
    """

    def __init__(self, plans: Mapping[str, TensorPlan], rows: Mapping[str, torch.Tensor], version: int) -> None:
        for name, matrix in rows.items():
            shape = (plans[name].num_rows, plans[name].row_bytes)
            if matrix.dtype != torch.uint8 or tuple(matrix.shape) != shape or not matrix.is_contiguous():
                got = f"{matrix.dtype} {tuple(matrix.shape)}"
                raise ValueError(f"rows of {name}: got {got}, expected contiguous uint8 {shape}")
        self._plans = plans
        self._rows = dict(rows)
        self._version: int | None = version
        self._staged: dict[str, list[Piece]] = {}
        self._undo: list[tuple[Piece, Overwritten]] = []

    @property
    def version(self) -> int | None:
        """What the rows are when nothing is staged; None after a full version was dropped half-way."""
        return self._version

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors held."""
        return tuple(self._rows)

    @property
    def changed(self) -> frozenset[str]:
        """Names of tensors of which any row may differ from the committed version: all of a full one."""
        if self._version is None:
            return frozenset(self._staged)
        return frozenset(piece.name for piece, before in self._undo if before.changed.numel())

    def rows(self, name: str) -> torch.Tensor:
        """All rows of a tensor as they are now, staged ones included: uint8 [num_rows, row_bytes], not a copy."""
        return self._rows[name]

    def begin(self, base: int | None) -> None:
        """A version is going to be staged as changes against `base`, or in full.

        Raises:
            SyncRefused: The rows are not those of the base.
        """
        if base is not None and base != self._version:
            got = "nothing whole: a full version was dropped half-way" if self._version is None else self._version
            raise SyncRefused(f"base: got {base}, expected {got}; send everything")

    def stage(self, bucket: BucketRef, payload: torch.Tensor | Segment) -> None:
        """Write a bucket's rows of the tensors held here, and check the digest of every piece.

        Args:
            bucket: Full, or a delta against the committed version.
            payload: In shared memory; or uint8, flat, on the CPU.

        Raises:
            SyncRefused: The base is another version, a row is staged twice, the payload is not what the
                bucket says, or a digest differs. Then call `drop`: some pieces may have been written.
        """
        if bucket.base is not None and bucket.base != self._version:
            raise SyncRefused(f"{bucket}: got a delta against version {bucket.base}, expected {self._version}")
        for entry in bucket.entries:
            if entry.name in self._rows:
                self._stage(bucket, entry, payload)

    def _stage(self, bucket: BucketRef, entry: Entry, payload: torch.Tensor | Segment) -> None:
        matrix = self._rows[entry.name]
        first, end = entry.first_row, entry.first_row + entry.num_rows
        if first < 0 or entry.num_rows < 1 or end > matrix.shape[0]:
            raise SyncRefused(f"{bucket}: got {entry.piece}, expected some of 0…{matrix.shape[0] - 1}")
        staged = self._staged.setdefault(entry.name, [])
        if any(p.first_row < end and first < p.first_row + p.num_rows for p in staged):
            raise SyncRefused(f"{bucket}: {entry.piece}: some of these were staged before")
        target = matrix[first:end]
        if bucket.base is None:
            self._version = None
            got = overwrite(entry, payload, target)
        else:
            changes = payload.tensor if isinstance(payload, Segment) else payload
            self._undo.append((entry.piece, apply(entry, changes, target)))
            got = digest(target)
        if got != entry.digest:
            raise SyncRefused(f"{bucket}, {entry.piece}: got digest {got}, expected {entry.digest}")
        staged.append(entry.piece)

    def missing(self) -> list[str]:
        """Rows of tensors held here that were not staged yet, in words; [] once all were."""
        return [
            fault
            for name, matrix in self._rows.items()
            for fault in tiling_faults(name, matrix.shape[0], self._staged.get(name, []))
        ]

    def common_digest(self, names: Iterable[str]) -> str:
        """XXH3-128 over names and all bytes of tensors, in the order of their names, as they are now.

        Args:
            names: Tensors that every worker holds; each one must be held here.
        """
        hasher = xxhash.xxh3_128()
        for name in sorted(names):
            hasher.update(f"{name} {digest(self._rows[name])}\n".encode())
        return hasher.hexdigest()

    def commit(self, version: int) -> None:
        """What is staged is the version now; nothing can be undone any more."""
        self._version = version
        self._staged, self._undo = {}, []

    def drop(self) -> None:
        """Put back every row that a delta overwrote; see `version` for a full one."""
        for piece, before in reversed(self._undo):
            before.restore(self._rows[piece.name][piece.first_row : piece.first_row + piece.num_rows])
        self._staged, self._undo = {}, []
