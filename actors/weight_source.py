"""The weight-sync hook: ZeRO-3 parameters → buckets of bounded size → the controller.

Owns the walk over a partitioned model; at any moment a process holds one bucket of whole parameters
(a parameter larger than a bucket, such as a layer's fused experts, goes alone). Knows nothing of who
stages the buckets; version checks, digests and the flip belong to rollout.sync.publication.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import ray
import torch
import torch.distributed as dist
from ray.actor import ActorHandle

from actors.trainer_model import full_shape, gathered, trained_parameters
from actors.transport import Receiver, Transport
from rollout.config import SyncConfig
from rollout.errors import LongrollError, SyncRefused
from rollout.fleet import Rendezvous, SyncReport
from rollout.sync.checkpoint_names import split_parameter
from rollout.sync.manifest import (
    BucketRef,
    TensorSpec,
    digest,
    dtype_name,
    plan_buckets,
    spec_of,
    torch_dtype,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")
NamedParameters = list[tuple[str, torch.nn.Parameter]]
NamedTensors = list[tuple[str, torch.Tensor]]


class ControllerReceiver:
    """The controller actor as a Receiver.

    Args:
        controller: Its handle.
        timeout_s: Longest wait for one call; more than the controller's own limits add up to, so that
            it is never taken for dead while it is still at it.
    """

    def __init__(self, controller: ActorHandle, timeout_s: float) -> None:
        self._controller = controller
        self._timeout_s = timeout_s

    def num_workers(self) -> int:
        num_workers: int = ray.get(self._controller.num_workers.remote(), timeout=self._timeout_s)
        return num_workers

    def open_transport(self, rendezvous: Rendezvous, world_size: int) -> None:
        ray.get(self._controller.open_transport.remote(rendezvous, world_size), timeout=self._timeout_s)

    def begin(self, version: int, specs: tuple[TensorSpec, ...]) -> None:
        ray.get(self._controller.begin_publish.remote(version, specs), timeout=self._timeout_s)

    def stage(self, ref: BucketRef) -> None:
        ray.get(self._controller.publish_bucket.remote(ref), timeout=self._timeout_s)

    def commit(self, version: int) -> SyncReport:
        report: SyncReport = ray.get(self._controller.commit_publish.remote(version), timeout=self._timeout_s)
        return report

    def abandon(self, version: int) -> None:
        ray.get(self._controller.abandon_publish.remote(version), timeout=self._timeout_s)


def parameter_buckets(module: torch.nn.Module, bucket_bytes: int) -> list[NamedParameters]:
    """Cut the parameters, in model order, into groups of at most `bucket_bytes` as trained."""
    parameters = dict(trained_parameters(module))
    specs = [
        TensorSpec(name=name, shape=tuple(full_shape(p)), dtype=dtype_name(p.dtype)) for name, p in parameters.items()
    ]
    plan = plan_buckets(specs, bucket_bytes)
    return [[(spec.name, parameters[spec.name]) for spec in bucket] for bucket in plan]


def checkpoint_tensors(bucket: NamedParameters) -> NamedTensors:
    """The checkpoint tensors of gathered parameters, as views."""
    return [piece for name, p in bucket for piece in split_parameter(name, p.data)]


def published_specs(module: torch.nn.Module, dtype: str) -> tuple[TensorSpec, ...]:
    """Every tensor a publication sends, in order, without gathering anything."""
    meta = [
        (name, torch.empty(full_shape(p), dtype=torch_dtype(dtype), device="meta"))
        for name, p in trained_parameters(module)
    ]
    return tuple(spec_of(*piece) for name, tensor in meta for piece in split_parameter(name, tensor))


def weights_digest(module: torch.nn.Module, bucket_bytes: int) -> str:
    """One digest over every checkpoint tensor, bucket by bucket. Collective; the same on every rank."""
    hasher = hashlib.blake2b(digest_size=16)
    for bucket in parameter_buckets(module, bucket_bytes):
        with gathered([p for _, p in bucket]):
            for name, tensor in checkpoint_tensors(bucket):
                hasher.update(f"{name} {digest(tensor)}\n".encode())
    return hasher.hexdigest()


class WeightSource:
    """Publishes a module that is partitioned over ranks. One instance on every rank.

    Args:
        module: The module being trained.
        dtype: Element type being served.
        config: Bucket size.
        receiver: Used on rank 0 only, which is the only one to send.
        transport: Carries the buckets to it; rank 0 as well.
    """

    def __init__(
        self, module: torch.nn.Module, dtype: str, config: SyncConfig, receiver: Receiver, transport: Transport
    ) -> None:
        self._module, self._dtype, self._config = module, dtype, config
        self._receiver, self._transport = receiver, transport
        self._is_sender = dist.get_rank() == 0
        self._device = next(module.parameters()).device

    def publish(self, version: int) -> SyncReport | None:
        """Gather, send and flip. Collective: every rank calls it and every rank leaves it together.

        Returns:
            The report on rank 0, None elsewhere.

        Raises:
            SyncRefused: On every rank; the publication was abandoned and the old version serves.
            EngineDead: On rank 0, when the flip itself failed half-way (see Publisher.commit).
        """
        specs = published_specs(self._module, self._dtype)
        self._together(version, self._transport.open)
        self._together(version, lambda: self._receiver.begin(version, specs))
        index = 0
        for bucket in parameter_buckets(self._module, self._config.bucket_bytes):
            with gathered([p for _, p in bucket]):
                for part in self._parts(bucket):
                    self._together(version, partial(self._send, version, index, part))
                    index += 1
        return self._together(version, lambda: self._receiver.commit(version))

    def _parts(self, bucket: NamedParameters) -> Iterator[NamedTensors]:
        """Pieces of at most one bucket each, so that what the transport holds is bounded as well."""
        pieces = dict(checkpoint_tensors(bucket))
        specs = [TensorSpec(name=n, shape=tuple(t.shape), dtype=self._dtype) for n, t in pieces.items()]
        for part in plan_buckets(specs, self._config.bucket_bytes):
            yield [(spec.name, pieces[spec.name]) for spec in part]

    def _send(self, version: int, index: int, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        dtype = torch_dtype(self._dtype)
        self._transport.send(version, index, [(name, tensor.to(dtype)) for name, tensor in tensors])

    def _together(self, version: int, action: Callable[[], T]) -> T | None:
        """Run an action on rank 0 and let every rank know whether it worked, so that none is left
        waiting in the next gather."""
        result: T | None = None
        fault: Exception | None = None
        if self._is_sender:
            try:
                result = action()
            except Exception as error:  # whatever it is, the other ranks must hear of it
                fault = error
        status = torch.tensor([0 if fault is None else 1], device=self._device)
        dist.broadcast(status, src=0)
        if not int(status):
            return result
        if fault is None:
            raise SyncRefused(f"version {version}: rank 0 could not publish it")
        self._abandon(version)
        if isinstance(fault, LongrollError):
            raise fault
        raise SyncRefused(f"version {version}: {type(fault).__name__}: {fault}") from fault

    def _abandon(self, version: int) -> None:
        try:
            self._receiver.abandon(version)
        except Exception:  # a receiver that dropped it already, or is gone; the first fault is what counts
            logger.info("abandoning version %d: the receiver had nothing to abandon, or is gone", version)
