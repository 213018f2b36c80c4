"""The worker's end of payloads that trainer ranks broadcast between GPUs.

A bucket arrives as one flat run of bytes from the rank that owns it, while its description travels by the
control line. It is received into fresh device memory (one bucket beyond what vLLM reckons with), on a
stream apart from the forward's, and then moved to the host, where the shadow lies. Calls come in threads
beside the engine's loop, so decoding goes on; waits are bounded, since in an expert-parallel group another
rank may be waiting for this one's forward. Knows nothing of shadows or versions.

NOT RUN on NCCL so far: tests drive this with a gloo communicator. In particular it is not known how
its kernels share a GPU with those of the expert-parallel collectives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from actors.vllm_plugin.link import Communicator, Link
from rollout.config import SyncConfig
from rollout.errors import SyncRefused
from rollout.fleet import Rendezvous
from rollout.sync.manifest import BucketRef

Connect = Callable[[Rendezvous, int, int], Communicator]


def join_group(rendezvous: Rendezvous, rank: int, world_size: int) -> Communicator:
    """Join the trainer's group with vLLM's NCCL; waits for all its ranks."""
    from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

    device = torch.accelerator.current_device_index()
    communicator: Communicator = stateless_init_process_group(
        rendezvous.host, rendezvous.rpc_port, rank, world_size, device
    )
    return communicator


def receive_payload(ref: BucketRef, device: torch.device, communicator: Communicator, stream: Any) -> torch.Tensor:
    """Take part in the broadcast of a bucket. Returns uint8 [ref.num_bytes] on the CPU, unchecked."""
    payload = torch.empty(ref.num_bytes, dtype=torch.uint8, device=device)
    if ref.num_bytes:
        communicator.broadcast(payload, src=ref.sender, stream=stream)
    return payload.cpu()


class BroadcastReceiver:
    """Receives buckets and hands them on. Safe to call from several threads; broadcasts run one at a time.

    Args:
        stage: Takes a bucket and its payload; what it raises is the answer to `receive`.
        device: Where broadcasts arrive.
        timeout_s: Longest wait for the group, and for one broadcast.
        connect: Joins a group as (rendezvous, rank, world size).
    """

    def __init__(
        self,
        stage: Callable[[BucketRef, torch.Tensor], None],
        device: torch.device,
        timeout_s: float = SyncConfig.timeout_s,
        connect: Connect = join_group,
    ) -> None:
        self._stage, self._device, self._timeout_s, self._connect = stage, device, timeout_s, connect
        self._link: Link | None = None
        self._lock = threading.Lock()

    def join(self, rendezvous: Rendezvous, rank: int, world_size: int) -> None:
        """Join a group and leave an earlier one.

        Args:
            rendezvous: Where trainer rank 0 waits.
            rank: Of this worker in the group: the trainer's ranks come first.
            world_size: All trainer ranks and all workers of all shards.

        Raises:
            SyncRefused: It could not be joined in time.
        """
        self.close()
        link = Link(partial(self._connect, rendezvous, rank, world_size), self._device)
        self._link = link
        self._wait(link, link.connected, f"weight transport of {world_size} ranks")

    def receive(self, ref: BucketRef) -> None:
        """Take part in the broadcast of a bucket and hand it on.

        Raises:
            SyncRefused: Nobody has opened the group, or the broadcast failed or did not end in time, after
                which the group is closed, as it is out of step; or what `stage` raises.
        """
        with self._lock:
            link = self._link
            if link is None:
                raise SyncRefused("weight transport: nobody has opened it")
            payload = self._wait(link, link.run(partial(receive_payload, ref, self._device)), str(ref))
        self._stage(ref, payload)

    def close(self) -> None:
        """Abort what is under way and leave the group."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _wait(self, link: Link, future: Future[Any], what: str) -> Any:
        try:
            return future.result(self._timeout_s)
        except Exception as error:
            link.close()
            if isinstance(error, SyncRefused):
                raise
            if isinstance(error, TimeoutError) and not future.done():
                raise SyncRefused(f"{what}: no end within {self._timeout_s:g} s") from None
            raise SyncRefused(f"{what}: {type(error).__name__}: {error}") from error
