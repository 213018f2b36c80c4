"""What a weight version consists of: rows of tensors, owned piecewise by senders, that travel in buckets.

Owns the records that cross processes and the digest everybody uses. Knows nothing of where buckets
travel, who receives them, or what the bytes of a row mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields

import torch
import xxhash

from rollout.errors import SyncRefused

ALIGNMENT_BYTES = 16
MAX_FAULTS_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name in the checkpoint, shape, and dtype as in "float32"."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * torch_dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows [first_row, first_row + num_rows) of a tensor, which one sender owns and sends whole."""

    name: str
    first_row: int
    num_rows: int

    def __str__(self) -> str:
        return f"{self.name} rows {self.first_row}…{self.first_row + self.num_rows - 1}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a bucket says of one piece.

    Attributes:
        name, first_row, num_rows: The piece.
        num_changed: Rows that travel.
        digest: XXH3-128 of ALL rows of the piece in the new version, in order.
        mask_offset: First byte in the payload of the mask of changed rows, one bit a row (row i is bit
            i % 8 of byte i // 8); None if all rows travel. No mask travels if no row does.
        rows_offset: First byte in the payload of the rows that travel, in order.
    """

    name: str
    first_row: int
    num_rows: int
    num_changed: int
    digest: str
    mask_offset: int | None
    rows_offset: int

    @property
    def piece(self) -> Piece:
        return Piece(name=self.name, first_row=self.first_row, num_rows=self.num_rows)

    @property
    def num_mask_bytes(self) -> int:
        return 0 if self.mask_offset is None or self.num_changed == 0 else -(-self.num_rows // 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketRef:
    """A bucket that its sender has described, and how every shard gets it.

    Attributes:
        version: Version the bucket belongs to.
        attempt: Number of the publication attempt, as Publisher.begin gave it to the senders.
        base: Version whose rows those that do not travel are taken from; None for a full bucket.
        sender: Which sender made it.
        index: Its number among the buckets of its sender.
        segment: Name of the shared-memory segment with its payload; None for one that its sender
            broadcasts while this record travels.
        num_bytes: Bytes of the payload: masks and rows that travel, with padding for alignment.
        entries: Its pieces.
    """

    version: int
    attempt: int
    base: int | None
    sender: int
    index: int
    segment: str | None
    num_bytes: int
    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        return f"bucket {self.index} of sender {self.sender}, version {self.version}"

    def to_json(self) -> str:
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        return json.dumps(record | {"entries": [astuple(entry) for entry in self.entries]})

    @classmethod
    def from_json(cls, text: str) -> BucketRef:
        """Raises ValueError, KeyError or TypeError for what `to_json` did not write."""
        record = json.loads(text)
        names = [f.name for f in fields(Entry)]
        entries = tuple(Entry(**dict(zip(names, entry, strict=True))) for entry in record["entries"])
        return cls(**(record | {"entries": entries}))


def torch_dtype(name: str) -> torch.dtype:
    """ "float32" → torch.float32. Raises ValueError for a name torch does not have."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: got {name!r}, expected the name of a torch dtype")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name=name, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype))


def digest(tensor: torch.Tensor) -> str:
    """XXH3-128 of the bytes of a tensor (moved to the CPU if it is not there), read in place.

    It finds faults (a torn write, a wrong row, a lost bucket), not attackers: it has no key and
    collisions can be made on purpose. Whoever can write the buckets is trusted with the weights.
    """
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return xxhash.xxh3_128_hexdigest(flat.numpy())


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def plan_buckets(specs: Iterable[TensorSpec], bucket_bytes: int) -> list[tuple[TensorSpec, ...]]:
    """Cut tensors, in order, into buckets of at most `bucket_bytes` (a larger tensor goes alone).

    Args:
        specs: Tensors in the order of sending.
        bucket_bytes: Limit in bytes, > 0; alignment padding counts.
    """
    buckets: list[tuple[TensorSpec, ...]] = []
    current: list[TensorSpec] = []
    size = 0
    for spec in specs:
        need = aligned(spec.num_bytes)
        if current and size + need > bucket_bytes:
            buckets.append(tuple(current))
            current, size = [], 0
        current.append(spec)
        size += need
    if current:
        buckets.append(tuple(current))
    return buckets


def cut_piece(piece: Piece, row_bytes: int, bucket_bytes: int) -> list[Piece]:
    """Cut a piece into pieces of at most `bucket_bytes` of rows each (one row, if a row is longer)."""
    step = max(1, bucket_bytes // row_bytes)
    end = piece.first_row + piece.num_rows
    return [
        Piece(name=piece.name, first_row=first, num_rows=min(step, end - first))
        for first in range(piece.first_row, end, step)
    ]


def check_tiling(num_rows: Mapping[str, int], pieces: Iterable[Piece]) -> None:
    """Refuse pieces that do not cover every row of every tensor exactly once.

    Args:
        num_rows: Rows of every tensor being served, by name.
        pieces: In any order.

    Raises:
        SyncRefused: With the first few faults: names unknown, rows missing, sent twice or out of range.
    """
    faults: list[str] = []
    by_name: dict[str, list[Piece]] = {name: [] for name in num_rows}
    for piece in pieces:
        if piece.name not in by_name:
            faults.append(f"{piece.name}: not a tensor of the model being served")
        else:
            by_name[piece.name].append(piece)
    for name, owned in by_name.items():
        faults += tiling_faults(name, num_rows[name], owned)
    if faults:
        raise SyncRefused("publication refused: " + some_of(faults))


def tiling_faults(name: str, num_rows: int, pieces: Sequence[Piece]) -> list[str]:
    """What keeps pieces of one tensor from covering rows [0, num_rows) exactly once; [] if nothing does."""
    faults = []
    end = 0
    for piece in sorted(pieces, key=lambda p: (p.first_row, p.num_rows)):
        last = piece.first_row + piece.num_rows
        if piece.num_rows < 1 or piece.first_row < 0 or last > num_rows:
            faults.append(f"{name}: got rows {piece.first_row}…{last - 1}, expected some of 0…{num_rows - 1}")
            continue
        if piece.first_row > end:
            faults.append(f"{name}: rows {end}…{piece.first_row - 1} missing")
        elif piece.first_row < end:
            faults.append(f"{name}: rows {piece.first_row}…{min(end, last) - 1} sent twice")
        end = max(end, last)
    if end < num_rows:
        faults.append(f"{name}: rows {end}…{num_rows - 1} missing")
    return faults


def some_of(faults: Sequence[str]) -> str:
    """The first few of many faults, for an error message."""
    more = len(faults) - MAX_FAULTS_NAMED
    return "; ".join(faults[:MAX_FAULTS_NAMED]) + (f" (and {more} more)" if more > 0 else "")
