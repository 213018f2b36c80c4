"""The sending side of a publication in one process: weights in, one bucket at a time out.

Owns the encoding of what a client publishes, and the memory of what it published last, against which
changes are found. A trainer of several ranks has senders of its own and does not come here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from rollout.errors import SyncRefused
from rollout.sync.delta import Change, compare, pack_bucket
from rollout.sync.encoding import Encoding, TensorPlan, encode
from rollout.sync.manifest import BucketRef, Piece, cut_piece, dtype_name, torch_dtype
from rollout.sync.segments import create

DEFAULT_BUCKET_BYTES = 64 * 2**20
SENDER = 0

Weights = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedVersion:
    """What was published last: uint8 [num_rows, row_bytes] of every tensor, on the CPU."""

    version: int
    rows: Mapping[str, torch.Tensor]


class OutgoingVersion:
    """All tensors of a version, to be read and sent once.

    Args:
        version: Version being published.
        weights: By checkpoint name, or (name, tensor) pairs in any order; a generator will do.
        plans: Encoding of every tensor of the model, by name.
        bucket_bytes: Largest payload of a bucket (a single row may exceed it).
        base: Version to send changes against; None sends every row.
        is_kept: Keep the encoded rows, for the next version to be sent as changes; costs their memory.
    """

    def __init__(
        self,
        version: int,
        weights: Weights,
        plans: Mapping[str, TensorPlan],
        bucket_bytes: int,
        base: PublishedVersion | None = None,
        is_kept: bool = False,
    ) -> None:
        self._version = version
        self._pairs = weights.items() if isinstance(weights, Mapping) else weights
        self._plans = plans
        self._bucket_bytes, self._base, self._is_kept = bucket_bytes, base, is_kept
        self._rows: dict[str, torch.Tensor] = {}

    @property
    def base(self) -> int | None:
        """Version that buckets are changes against."""
        return None if self._base is None else self._base.version

    @property
    def published(self) -> PublishedVersion | None:
        """What was sent, once it has been committed; None unless it was to be kept."""
        return PublishedVersion(version=self._version, rows=self._rows) if self._is_kept else None

    @property
    def pieces(self) -> tuple[tuple[int, Piece], ...]:
        """What will be sent, and by whom, as `begin` wants it."""
        return tuple((SENDER, piece) for plan in self._plans.values() for piece in self._pieces(plan))

    def send_everything(self) -> None:
        """Forget the base: it is not what is being served."""
        self._base = None

    def buckets(self, attempt: int) -> Iterator[BucketRef]:
        """Write one bucket after the other; the receiver of each unlinks it before the next is written.

        Args:
            attempt: What `begin` returned.

        Raises:
            SyncRefused: A tensor is not one of the model, comes twice, does not come, or has another
                shape or dtype than is served.
        """
        pending: list[Change] = []
        num_bytes = index = 0
        for change in self._changes():
            if pending and num_bytes + change.num_bytes > self._bucket_bytes:
                yield self._bucket(pending, attempt, index)
                pending, num_bytes, index = [], 0, index + 1
            pending.append(change)
            num_bytes += change.num_bytes
        if pending:
            yield self._bucket(pending, attempt, index)

    def _changes(self) -> Iterator[Change]:
        missing = dict.fromkeys(self._plans)
        for name, tensor in self._pairs:
            if name not in missing:
                fault = "sent twice" if name in self._plans else "not a tensor of the model being served"
                raise SyncRefused(f"version {self._version}: {name}: {fault}")
            del missing[name]
            plan = self._plans[name]
            rows = self._encoded(plan, tensor)
            if self._is_kept:
                self._rows[name] = rows
            for piece in self._pieces(plan):
                part = slice(piece.first_row, piece.first_row + piece.num_rows)
                yield compare(piece, rows[part], None if self._base is None else self._base.rows[name][part])
        if missing:
            raise SyncRefused(f"version {self._version}: {next(iter(missing))}: missing ({len(missing)} in all)")

    def _encoded(self, plan: TensorPlan, tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) != plan.shape:
            raise SyncRefused(f"{plan.name}: got shape {tuple(tensor.shape)}, expected {plan.shape}")
        if plan.encoding is Encoding.PLAIN and tensor.dtype != torch_dtype(plan.dtype):
            raise SyncRefused(f"{plan.name}: got dtype {dtype_name(tensor.dtype)}, expected {plan.dtype}")
        if not tensor.is_floating_point():
            raise SyncRefused(f"{plan.name}: got dtype {dtype_name(tensor.dtype)}, expected a floating-point one")
        rows = encode(tensor, plan).cpu()
        # The encoding of a plain tensor is a view of it, which its owner may change.
        return rows.clone() if self._is_kept else rows

    def _pieces(self, plan: TensorPlan) -> list[Piece]:
        whole = Piece(name=plan.name, first_row=0, num_rows=plan.num_rows)
        return cut_piece(whole, plan.row_bytes, self._bucket_bytes)

    def _bucket(self, changes: list[Change], attempt: int, index: int) -> BucketRef:
        ref, _ = pack_bucket(
            changes,
            version=self._version,
            attempt=attempt,
            base=self.base,
            sender=SENDER,
            index=index,
            allocate=create,
        )
        return ref
