"""The weights that this trainer rank holds, read as flat runs of elements and encoded.

Under ZeRO-3 that is DeepSpeed's partition of every parameter, `ds_tensor`, in the dtype the forward uses:
also for small parameters that it keeps whole between steps, and it is up to date after every step and
every load. Nothing is gathered: the elements that complete a row at the end of a partition are lent by
the next rank (see actors.weight_partition). Under ZeRO-1 and ZeRO-2 every rank holds all of it. Knows
nothing of versions or of who receives the rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from actors.rank_group import RankGroup
from actors.trainer_model import full_shape, trained_parameters
from actors.weight_partition import Division, Loan, Share, divide, partition_elements
from rollout.errors import InvalidRequest, SyncRefused
from rollout.sync.encoding import TensorPlan, encode
from rollout.sync.manifest import torch_dtype

CHUNK_ELEMENTS = 2**20
"""Encoded at a time: temporaries are a few times as large."""


class LocalWeights:
    """One rank's part of a module.

    Args:
        module: Being trained; partitioned on all ranks alike.
        plans: Encoding of every tensor that is served.
        ranks: All trainer ranks.
        bucket_bytes: Most encoded bytes in one bucket.
        replicated: More parameters, whole and equal on all ranks, by the names they are served under.

    Raises:
        InvalidRequest: The plans are of another model, or DeepSpeed was told to keep partitions in a form
            that cannot be read in place.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        plans: Mapping[str, TensorPlan],
        ranks: RankGroup,
        bucket_bytes: int,
        replicated: Mapping[str, torch.nn.Parameter] | None = None,
    ) -> None:
        self._plans, self._ranks = plans, ranks
        trained, replicated = dict(trained_parameters(module)), replicated or {}
        self._parameters = {**trained, **replicated}
        is_partitioned = any(hasattr(p, "ds_id") for p in trained.values())
        for name, parameter in trained.items():
            if hasattr(parameter, "ds_id"):
                _check_partition(name, parameter, ranks)
        self.division: Division = divide(
            [(name, tuple(full_shape(p))) for name, p in trained.items()],
            plans,
            ranks.size,
            bucket_bytes,
            is_partitioned=is_partitioned,
            replicated=[(name, tuple(p.shape)) for name, p in replicated.items()],
        )
        self._borrowed: dict[str, list[tuple[Loan, torch.Tensor]]] = {}

    @property
    def buckets(self) -> tuple[tuple[Share, ...], ...]:
        """What this rank sends."""
        return self.division.buckets[self._ranks.rank]

    def check_finite(self) -> None:
        """Look at every element this rank holds.

        Raises:
            SyncRefused: One is NaN, infinite, or beyond the range of the served dtype.
        """
        limits = {torch.finfo(torch_dtype(plan.dtype)).max for plan in self._plans.values()}
        limit = min(limits, default=math.inf)
        for name in self._parameters:
            _, elements = self._held(name)
            for chunk in elements.split(CHUNK_ELEMENTS):
                low, high = torch.aminmax(chunk)
                if not (-limit <= float(low) and float(high) <= limit):  # false for NaN, which aminmax passes on
                    raise SyncRefused(
                        f"parameter {name}: got weights from {float(low)} to {float(high)} (NaN or infinite, or "
                        f"beyond what is served), expected finite ones up to {limit:.3g}"
                    )

    def exchange_loans(self) -> None:
        """Lend and borrow the elements of rows that partitions cut. Collective; again for every version."""
        self._borrowed = {}
        loans, me = self.division.loans, self._ranks.rank
        if not loans:
            return
        lent = [self._run(loan.parameter, loan.start, loan.stop) for loan in loans if loan.lender == me]
        parameter = next(iter(self._parameters.values()))
        mine = torch.cat(lent) if lent else torch.empty(0, dtype=parameter.dtype)
        every = self._ranks.gather_bytes(mine.view(torch.uint8).to(self._ranks.device))
        flats = [part.view(parameter.dtype).to(self._held(loans[0].parameter)[1].device) for part in every]
        taken = [0] * self._ranks.size
        for loan in loans:
            size, start = loan.stop - loan.start, taken[loan.lender]
            taken[loan.lender] += size
            if loan.borrower == me:
                self._borrowed.setdefault(loan.parameter, []).append((loan, flats[loan.lender][start : start + size]))

    def encode(self, share: Share, out: torch.Tensor) -> None:
        """Encode a share.

        Args:
            share: One of this rank's.
            out: uint8 [share.piece.num_rows, row_bytes] on the CPU; overwritten.

        Raises:
            SyncRefused: An element is NaN or infinite.
        """
        plan = self._plans[share.piece.name]
        step = max(1, CHUNK_ELEMENTS // plan.row_elements)
        for first in range(0, share.piece.num_rows, step):
            start = share.start + first * plan.row_elements
            stop = min(start + step * plan.row_elements, share.stop)
            out[first : first + step].copy_(encode(self._run(share.parameter, start, stop), plan))

    def _held(self, name: str) -> tuple[int, torch.Tensor]:
        """Place in the flat parameter and elements of what this rank holds of it, without padding."""
        parameter = self._parameters[name]
        if not hasattr(parameter, "ds_id"):
            return 0, parameter.detach().view(-1)
        partition = parameter.ds_tensor
        start = self._ranks.rank * partition.ds_numel
        size = max(0, min(partition.ds_numel, parameter.ds_numel - start))
        return start, partition.detach()[:size]

    def _run(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a flat parameter, held or borrowed."""
        first, held = self._held(name)
        end = first + held.numel()
        if stop <= end:
            return held[start - first : stop - first]
        loans = self._borrowed[name]
        assert stop == loans[-1][0].stop, "a partition's last row ends where its loans end"
        return torch.cat([held[start - first :], *(elements for _, elements in loans)])


def _check_partition(name: str, parameter: Any, ranks: RankGroup) -> None:
    partition = parameter.ds_tensor
    expected = partition_elements(parameter.ds_numel, ranks.size)
    if getattr(partition, "final_location", None) == "nvme" or hasattr(partition, "ds_quant_scale"):
        what = "a partition that is offloaded to NVMe or quantised"
    elif partition.ds_numel != expected or parameter.ds_zero_partition_rank != ranks.rank:
        what = f"a partition of {partition.ds_numel} elements as number {parameter.ds_zero_partition_rank}"
    else:
        return
    raise InvalidRequest(
        f"trainer.deepspeed, for publications: {name}",
        what,
        f"one of {expected} elements in memory, as number {ranks.rank} of {ranks.size}",
    )
