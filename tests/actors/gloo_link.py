"""A communicator with the face of vLLM's PyNcclCommunicator over gloo, for machines without GPUs.

Imports torch alone, so that a process that plays one rank starts quickly.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

JOIN_TIMEOUT = timedelta(seconds=30)  # far above any bound a test checks: ours must be what ends a wait


class GlooCommunicator:
    """Rank of a group that meets at host:port, where rank 0 listens."""

    def __init__(self, host: str, port: int, rank: int, world_size: int) -> None:
        store = dist.TCPStore(host, port, world_size, is_master=rank == 0, timeout=JOIN_TIMEOUT)
        self._store = store
        self._group = dist.ProcessGroupGloo(store, rank, world_size, JOIN_TIMEOUT)
        self.disabled = False
        self.num_broadcasts = 0
        self._warm_up()

    def _warm_up(self) -> None:
        """Every rank has joined when this returns, as after PyNcclCommunicator's first all-reduce."""
        self._group.barrier().wait()

    def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
        if self.disabled:
            return
        self.num_broadcasts += 1
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        self._group.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        self.disabled = True
