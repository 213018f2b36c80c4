"""Ragged all-gather and reduce-scatter over gloo, which vLLM's CPU communicator lacks.

vLLM's all-gather / reduce-scatter expert parallelism gathers every rank's tokens (each rank may hold
a different number of them), runs the local experts, and sums the partial results back.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class ExpertParallelCpuCommunicator(CpuCommunicator):
    """`CpuCommunicator` with `all_gatherv` and `reduce_scatterv`."""

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
        if isinstance(input_, list):
            return [self._gather_rows(tensor, sizes) for tensor in input_]
        return self._gather_rows(input_, sizes)

    def _gather_rows(self, tensor: torch.Tensor, sizes: list[int] | None) -> torch.Tensor:
        rows = sizes or [tensor.shape[0]] * self.world_size
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

        An all-reduce leaves the same bits on every rank, so a row does not depend on whose it is. With
        more than two ranks the order of adding may depend on the row's place, as in any ring.

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
        summed = input_.contiguous()
        dist.all_reduce(summed, group=self.device_group)
        start = sum(rows[: self.rank_in_group])
        return summed[start : start + rows[self.rank_in_group]]
