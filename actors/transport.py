"""How buckets get from the trainer's ranks to every shard: shared memory, Ray's object store, or NCCL.

All carry the same protocol, whose control messages go to the controller. Shared memory serves one host;
the object store any hosts, with or without GPUs; NCCL broadcasts between GPUs. Knows nothing of ZeRO, of
what the bytes mean, or of when a version is live.

NCCL itself has not been run here (no GPUs): tests put a gloo communicator in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import ray
import torch

from actors.background import in_background
from actors.ports import free_port
from actors.rank_group import Fault, RankGroup
from actors.vllm_plugin.link import Communicator, Link
from actors.weight_receiver import Receiver
from rollout.config import SyncConfig
from rollout.errors import InvalidRequest, SyncRefused
from rollout.fleet import Rendezvous
from rollout.sync import segments
from rollout.sync.delta import Allocate, in_memory
from rollout.sync.manifest import BucketRef

MAX_IN_FLIGHT = 4
"""Buckets of one rank on their way at once: a shard answers bucket by bucket."""
DYING_WORDS_S = 2.0  # after a fault: how long buckets under way may tell of an earlier one that caused it


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A bucket that is ready to be sent.

    Attributes:
        ref: Its description.
        payload: uint8 [ref.num_bytes] on the CPU.
        is_kept: Whether its segment stays for as long as the sender wants; otherwise it goes once it was sent.
    """

    ref: BucketRef
    payload: torch.Tensor
    is_kept: bool


class Transport(Protocol):
    """Carries the buckets of one rank; the same kind on every rank."""

    @property
    def allocate(self) -> Allocate:
        """Makes the buffers of payloads."""

    def open(self) -> None:
        """Be ready for a publication; does nothing when it is. Collective over the trainer's ranks.

        Raises:
            LongrollError: On every rank alike.
        """

    def send(self, buckets: Iterator[Outgoing]) -> Fault | None:
        """Carry buckets to every shard while the iterator makes the next ones. Called on every rank.

        Returns:
            None once every shard has checked every bucket of this rank; otherwise the first fault, be it the
            iterator's. What may still be under way then is for the receiver to ignore.
        """


class StagingTransport:
    """Sends each bucket with one call, a few at once.

    Args:
        stage: Makes the call, and returns when every shard has the bucket.
        allocate: Makes the buffers of payloads.
    """

    def __init__(self, stage: Callable[[Outgoing], None], allocate: Allocate) -> None:
        self._stage, self._allocate = stage, allocate

    @property
    def allocate(self) -> Allocate:
        return self._allocate

    def open(self) -> None:
        """Nothing to connect."""

    def send(self, buckets: Iterator[Outgoing]) -> Fault | None:
        under_way: set[Future[Fault | None]] = set()
        faults: list[Fault] = []
        try:
            for bucket in buckets:
                under_way.add(in_background("longroll-stage", partial(self._try, bucket)))
                if len(under_way) >= MAX_IN_FLIGHT:
                    wait(under_way, return_when=FIRST_COMPLETED)
                done = {future for future in under_way if future.done()}
                under_way -= done
                faults += [fault for future in done if (fault := future.result()) is not None]
                if faults:
                    break
        except Exception as error:  # of the encoder; whatever it is, the other ranks must hear of it
            faults.append(Fault(error=error))
        done, _ = wait(under_way, timeout=DYING_WORDS_S if faults else None)
        faults += [fault for future in done if (fault := future.result()) is not None]
        return min(faults, key=lambda fault: fault.at, default=None)

    def _try(self, bucket: Outgoing) -> Fault | None:
        try:
            self._stage(bucket)
        except Exception as error:  # belongs to whoever waits for it, with the time at which it happened
            return Fault(error=error)
        finally:
            if not bucket.is_kept:
                segments.unlink(bucket.ref)
        return None


def shared_memory_transport(receiver: Receiver) -> StagingTransport:
    """Payloads in /dev/shm, read in place by all shards of this host."""
    return StagingTransport(lambda bucket: receiver.stage(bucket.ref), segments.create)


def object_store_transport(receiver: Receiver) -> StagingTransport:
    """Payloads in Ray's object store; each host that has shards fetches them once."""

    def stage(bucket: Outgoing) -> None:
        # In a tuple: of an argument that is a reference itself, Ray would hand on the bytes.
        receiver.stage(bucket.ref, (ray.put(bucket.payload.numpy()),))

    return StagingTransport(stage, in_memory)


def join_as_sender(rendezvous: Rendezvous, world_size: int, rank: int) -> Communicator:
    """Open a trainer rank's end with vLLM's NCCL; waits for all other ranks and all workers."""
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    communicator: Communicator = trainer_init(
        {"master_address": rendezvous.host, "master_port": rendezvous.rpc_port, "world_size": world_size}, rank=rank
    )
    return communicator


class NcclTransport:
    """Broadcasts from each trainer rank to every worker of every shard, in one group.

    The group has the trainer's ranks first, then all workers. A broadcast is an act of the whole group, so
    buckets are sent one after the other, rank by rank, and ranks that do not send take part; meanwhile they
    encode their next ones. The group is opened at the first publication and kept. A fault of any kind closes
    it, as nobody knows which ranks are still in step, and the next publication opens another one.

    Args:
        receiver: Hears of every bucket, while the bucket is broadcast.
        ranks: All trainer ranks.
        host: Address of this process's node, as the shards reach it.
        device: What is broadcast lies there.
        timeout_s: Longest wait for the group to open, and for one bucket.
        join: Opens this end of a group.
    """

    def __init__(
        self,
        receiver: Receiver,
        ranks: RankGroup,
        host: str,
        device: torch.device,
        timeout_s: float,
        join: Callable[[Rendezvous, int, int], Communicator] = join_as_sender,
    ) -> None:
        self._receiver, self._ranks, self._host, self._device = receiver, ranks, host, device
        self._timeout_s, self._join = timeout_s, join
        self._link: Link | None = None

    @property
    def allocate(self) -> Allocate:
        return in_memory

    def open(self) -> None:
        what = "weight transport"
        if not any(self._ranks.gather_numbers(self._link is None)):
            return
        self.close()
        place = self._ranks.together(what, self._place, on=0)
        rendezvous, world_size = self._ranks.gather(place)[0] or (None, 0)
        assert rendezvous is not None, "rank 0 has just said where"
        self._together(what, partial(self._open, rendezvous, world_size))

    def send(self, buckets: Iterator[Outgoing]) -> Fault | None:
        try:
            upcoming = self._ranks.together("encoding", partial(next, buckets, None))
            while any(sizes := self._sizes(upcoming)):
                # Until it is done, the main thread encodes and leaves every collective to this one.
                sent = in_background("longroll-round", partial(self._send_round, upcoming, sizes))
                fault = None
                try:
                    upcoming = next(buckets, None)
                except Exception as error:  # of the encoder
                    fault = Fault(error=error)
                sent.result()
                self._ranks.agree("encoding", fault)
        except Exception as error:  # the same on every rank
            self.close()
            return Fault(error=error)
        return None

    def close(self) -> None:
        """Leave the group; the next `open` makes another one."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _place(self) -> tuple[Rendezvous, int]:
        world_size = self._ranks.size + self._receiver.num_workers()
        return Rendezvous(host=self._host, rpc_port=free_port()), world_size

    def _open(self, rendezvous: Rendezvous, world_size: int) -> None:
        self._link = Link(partial(self._join, rendezvous, world_size, self._ranks.rank), self._device)
        parties: dict[str, Future[Any]] = {"the trainer": self._link.connected}
        if self._ranks.rank == 0:
            call = partial(self._receiver.open_transport, rendezvous, world_size)
            parties = {"the shards": in_background("longroll-open", call), **parties}
        self._await(parties, f"transport of {world_size} ranks")

    def _sizes(self, upcoming: Outgoing | None) -> list[int]:
        """Bytes that each rank sends in this round, plus one; 0 where it has nothing left."""
        return self._ranks.gather_numbers(0 if upcoming is None else upcoming.ref.num_bytes + 1)

    def _send_round(self, mine: Outgoing | None, sizes: list[int]) -> None:
        for sender, size in enumerate(sizes):
            if size:
                bucket = mine if sender == self._ranks.rank else None
                self._ranks.together("broadcast", partial(self._broadcast, sender, size - 1, bucket))

    def _broadcast(self, sender: int, num_bytes: int, mine: Outgoing | None) -> None:
        if self._link is None:
            raise SyncRefused("weight transport: got one that is not open")
        if mine is None:
            payload = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        else:
            payload = mine.payload.to(self._device)
        parties: dict[str, Future[Any]] = {}
        if mine is not None:
            parties["the shards"] = in_background("longroll-stage", partial(self._receiver.stage, mine.ref))
        if num_bytes:
            parties["the broadcast"] = self._link.run(partial(_broadcast, payload, sender))
        self._await(parties, str(mine.ref) if mine else f"a bucket of sender {sender}")

    def _together(self, what: str, action: Callable[[], None]) -> None:
        try:
            self._ranks.together(what, action)
        except BaseException:
            self.close()
            raise

    def _await(self, parties: dict[str, Future[Any]], what: str) -> None:
        """All must succeed in time; the first fault ends the wait."""
        done, late = wait(parties.values(), timeout=self._timeout_s, return_when=FIRST_EXCEPTION)
        for future in parties.values():  # the shards, who come first, know more about a fault than a broadcast does
            if future in done:
                future.result()
        if late:
            who = " and ".join(name for name, future in parties.items() if future in late)
            raise SyncRefused(f"{what}: {who} did not finish within sync.timeout_s = {self._timeout_s:g} s")


def _broadcast(payload: torch.Tensor, sender: int, communicator: Communicator, stream: Any) -> None:
    communicator.broadcast(payload, src=sender, stream=stream)


def make_transport(
    config: SyncConfig, receiver: Receiver, ranks: RankGroup, host: str, device: torch.device
) -> Transport:
    """The transport of the configuration; the one place that chooses.

    Raises:
        InvalidRequest: NCCL for a trainer without CUDA.
    """
    if config.transport == "shared_memory":
        return shared_memory_transport(receiver)
    if config.transport == "object_store":
        return object_store_transport(receiver)
    if device.type != "cuda":
        expected = f"shared_memory or object_store: the trainer is on {device.type}"
        raise InvalidRequest("sync.transport", config.transport, expected)
    return NcclTransport(receiver, ranks, host, device, config.timeout_s)
