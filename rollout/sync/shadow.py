"""One worker's copy of the canonical bytes of every tensor it needs, and what undoes a staged version.

A version is staged in place, row by row, beside the live weights, which are built from it later. The
rows that it overwrites are kept until the version is committed or dropped, so the extra memory is
that of the rows that changed. Not thread-safe. Knows nothing of attempts, votes or live weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import xxhash

from rollout.errors import SyncRefused
from rollout.sync.delta import Overwritten, apply
from rollout.sync.encoding import TensorPlan
from rollout.sync.manifest import BucketRef, Entry, Piece, digest, tiling_faults


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
        self._version = version
        self._staged: dict[str, list[Piece]] = {}
        self._undo: list[tuple[Piece, Overwritten]] = []

    @property
    def version(self) -> int:
        """Last version committed."""
        return self._version

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors held."""
        return tuple(self._rows)

    @property
    def changed(self) -> frozenset[str]:
        """Names of tensors of which any staged row differs from the committed version."""
        return frozenset(piece.name for piece, before in self._undo if before.changed.numel())

    def changed_rows(self, name: str) -> torch.Tensor:
        """Indices of a tensor's rows that staging has written, int64, ascending."""
        found = [before.changed + piece.first_row for piece, before in self._undo if piece.name == name]
        return torch.cat(found).sort().values if found else torch.empty(0, dtype=torch.int64)

    def rows(self, name: str) -> torch.Tensor:
        """All rows of a tensor as they are now, staged ones included: uint8 [num_rows, row_bytes], not a copy."""
        return self._rows[name]

    def stage(self, bucket: BucketRef, payload: torch.Tensor) -> None:
        """Write a bucket's rows of the tensors held here, and check the digest of every piece.

        Args:
            bucket: Full, or a delta against the committed version.
            payload: uint8, flat, on the CPU.

        Raises:
            SyncRefused: The base is another version, a row is staged twice, the payload is not what the
                bucket says, or a digest differs. Then call `drop`: some pieces may have been written.
        """
        if bucket.base is not None and bucket.base != self._version:
            raise SyncRefused(f"{bucket}: got a delta against version {bucket.base}, expected {self._version}")
        for entry in bucket.entries:
            if entry.name in self._rows:
                self._stage(bucket, entry, payload)

    def _stage(self, bucket: BucketRef, entry: Entry, payload: torch.Tensor) -> None:
        matrix = self._rows[entry.name]
        first, end = entry.first_row, entry.first_row + entry.num_rows
        if first < 0 or entry.num_rows < 1 or end > matrix.shape[0]:
            raise SyncRefused(f"{bucket}: got {entry.piece}, expected some of 0…{matrix.shape[0] - 1}")
        staged = self._staged.setdefault(entry.name, [])
        if any(p.first_row < end and first < p.first_row + p.num_rows for p in staged):
            raise SyncRefused(f"{bucket}: {entry.piece}: some of these were staged before")
        target = matrix[first:end]
        self._undo.append((entry.piece, apply(entry, payload, target)))
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
        """Put back every row that staging overwrote."""
        for piece, before in reversed(self._undo):
            before.restore(self._rows[piece.name][piece.first_row : piece.first_row + piece.num_rows])
        self._staged, self._undo = {}, []
