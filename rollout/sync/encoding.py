"""How a checkpoint tensor is served and sent: as rows of bytes, INT4 groups or runs of plain elements.

A version of a tensor is a byte matrix. What changed between two versions is a set of its rows, and
equality of versions is equality of bytes, so nothing above this module needs to know about
quantisation. One row of an INT4 tensor is one group: its packed codes (see kernels.int4), then its
bfloat16 scale. One row of a plain tensor is 64 elements in the served dtype, the last one padded with
zeros. Pure functions of (tensor, plan): the engine that quantises a checkpoint at its start and the
trainer that quantises the same weights produce the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch

from kernels.int4 import quantise
from rollout.config import Int4Config
from rollout.errors import InvalidRequest, SyncRefused
from rollout.sync.manifest import TensorSpec, torch_dtype

PLAIN_ROW_ELEMENTS = 64
SCALE_BYTES = 2
SERVED_DTYPES = ("float32", "bfloat16", "float16")


class Encoding(str, Enum):
    """What the bytes of a row mean."""

    PLAIN = "plain"
    INT4 = "int4"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """How one checkpoint tensor is encoded.

    Attributes:
        name: Name in the checkpoint.
        shape: Shape in the checkpoint; two-dimensional for INT4.
        encoding: Of its rows.
        row_elements: Elements in one row: the group size, or 64 for plain tensors.
        dtype: Served element type of a plain tensor; of the activations for INT4.
    """

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    row_elements: int
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_rows(self) -> int:
        return -(-self.numel // self.row_elements)

    @property
    def row_bytes(self) -> int:
        if self.encoding is Encoding.INT4:
            return self.row_elements // 2 + SCALE_BYTES
        return self.row_elements * torch_dtype(self.dtype).itemsize

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes


def plan_tensor(spec: TensorSpec, int4: Int4Config | None) -> TensorPlan:
    """Encoding of one tensor; `int4` None serves everything plain.

    Raises:
        InvalidRequest: The group size does not divide the input features, or the dtype cannot be served.
    """
    if spec.dtype not in SERVED_DTYPES:
        raise InvalidRequest(f"{spec.name} dtype", spec.dtype, f"one of {', '.join(SERVED_DTYPES)}")
    if int4 is None or len(spec.shape) != 2 or any(part in spec.name for part in int4.skip):
        return TensorPlan(
            name=spec.name,
            shape=spec.shape,
            encoding=Encoding.PLAIN,
            row_elements=PLAIN_ROW_ELEMENTS,
            dtype=spec.dtype,
        )
    if spec.shape[1] % int4.group_size:
        raise InvalidRequest(
            f"engine.int4.group_size for {spec.name}",
            int4.group_size,
            f"a divisor of its {spec.shape[1]} input features (or name the tensor in engine.int4.skip)",
        )
    return TensorPlan(
        name=spec.name, shape=spec.shape, encoding=Encoding.INT4, row_elements=int4.group_size, dtype=spec.dtype
    )


def plan_tensors(specs: Iterable[TensorSpec], int4: Int4Config | None) -> dict[str, TensorPlan]:
    """Encoding of every tensor of a model, by name, in the order given."""
    return {spec.name: plan_tensor(spec, int4) for spec in specs}


def encode(elements: torch.Tensor, plan: TensorPlan) -> torch.Tensor:
    """Rows of a run of whole rows of a tensor.

    Args:
        elements: Floating-point, any shape; the tensor, or consecutive elements of it that begin at a row
            boundary. Only the tensor's last row may be incomplete.
        plan: Of the tensor.

    Returns:
        uint8 [rows, plan.row_bytes] on the same device.

    Raises:
        SyncRefused: An element is NaN or infinite, or not finite in the served dtype.
    """
    flat = elements.detach().reshape(-1)
    if not bool(torch.isfinite(flat).all()):
        raise SyncRefused(f"{plan.name}: got NaN or infinite weights, expected finite ones")
    if plan.encoding is Encoding.INT4:
        packed, scale = quantise(flat.view(-1, plan.row_elements), plan.row_elements)
        return torch.cat([packed, scale.view(torch.uint8).view(-1, SCALE_BYTES)], dim=1)
    served = flat.to(torch_dtype(plan.dtype))
    if served.dtype != flat.dtype and not bool(torch.isfinite(served).all()):
        raise SyncRefused(f"{plan.name}: got weights beyond the range of {plan.dtype}")
    missing = -flat.numel() % plan.row_elements
    if missing:
        served = torch.cat([served, served.new_zeros(missing)])
    return served.contiguous().view(torch.uint8).view(-1, plan.row_bytes)


def int4_tensors(rows: torch.Tensor, plan: TensorPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Canonical (packed uint8 [N, K/2], scale bfloat16 [N, K/G]) of all rows of an INT4 tensor."""
    num_out, num_in = plan.shape
    codes = rows[:, :-SCALE_BYTES].reshape(num_out, num_in // 2)
    scale = rows[:, -SCALE_BYTES:].contiguous().view(torch.bfloat16).view(num_out, -1)
    return codes, scale


def int4_rows(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The inverse of `int4_tensors`."""
    num_groups = scale.numel()
    codes = packed.reshape(num_groups, -1)
    return torch.cat([codes, scale.contiguous().view(torch.uint8).view(num_groups, SCALE_BYTES)], dim=1)


def plain_tensor(rows: torch.Tensor, plan: TensorPlan) -> torch.Tensor:
    """The tensor, in its shape, of all rows of a plain tensor (a view where rows are contiguous)."""
    return rows.reshape(-1).view(torch_dtype(plan.dtype))[: plan.numel].view(plan.shape)
