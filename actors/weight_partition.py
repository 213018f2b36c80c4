"""Which rank encodes and sends which rows of which checkpoint tensor.

A training parameter is a flat run of elements that ZeRO-3 cuts into one partition of equal length for
each rank (DeepSpeed pads the last), and every checkpoint tensor is a contiguous part of one parameter.
A row belongs to the rank whose partition holds its first element. Where the end of a partition cuts a
row, the ranks after it lend the few elements that complete it, so that no parameter is ever gathered.
A function of names, shapes, plans and the number of ranks alone: every rank computes the same. Knows
nothing of DeepSpeed, of values or of transports.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from rollout.errors import InvalidRequest
from rollout.sync.checkpoint_names import split_parameter
from rollout.sync.encoding import TensorPlan
from rollout.sync.manifest import Piece, aligned

NamedShapes = Sequence[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Rows of one checkpoint tensor and where their elements lie: [start, stop) of the flat parameter."""

    piece: Piece
    parameter: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loan:
    """Elements [start, stop) of a flat parameter that the lender holds and a row of the borrower needs."""

    parameter: str
    start: int
    stop: int
    lender: int
    borrower: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """The whole model, divided.

    Attributes:
        buckets: By rank: groups of shares, each of at most `bucket_bytes` encoded.
        loans: Between ranks, in one order for all; empty where every rank holds whole parameters.
    """

    buckets: tuple[tuple[tuple[Share, ...], ...], ...]
    loans: tuple[Loan, ...]

    @property
    def pieces(self) -> tuple[tuple[int, Piece], ...]:
        """(rank, piece) of everything that is sent; the pieces of a tensor tile it."""
        return tuple(
            (rank, share.piece) for rank, buckets in enumerate(self.buckets) for bucket in buckets for share in bucket
        )


def partition_elements(num_elements: int, num_ranks: int) -> int:
    """Elements in each rank's partition of a parameter, padding included (as DeepSpeed cuts it)."""
    return -(-num_elements // num_ranks)


def divide(
    parameters: NamedShapes,
    plans: Mapping[str, TensorPlan],
    num_ranks: int,
    bucket_bytes: int,
    *,
    is_partitioned: bool,
    replicated: NamedShapes = (),
) -> Division:
    """Divide a model among ranks.

    Args:
        parameters: (name, shape) of every training parameter, in the order of the module.
        plans: Encoding of every checkpoint tensor.
        num_ranks: Trainer ranks.
        bucket_bytes: Most encoded bytes in one bucket, > 0; a single row may be larger.
        is_partitioned: Whether a rank holds its partitions of them only (ZeRO-3), so that loans are needed.
        replicated: More parameters, which every rank holds whole and which are served under their own names.

    Raises:
        InvalidRequest: The tensors of the parameters are not those of the plans.
    """
    shares: list[list[Share]] = [[] for _ in range(num_ranks)]
    seen: dict[str, tuple[int, ...]] = {}
    whole = {name for name, _ in replicated}
    for parameter, shape in [*parameters, *replicated]:
        size = partition_elements(math.prod(shape), num_ranks)
        empty = torch.empty(shape, device="meta")
        for name, tensor in [(parameter, empty)] if parameter in whole else split_parameter(parameter, empty):
            seen[name] = tuple(tensor.shape)
            if name in plans and tensor.numel():
                assert tensor.is_contiguous(), f"{name} is not a contiguous part of {parameter}"
                for rank, share in _cut(plans[name], parameter, tensor.storage_offset(), size):
                    shares[rank].append(share)
    wanted = {name: plan.shape for name, plan in plans.items()}
    if seen != wanted:
        some = sorted(dict(seen.items() ^ wanted.items()))[:5]
        raise InvalidRequest("tensors of the trained module", f"others than are served: {some}", "the same")
    sizes = {name: partition_elements(math.prod(shape), num_ranks) for name, shape in parameters}
    return Division(
        buckets=tuple(tuple(_buckets(mine, plans, bucket_bytes)) for mine in shares),
        loans=tuple(_loans(shares, sizes)) if is_partitioned else (),
    )


def _cut(plan: TensorPlan, parameter: str, offset: int, partition: int) -> Iterator[tuple[int, Share]]:
    """Cut a tensor that begins at element `offset` where partitions of `partition` elements end."""
    first_row, rank = 0, offset // partition
    while first_row < plan.num_rows:
        end = (rank + 1) * partition - offset  # of the rank's partition, from the start of the tensor
        next_row = min(-(-end // plan.row_elements), plan.num_rows)
        if next_row > first_row:
            yield rank, _share(plan, parameter, offset, first_row, next_row)
        first_row, rank = max(first_row, next_row), rank + 1


def _share(plan: TensorPlan, parameter: str, offset: int, first_row: int, next_row: int) -> Share:
    return Share(
        piece=Piece(name=plan.name, first_row=first_row, num_rows=next_row - first_row),
        parameter=parameter,
        start=offset + first_row * plan.row_elements,
        stop=offset + min(next_row * plan.row_elements, plan.numel),
    )


def _loans(shares: Sequence[Sequence[Share]], partitions: Mapping[str, int]) -> Iterator[Loan]:
    """Loans for the parameters whose partitions are given."""
    for borrower, mine in enumerate(shares):
        for share in mine:
            if share.parameter not in partitions:
                continue
            size = partitions[share.parameter]
            start = (borrower + 1) * size
            while start < share.stop:
                lender = start // size
                stop = min((lender + 1) * size, share.stop)
                yield Loan(parameter=share.parameter, start=start, stop=stop, lender=lender, borrower=borrower)
                start = stop


def _buckets(
    shares: Sequence[Share], plans: Mapping[str, TensorPlan], bucket_bytes: int
) -> Iterator[tuple[Share, ...]]:
    """Fill buckets in order; a share that does not fit is cut between rows."""
    current: list[Share] = []
    room = bucket_bytes
    for share in shares:
        plan = plans[share.piece.name]
        offset = share.start - share.piece.first_row * plan.row_elements
        first_row, end_row = share.piece.first_row, share.piece.first_row + share.piece.num_rows
        while first_row < end_row:
            num_rows = min(end_row - first_row, room // plan.row_bytes)
            if num_rows < 1 and current:
                yield tuple(current)
                current, room = [], bucket_bytes
                continue
            num_rows = max(num_rows, 1)
            current.append(_share(plan, share.parameter, offset, first_row, first_row + num_rows))
            room -= aligned(num_rows * plan.row_bytes)
            first_row += num_rows
    if current:
        yield tuple(current)
