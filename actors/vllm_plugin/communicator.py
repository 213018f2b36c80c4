"""Ragged all-gather and reduce-scatter between CPU ranks, which vLLM's CPU communicator lacks.

vLLM's all-gather / reduce-scatter expert parallelism gathers every rank's tokens (each rank may hold
a different number of them), runs the local experts, and sums the partial results back. Ranks of one host do both
through shared memory, others, and messages too large for it, over gloo.
"""

from __future__ import annotations

import os
import secrets
from typing import Any

import torch
import torch.distributed as dist
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

from actors.vllm_plugin.shm_exchange import ShmExchange, boot_id

SLOT_BYTES = 4 * 2**20  # most that a rank sends through shared memory at once
DEFAULT_TIMEOUT_S = 1800.0  # of gloo, where vLLM is told none


class ExpertParallelCpuCommunicator(CpuCommunicator):
    """`CpuCommunicator` with `all_gatherv` and `reduce_scatterv`.

    Attributes:
        exchange: Shared memory between the ranks; None for a group that does not need it, or of several hosts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exchange: ShmExchange | None = None
        if self.unique_name.startswith(("dp", "ep")) and self.world_size > 1:
            self.exchange = self._open_exchange()

    def _open_exchange(self) -> ShmExchange | None:
        """Shared memory between the ranks; None if they are on several hosts. Collective."""
        said: list[Any] = [None] * self.world_size
        dist.all_gather_object(said, (boot_id(), os.getpid(), secrets.token_hex(8)), group=self.cpu_group)
        if len({host for host, _, _ in said}) > 1:
            return None
        config = get_current_vllm_config_or_none()
        timeout_s = None if config is None else config.parallel_config.cpu_distributed_timeout_seconds
        return ShmExchange(
            name=said[0][2],
            rank=self.rank_in_group,
            slot_bytes=SLOT_BYTES,
            timeout_s=timeout_s or DEFAULT_TIMEOUT_S,
            meet=lambda: dist.barrier(group=self.cpu_group),
            pids=[pid for _, pid, _ in said],
        )

    def all_gatherv(
        self,
        input_: torch.Tensor | list[torch.Tensor],
        dim: int = 0,
        sizes: list[int] | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Concatenate every rank's rows.

        Args:
            input_: Tensor(s) of shape [sizes[rank], ...].
            dim: Must be 0.
            sizes: Rows on each rank; None when all ranks have as many as this one.

        Returns:
            Tensor(s) of shape [sum(sizes), ...], rank 0's rows first.
        """
        if dim != 0:
            raise ValueError(f"all_gatherv dim: got {dim}, expected 0")
        tensors = input_ if isinstance(input_, list) else [input_]
        rows = sizes or [tensors[0].shape[0]] * self.world_size
        if self.exchange is not None and self.exchange.has_room([(t, max(rows)) for t in tensors]):
            gathered = self.exchange.gather_rows(tensors, rows)
        else:
            gathered = [self._gather_rows(tensor, rows) for tensor in tensors]
        return gathered if isinstance(input_, list) else gathered[0]

    def _gather_rows(self, tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
        longest = max(rows)
        padded = tensor.contiguous()
        if tensor.shape[0] < longest:
            padded = torch.cat([padded, padded.new_zeros(longest - tensor.shape[0], *tensor.shape[1:])])
        gathered = padded.new_empty((self.world_size, longest, *tensor.shape[1:]))
        dist.all_gather_into_tensor(gathered.view(-1, *tensor.shape[1:]), padded, group=self.device_group)
        if min(rows) == longest:
            return gathered.view(-1, *tensor.shape[1:])
        return torch.cat([gathered[rank, :count] for rank, count in enumerate(rows)])

    def reduce_scatterv(self, input_: torch.Tensor, dim: int = 0, sizes: list[int] | None = None) -> torch.Tensor:
        """Sum the ranks' tensors and return this rank's rows.

        An all-reduce leaves the same bits on every rank, so a row does not depend on whose it is. Over gloo and
        with more than two ranks the order of adding may depend on the row's place, as in any ring; through shared
        memory it is that of the ranks.

        Args:
            input_: [sum(sizes), ...], the same shape on every rank; overwritten if it is contiguous.
            dim: Must be 0.
            sizes: Rows that belong to each rank; None for equal parts.

        Returns:
            [sizes[rank], ...]
        """
        if dim != 0:
            raise ValueError(f"reduce_scatterv dim: got {dim}, expected 0")
        rows = sizes or [input_.shape[0] // self.world_size] * self.world_size
        if self.exchange is not None and self.exchange.has_room([(input_, input_.shape[0])]):
            return self.exchange.sum_rows(input_, rows)
        summed = input_.contiguous()
        dist.all_reduce(summed, group=self.device_group)
        start = sum(rows[: self.rank_in_group])
        return summed[start : start + rows[self.rank_in_group]]
