"""How a bucket gets from the trainer's rank 0 to every shard: shared memory, or broadcasts by NCCL.

Both carry the same protocol, whose control messages go to the controller. A transport returns from
`send` only when every shard has checked the bucket. Knows nothing of ZeRO or of other ranks.

NCCL itself has not been run here (no GPUs): tests put a gloo communicator in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from typing import Any, Protocol

import torch

from actors.background import in_background
from actors.ports import free_port
from actors.vllm_plugin.link import SENDER, Communicator, Link
from rollout.config import SyncConfig
from rollout.errors import InvalidRequest, SyncRefused
from rollout.fleet import Rendezvous, SyncReport
from rollout.sync.manifest import BucketRef, TensorSpec, digest, spec_of
from rollout.sync.segments import unlink, write_bucket

NamedTensors = Sequence[tuple[str, torch.Tensor]]


class Receiver(Protocol):
    """Where a publication goes; every call returns when it is done, or raises."""

    def num_workers(self) -> int: ...

    def open_transport(self, rendezvous: Rendezvous, world_size: int) -> None: ...

    def begin(self, version: int, specs: tuple[TensorSpec, ...]) -> None: ...

    def stage(self, ref: BucketRef) -> None: ...

    def commit(self, version: int) -> SyncReport: ...

    def abandon(self, version: int) -> None: ...


class Transport(Protocol):
    """Carries buckets. Used by rank 0 only."""

    def open(self) -> None:
        """Be ready for a publication; does nothing when it is."""

    def send(self, version: int, index: int, tensors: NamedTensors) -> None:
        """Carry one bucket to every shard; the tensors may change once it returns or raises."""


class SharedMemoryTransport:
    """Buckets in /dev/shm, read by all shards of this host.

    Args:
        receiver: Hears of every bucket.
    """

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def open(self) -> None:
        """Nothing to connect."""

    def send(self, version: int, index: int, tensors: NamedTensors) -> None:
        ref = write_bucket(version, index, tensors)
        try:
            self._receiver.stage(ref)
        finally:
            unlink(ref)


def join_as_sender(rendezvous: Rendezvous, world_size: int) -> Communicator:
    """Open the trainer's end with vLLM's NCCL; waits for all workers."""
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    communicator: Communicator = trainer_init(
        {"master_address": rendezvous.host, "master_port": rendezvous.rpc_port, "world_size": world_size}, rank=SENDER
    )
    return communicator


class NcclTransport:
    """Broadcasts from this process to every worker of every shard.

    The group is opened at the first publication and kept. A fault of any kind closes it, as nobody
    knows which ranks are still in step, and the next publication opens another one.

    Args:
        receiver: Hears of every bucket, while the bucket is broadcast.
        host: Address of this process's node, as the shards reach it.
        device: What is broadcast lies there.
        timeout_s: Longest wait for the group to open, and for one bucket.
        join: Opens this end of a group.
    """

    def __init__(
        self,
        receiver: Receiver,
        host: str,
        device: torch.device,
        timeout_s: float,
        join: Callable[[Rendezvous, int], Communicator] = join_as_sender,
    ) -> None:
        self._receiver, self._host, self._device, self._timeout_s = receiver, host, device, timeout_s
        self._join = join
        self._link: Link | None = None

    def open(self) -> None:
        if self._link is not None:
            return
        world_size = 1 + self._receiver.num_workers()
        rendezvous = Rendezvous(host=self._host, rpc_port=free_port())
        link = Link(partial(self._join, rendezvous, world_size), self._device)
        workers = in_background("longroll-open", partial(self._receiver.open_transport, rendezvous, world_size))
        try:
            self._await_both(workers, link.connected, f"transport of {world_size} ranks")
        except BaseException:
            link.close()
            raise
        self._link = link

    def send(self, version: int, index: int, tensors: NamedTensors) -> None:
        if self._link is None:
            raise SyncRefused(f"version {version}: the transport is not open")
        payload = [(name, tensor.detach().to(self._device).contiguous()) for name, tensor in tensors]
        ref = BucketRef(
            version=version,
            index=index,
            segment=None,
            tensors=tuple(spec_of(name, tensor) for name, tensor in payload),
            offsets=(),
            digests=tuple(digest(tensor) for _, tensor in payload),  # waits for the stream that made them
        )
        try:
            staged = in_background("longroll-stage", partial(self._receiver.stage, ref))
            sent = self._link.run(partial(_broadcast, [tensor for _, tensor in payload]))
            self._await_both(staged, sent, f"bucket {index} of version {version}")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave the group; the next `open` makes another one."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _await_both(self, control: Future[Any], data: Future[Any], what: str) -> None:
        """Both must succeed in time; the first fault ends the wait."""
        done, late = wait((control, data), timeout=self._timeout_s, return_when=FIRST_EXCEPTION)
        for future in (control, data):  # the shards know more about a fault than a broadcast does
            if future in done:
                future.result()
        if late:
            who = " and ".join(n for n, f in (("the shards", control), ("the broadcast", data)) if f in late)
            raise SyncRefused(f"{what}: {who} did not finish within sync.timeout_s = {self._timeout_s:g} s")


def _broadcast(tensors: list[torch.Tensor], communicator: Communicator, stream: Any) -> None:
    for tensor in tensors:
        if tensor.numel():
            communicator.broadcast(tensor.view(-1).view(torch.uint8), src=SENDER, stream=stream)


def make_transport(config: SyncConfig, receiver: Receiver, host: str, device: torch.device) -> Transport:
    """The transport of the configuration; the one place that chooses.

    Raises:
        InvalidRequest: NCCL for a trainer without CUDA.
    """
    if config.transport == "shared_memory":
        return SharedMemoryTransport(receiver)
    if device.type != "cuda":
        raise InvalidRequest("sync.transport", config.transport, f"shared_memory: the trainer is on {device.type}")
    return NcclTransport(receiver, host, device, config.timeout_s)
