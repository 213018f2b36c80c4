"""What changed between two versions of a piece, as bytes: packed by a sender, applied in place by a shard.

A row travels if any of its bytes changed, beside a mask of one bit a row that says which ones do; a
piece of which every row changed travels as one run, without a mask. Compressing a sparse update to
row indices and rows is common in checkpoint delta encoding; a bitmap is smaller than indices once
more than one row in 32 or so changes, and costs 0.4 % of an INT4 row otherwise.

Knows nothing of versions, senders or where the bytes lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from rollout.errors import SyncRefused
from rollout.sync.manifest import BucketRef, Entry, Piece, aligned, digest
from rollout.sync.segments import Segment

WORD_BYTES = 8
BLOCK_BYTES = 2**18  # copied, then hashed: fits the second-level cache of a core
FEW = 16
"""Words that differ are mapped to rows one by one if there are fewer than one for so many rows."""

Allocate = Callable[[int], tuple[str | None, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A piece in its new version, and which of its rows travel.

    Attributes:
        piece: Which rows of which tensor.
        rows: uint8 [piece.num_rows, row_bytes], the new bytes, on any device.
        changed: int64 [num_changed], ascending, on the CPU; None if all rows travel.
    """

    piece: Piece
    rows: torch.Tensor
    changed: torch.Tensor | None

    @property
    def num_changed(self) -> int:
        return self.piece.num_rows if self.changed is None else self.changed.numel()

    @property
    def num_bytes(self) -> int:
        """Payload bytes, padding included."""
        return aligned(_num_mask_bytes(self)) + aligned(self.num_changed * self.rows.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Overwritten:
    """What `apply` replaced: rows `changed` (int64, relative to the piece) had the bytes `rows`."""

    changed: torch.Tensor
    rows: torch.Tensor

    def restore(self, target: torch.Tensor) -> None:
        """Undo `apply` on the same rows."""
        _put(target, self.changed, self.rows)


def changed_rows(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Indices of rows that differ in any byte.

    Args:
        old, new: uint8 [rows, row_bytes], contiguous, on one device.

    Returns:
        int64, ascending, on the CPU.
    """
    if old.shape != new.shape:
        raise ValueError(f"rows: got {tuple(old.shape)} and {tuple(new.shape)}, expected the same shape")
    if old.device.type == "cpu":
        return torch.from_numpy(_changed_rows(old.numpy(), new.numpy()))
    word = torch.int64 if old.shape[1] % WORD_BYTES == 0 else torch.uint8
    return (old.view(word) != new.view(word)).any(dim=1).nonzero().flatten().cpu()


def _changed_rows(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    num_rows, row_bytes = old.shape
    if num_rows == 0:
        return np.empty(0, np.int64)
    if row_bytes % WORD_BYTES == 0:
        return np.flatnonzero((old.view(np.int64) != new.view(np.int64)).any(axis=1))
    # An INT4 row (34 bytes) is no whole number of words, so words are compared across row boundaries first.
    end = old.size // WORD_BYTES * WORD_BYTES
    words = [rows.reshape(-1)[:end].view(np.int64) for rows in (old, new)]
    differs = words[0] != words[1]
    if np.count_nonzero(differs) * FEW > num_rows:
        row = np.dtype((np.void, row_bytes))
        return np.flatnonzero((old.view(row) != new.view(row)).reshape(-1))
    first = np.flatnonzero(differs) * WORD_BYTES
    starts = np.arange(0, WORD_BYTES, min(row_bytes, WORD_BYTES - 1))  # a word touches a few rows at most
    touched = [(first + start) // row_bytes for start in (*starts, WORD_BYTES - 1)]
    tail = np.arange(end // row_bytes, num_rows)  # rows with bytes after the last whole word
    candidates = np.unique(np.concatenate([*touched, tail]))
    return candidates[(old[candidates] != new[candidates]).any(axis=1)]


def compare(piece: Piece, new: torch.Tensor, old: torch.Tensor | None) -> Change:
    """Find what of a piece must travel.

    Args:
        piece: Which rows of which tensor.
        new: uint8 [piece.num_rows, row_bytes], contiguous; must not change until it is packed.
        old: The same rows in the base version, on the same device; None sends all rows.

    Raises:
        ValueError: Shapes do not fit.
    """
    if new.dtype != torch.uint8 or new.ndim != 2 or new.shape[0] != piece.num_rows:
        raise ValueError(f"{piece}: got {new.dtype} {tuple(new.shape)}, expected uint8 [{piece.num_rows}, row_bytes]")
    changed = None if old is None else changed_rows(old, new)
    if changed is not None and changed.numel() == piece.num_rows:
        changed = None
    return Change(piece=piece, rows=new, changed=changed)


def in_memory(num_bytes: int) -> tuple[None, torch.Tensor]:
    """A payload of this process, for a bucket that is broadcast."""
    return None, torch.zeros(num_bytes, dtype=torch.uint8)


def pack_bucket(
    changes: Sequence[Change],
    *,
    version: int,
    attempt: int,
    base: int | None,
    sender: int,
    index: int,
    allocate: Allocate = in_memory,
) -> tuple[BucketRef, torch.Tensor]:
    """Lay out pieces in one flat payload and describe it.

    Args:
        changes: The pieces, in any order.
        version, attempt, base, sender, index: As in BucketRef.
        allocate: Makes a CPU buffer of so many bytes, and the name of its segment; `segments.create`
            packs straight into shared memory.

    Returns:
        The bucket's description, and its payload, uint8 [num_bytes].

    Raises:
        SyncRefused: A full bucket has a piece of which not all rows travel.
    """
    if base is None and any(change.changed is not None for change in changes):
        raise SyncRefused(f"bucket {index} of version {version}: got a delta, expected a base that it applies to")
    num_bytes = sum(change.num_bytes for change in changes)
    segment, payload = allocate(num_bytes)
    entries, offset = [], 0
    for change in changes:
        entries.append(_write(change, payload, offset))
        offset += change.num_bytes
    ref = BucketRef(
        version=version,
        attempt=attempt,
        base=base,
        sender=sender,
        index=index,
        segment=segment,
        num_bytes=num_bytes,
        entries=tuple(entries),
    )
    return ref, payload


def _num_mask_bytes(change: Change) -> int:
    return 0 if change.changed is None or change.changed.numel() == 0 else -(-change.piece.num_rows // 8)


def _write(change: Change, payload: torch.Tensor, offset: int) -> Entry:
    num_mask_bytes = _num_mask_bytes(change)
    rows_offset = offset + aligned(num_mask_bytes)
    travelling = change.rows
    if change.changed is not None:
        travelling = _take(change.rows, change.changed)
    if change.changed is not None and num_mask_bytes:
        mask: np.ndarray = np.zeros(change.piece.num_rows, np.bool_)
        mask[change.changed.numpy()] = True
        payload[offset : offset + num_mask_bytes] = torch.from_numpy(np.packbits(mask, bitorder="little"))
    payload[rows_offset : rows_offset + travelling.numel()].copy_(travelling.reshape(-1))
    return Entry(
        name=change.piece.name,
        first_row=change.piece.first_row,
        num_rows=change.piece.num_rows,
        num_changed=change.num_changed,
        digest=digest(change.rows),
        mask_offset=None if change.changed is None else offset,
        rows_offset=rows_offset,
    )


def travelling_rows(entry: Entry, payload: torch.Tensor) -> torch.Tensor | None:
    """Which rows of a piece travel: int64, ascending, relative to the piece; None for all of them.

    Raises:
        SyncRefused: The mask lies outside the payload, or does not have num_changed bits.
    """
    if entry.mask_offset is None:
        if entry.num_changed != entry.num_rows:
            raise SyncRefused(f"{entry.piece}: got {entry.num_changed} rows and no mask, expected {entry.num_rows}")
        return None
    if entry.num_changed == 0:
        return torch.empty(0, dtype=torch.int64)
    packed = _slice(entry, payload, entry.mask_offset, entry.num_mask_bytes, "mask")
    bits = np.unpackbits(packed.numpy(), bitorder="little")
    changed = np.flatnonzero(bits)
    if changed.size != entry.num_changed or changed[-1] >= entry.num_rows:
        raise SyncRefused(
            f"{entry.piece}: got a mask of {changed.size} rows, up to row {changed.max(initial=-1)}, "
            f"expected {entry.num_changed} of {entry.num_rows}"
        )
    return torch.from_numpy(changed)


def apply(entry: Entry, payload: torch.Tensor, target: torch.Tensor) -> Overwritten:
    """Bring a piece to the new version in place. Does not check the digest.

    Args:
        entry: The piece.
        payload: uint8, flat, on the CPU: the bucket's.
        target: uint8 [entry.num_rows, row_bytes], contiguous, on the CPU: the piece's rows in the base
            version; any bytes if all rows travel.

    Returns:
        What was overwritten, for rows whose bytes did change.

    Raises:
        SyncRefused: The payload is not what the entry says; nothing was written.
    """
    if target.shape[0] != entry.num_rows:
        raise ValueError(f"{entry.piece}: got {target.shape[0]} rows to write, expected {entry.num_rows}")
    row_bytes = target.shape[1]
    travelling = travelling_rows(entry, payload)
    flat = _slice(entry, payload, entry.rows_offset, entry.num_changed * row_bytes, "rows")
    rows = flat.view(entry.num_changed, row_bytes)
    if travelling is None:
        differing = changed_rows(target, rows)
        before = Overwritten(changed=differing, rows=_take(target, differing))
        target.copy_(rows)
        return before
    before = Overwritten(changed=travelling, rows=_take(target, travelling))
    _put(target, travelling, rows)
    return before


def overwrite(entry: Entry, payload: torch.Tensor | Segment, target: torch.Tensor) -> str:
    """Write a piece of which all rows travel, without keeping what it had; returns the digest of what was written.

    Each block is hashed while the processor's cache has it.

    Args:
        entry: The piece.
        payload: The bucket's: in shared memory, or uint8, flat, on the CPU.
        target: As in `apply`.

    Raises:
        SyncRefused: Not all rows travel, or the payload is shorter than the entry says.
    """
    if entry.mask_offset is not None or entry.num_changed != entry.num_rows:
        raise SyncRefused(f"{entry.piece}: got {entry.num_changed} rows and a mask, expected all {entry.num_rows}")
    flat = target.view(-1)
    hasher = xxhash.xxh3_128()
    if isinstance(payload, Segment):
        _check_inside(entry, payload.num_bytes, entry.rows_offset, flat.numel(), "rows")
        for block in payload.read_into(flat, entry.rows_offset, BLOCK_BYTES):
            hasher.update(block.numpy())
        return hasher.hexdigest()
    rows = _slice(entry, payload, entry.rows_offset, flat.numel(), "rows")
    for written, block in zip(flat.split(BLOCK_BYTES), rows.split(BLOCK_BYTES), strict=True):
        written.copy_(block)
        hasher.update(written.numpy())
    return hasher.hexdigest()


def _slice(entry: Entry, payload: torch.Tensor, offset: int, num_bytes: int, what: str) -> torch.Tensor:
    _check_inside(entry, payload.numel(), offset, num_bytes, what)
    return payload[offset : offset + num_bytes]


def _check_inside(entry: Entry, payload_bytes: int, offset: int, num_bytes: int, what: str) -> None:
    if offset < 0 or num_bytes < 0 or offset + num_bytes > payload_bytes:
        raise SyncRefused(
            f"{entry.piece}: got {what} at bytes {offset}…{offset + num_bytes - 1}, "
            f"expected them inside a payload of {payload_bytes} bytes"
        )


def _take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    if rows.device.type != "cpu":
        return rows.index_select(0, index.to(rows.device))
    return torch.from_numpy(rows.numpy().take(index.numpy(), axis=0))  # 3 × as fast as index_select


def _put(target: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """target[index] = rows, whole rows at a time, 4 × as fast as torch's indexing of bytes."""
    row = np.dtype((np.void, target.shape[1]))
    target.numpy().view(row)[index.numpy()] = rows.numpy().view(row)
