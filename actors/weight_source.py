"""The weight-sync hook: what each trainer rank holds → its encoded rows → the controller.

Each rank encodes its own part of the model and sends it itself, as the rows that changed since the version
it last had committed. Owns the order of a publication on the trainer's side and what a failure means for
the next one. Knows nothing of who stages the rows; checks and the flip belong to rollout.sync.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from functools import partial

import torch

from actors.kept_rows import KeptRows
from actors.local_weights import LocalWeights
from actors.rank_group import RankGroup
from actors.trainer_model import full_shape, gathered, trained_parameters
from actors.transport import Outgoing, Transport
from actors.weight_receiver import Receiver
from rollout.config import SyncConfig
from rollout.fleet import SyncReport
from rollout.sync.checkpoint_names import split_parameter
from rollout.sync.delta import compare, pack_bucket
from rollout.sync.encoding import TensorPlan
from rollout.sync.manifest import BucketRef, TensorSpec, digest, dtype_name, plan_buckets

logger = logging.getLogger(__name__)


class WeightSource:
    """Publishes a module that is partitioned over ranks. One instance on every rank, kept between publications.

    Args:
        module: The module being trained.
        plans: Encoding of every tensor that is served.
        config: Bucket size.
        receiver: Where publications go; rank 0 leads, every rank sends its own buckets.
        transport: Carries them.
        ranks: All trainer ranks.
        replicated: What goes with it, whole and equal on all ranks, by the names it is served under.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        plans: Mapping[str, TensorPlan],
        config: SyncConfig,
        receiver: Receiver,
        transport: Transport,
        ranks: RankGroup,
        replicated: Mapping[str, torch.nn.Parameter] | None = None,
    ) -> None:
        self._weights = LocalWeights(module, plans, ranks, config.bucket_bytes, replicated)
        self._plans, self._receiver, self._transport, self._ranks = plans, receiver, transport, ranks
        self._kept: KeptRows | None = None  # of the last version committed
        self._base: int | None = None  # that version; None when what the shards hold is not certain

    def publish(self, version: int) -> SyncReport | None:
        """Encode, send and flip. Collective: every rank calls it and every rank leaves it together.

        Returns:
            The report on rank 0, None elsewhere.

        Raises:
            SyncRefused: On every rank, with the first fault of any; the old version serves. Weights that are
                not finite are found before anything is sent.
            EngineDead: On every rank, when the flip itself failed half-way.
        """
        what = f"version {version}"
        self._ranks.together(what, self._weights.check_finite)
        self._weights.exchange_loans()
        self._transport.open()
        base = self._usable_base(what)
        kept = self._kept
        if base is None or kept is None:
            kept = KeptRows(self._weights.buckets, self._plans, self._transport.allocate)
        pending: list[tuple[BucketRef, torch.Tensor]] = []
        try:
            attempt = self._begin(version, base)
            if base is None:
                buckets = self._full(kept, version, attempt)
            else:
                buckets = self._deltas(kept, version, attempt, base, pending)
            fault = self._transport.send(buckets)
            if fault is not None:
                self._abandon(version)  # now, so that the other ranks stop as well
            self._ranks.agree(what, fault)
            report = self._ranks.together(what, partial(self._receiver.commit, version), on=0)
        except BaseException:
            self._base = None
            if kept is not self._kept:
                kept.release()
            if self._ranks.rank == 0:
                self._abandon(version)
            raise
        for ref, payload in pending:
            kept.advance(ref, payload)
        if self._kept is not None and self._kept is not kept:
            self._kept.release()
        self._kept, self._base = kept, version
        self._remember(version)
        return report

    def release(self) -> None:
        """Give up what is kept; the next publication sends everything. Not collective."""
        if self._kept is not None:
            self._kept.release()
        self._kept = self._base = None

    def _usable_base(self, what: str) -> int | None:
        """The version to send changes against: the one kept, if it is what the shards serve."""
        if self._base is None:
            return None
        live = self._ranks.gather(self._ranks.together(what, self._receiver.live_version, on=0))[0]
        return self._base if live == self._base else None

    def _begin(self, version: int, base: int | None) -> int:
        pieces = self._weights.division.pieces
        begin = partial(self._receiver.begin, version, base, pieces)
        attempt = self._ranks.together(f"version {version}", begin, on=0)
        return self._ranks.gather_numbers(attempt or 0)[0]

    def _full(self, kept: KeptRows, version: int, attempt: int) -> Iterator[Outgoing]:
        """Encode every bucket straight into what is sent and kept."""
        for bucket in self._weights.buckets:
            for share, rows in zip(bucket, kept.add(), strict=True):
                self._weights.encode(share, rows)
            ref, payload = kept.seal(version=version, attempt=attempt, sender=self._ranks.rank)
            yield Outgoing(ref=ref, payload=payload, is_kept=True)

    def _deltas(
        self, kept: KeptRows, version: int, attempt: int, base: int, pending: list[tuple[BucketRef, torch.Tensor]]
    ) -> Iterator[Outgoing]:
        """Encode every bucket aside and pack the rows that differ from those kept."""
        scratch = kept.scratch()
        for index, bucket in enumerate(self._weights.buckets):
            changes = []
            for share, old, new in zip(bucket, kept.rows(index), kept.rows(index, scratch), strict=True):
                self._weights.encode(share, new)
                changes.append(compare(share.piece, new, old))
            ref, payload = pack_bucket(
                changes,
                version=version,
                attempt=attempt,
                base=base,
                sender=self._ranks.rank,
                index=index,
                allocate=self._transport.allocate,
            )
            pending.append((ref, payload))
            yield Outgoing(ref=ref, payload=payload, is_kept=False)

    def _remember(self, version: int) -> None:
        """Tell where all bytes can be had, if they lie in segments."""
        assert self._kept is not None, "a version has just been committed"
        refs = [ref for mine in self._ranks.gather(self._kept.refs) for ref in mine]
        if self._ranks.rank != 0 or any(ref.segment is None for ref in refs):
            return
        try:
            self._receiver.remember(version, refs)
        except Exception as error:  # the version is live all the same; a late shard then has to wait for the next
            logger.warning("version %d: the receiver does not remember its snapshot: %s", version, error)

    def _abandon(self, version: int) -> None:
        try:
            self._receiver.abandon(version)
        except Exception:  # a receiver that dropped it already, or is gone; the first fault is what counts
            logger.info("abandoning version %d: the receiver had nothing to abandon, or is gone", version)


def weights_digest(module: torch.nn.Module, bucket_bytes: int) -> str:
    """One digest over every checkpoint tensor, bucket by bucket. Collective; the same on every rank."""
    parameters = dict(trained_parameters(module))
    specs = [
        TensorSpec(name=name, shape=tuple(full_shape(p)), dtype=dtype_name(p.dtype)) for name, p in parameters.items()
    ]
    hasher = hashlib.blake2b(digest_size=16)
    for bucket in plan_buckets(specs, bucket_bytes):
        with gathered([parameters[spec.name] for spec in bucket]):
            for spec in bucket:
                for name, tensor in split_parameter(spec.name, parameters[spec.name].data):
                    hasher.update(f"{name} {digest(tensor)}\n".encode())
    return hasher.hexdigest()
