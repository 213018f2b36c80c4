"""Staging of weights that the trainer broadcasts between GPUs.

A worker must not wait for a broadcast in the engine's loop: in an expert-parallel group another
worker may be inside a forward pass that waits for this one's, and would never reach the broadcast.
So a bucket is received and checked in a background thread, on a stream of its own, while the engine
goes on; `stage` starts that and `stage_outcome` tells how it went. Joining the group works alike.

All tensors of a bucket are received into fresh device memory (one bucket beyond what vLLM reckons
with), and only then moved to the host and hashed, so that no collective waits for a hash. What this
rank needs stays in host memory until the flip: the hash has brought it there anyway, and a second
copy of the weights does not fit beside the KV cache. BLAKE2b does 0.6-1 GB/s on one core, so a model
of 470 GB takes every worker, and the sender before it, 8 to 13 minutes a publication.

NOT RUN on NCCL so far: tests drive this with a gloo communicator. In particular it is not known how
its kernels share a GPU with those of the expert-parallel collectives.
"""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_process_group

from actors.vllm_plugin.link import SENDER, Communicator, Link
from actors.vllm_plugin.weights import Outcome, StagedWeightEngine
from rollout.errors import SyncRefused
from rollout.sync.manifest import BucketRef, digest, torch_dtype


def receive(
    ref: BucketRef, device: torch.device, communicator: Communicator, stream: Any
) -> list[tuple[str, torch.Tensor]]:
    """Take part in the broadcasts of a bucket and check every digest.

    Returns:
        (checkpoint name, tensor on the CPU), in order.

    Raises:
        SyncRefused: With the first tensor that differs, after all broadcasts, so that the group stays in step.
    """
    arrived = [torch.empty(spec.num_bytes, dtype=torch.uint8, device=device) for spec in ref.tensors]
    for flat in arrived:
        if flat.numel():
            communicator.broadcast(flat, src=SENDER, stream=stream)
    tensors = []
    for spec, flat, expected in zip(ref.tensors, arrived, ref.digests, strict=True):
        host = flat.cpu()
        got = digest(host)
        if got != expected:
            raise SyncRefused(
                f"bucket {ref.index} of version {ref.version}, {spec.name}: got digest {got}, expected {expected}"
            )
        tensors.append((spec.name, host.view(torch_dtype(spec.dtype)).view(spec.shape)))
    return tensors


class NcclWeightEngine(StagedWeightEngine):
    """Worker side of a publication by broadcast; takes buckets in shared memory as well.

    Only the engine's loop touches its state; the background threads own nothing but their tensors.
    """

    init_info_cls = NCCLWeightTransferInitInfo

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self._link: Link | None = None
        self._receiving: Future[list[tuple[str, torch.Tensor]]] | None = None

    def connect(self, init_info: NCCLWeightTransferInitInfo) -> Communicator:
        """Join the trainer's group; waits for all its ranks."""
        communicator: Communicator = worker_init_process_group(init_info, self.parallel_config)
        return communicator

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Begin to join; `transport_outcome` tells when that is done. An earlier group is left."""
        self.shutdown()
        self._link = Link(partial(self.connect, init_info), self.device)

    def transport_outcome(self) -> Outcome:
        if self._link is None:
            return True, "weight transport: nobody has opened it"
        connected = self._link.connected
        if not connected.done():
            return False, None
        error = connected.exception()
        return True, None if error is None else f"weight transport: {_said(error)}"

    def stage(self, ref: BucketRef) -> Outcome:
        if ref.segment is not None:
            return super().stage(ref)
        self._adopt(ref.version)
        try:
            if self._receiving is not None:
                raise SyncRefused(f"bucket {ref.index} of version {ref.version}: the one before it is still arriving")
            if self._link is None:
                raise SyncRefused("weight transport: nobody has opened it")
            self._receiving = self._link.run(partial(receive, ref, self.device))
        except SyncRefused as fault:
            self.drop(ref.version)
            return True, str(fault)
        return False, None

    def stage_outcome(self, version: int) -> Outcome:
        if version != self._version:
            return True, f"version {version}: it was dropped"
        if self._receiving is None:
            return True, None
        if not self._receiving.done():
            return False, None
        received, self._receiving = self._receiving, None
        error = received.exception()
        if error is not None:
            self.drop(version)
            return True, _said(error)
        self._staged.update((name, tensor) for name, tensor in received.result() if self._needs(name))
        return True, None

    def _adopt(self, version: int) -> None:
        if version != self._version and self._version is not None:
            self.drop(self._version)
        super()._adopt(version)

    def drop(self, version: int) -> None:
        """Forget a version. Broadcasts still under way are aborted, with the group: it is out of step."""
        if version != self._version:
            return
        receiving, self._receiving = self._receiving, None
        if receiving is not None and not receiving.done() and self._link is not None:
            self._link.close()
        super().drop(version)

    def shutdown(self) -> None:
        super().shutdown()
        self._receiving = None
        if self._link is not None:
            self._link.close()
            self._link = None


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, SyncRefused) else f"{type(error).__name__}: {error}"
