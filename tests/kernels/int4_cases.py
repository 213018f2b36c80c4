"""Random INT4 operands, and bounds on the error of an operation on them, for the tests of both devices.

A bound follows an operation through in float64: what the exact operation on the same inputs yields, and by
how much float32 sums and roundings to the activations' dtype can move it, to first order in each product.
"""

import math

import pytest
import torch

from kernels.int4 import dequantise, quantise

Packed = tuple[torch.Tensor, torch.Tensor]
Bounded = tuple[torch.Tensor, torch.Tensor]
"""An exact result and the largest error, both float64."""

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Unit roundoffs: half the spacing of significands of 24 and of 8 bits."""
SUM_UNIT = 2.0**-23
"""Of a float32 addition that may truncate, as tensor cores do."""


def random_packed(*shape: int, group_size: int, seed: int = 0) -> Packed:
    """Quantise normal weights whose rows differ in size, so that groups differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator) * torch.rand(*shape[:-1], 1, generator=generator)
    return quantise(weight, group_size)


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Fill what torch.empty allocates, and at least a row's length behind it, with NaN or numbers out of range.

    A slot that is never written cannot pass then. Returns what lies behind the tensors, for ``assert_intact``.
    """
    empty = torch.empty
    behind: list[torch.Tensor] = []

    def poisoned(*size: int | tuple[int, ...], **options: object) -> torch.Tensor:
        shape = size if all(isinstance(length, int) for length in size) else size[0]
        numel = math.prod(shape)
        memory = empty(numel + max([64, *shape]), **options)
        memory.fill_(math.nan if memory.is_floating_point() else torch.iinfo(memory.dtype).max // 2)
        behind.append(memory[numel:])
        return memory[:numel].view(shape)

    monkeypatch.setattr(torch, "empty", poisoned)
    return behind


def assert_intact(behind: list[torch.Tensor]) -> None:
    """Fail if anything was written behind a tensor."""
    for guard in behind:
        is_intact = guard.isnan() if guard.is_floating_point() else guard == torch.iinfo(guard.dtype).max // 2
        assert bool(is_intact.all())


def linear_bound(
    x: Bounded, weight: Packed, *, rounding: float, weight_rounding: float = 0.0, bias: torch.Tensor | None = None
) -> Bounded:
    """Bound x @ W^T + bias: an error of x, of each weight, of K float32 additions, and of the result.

    rounding is the unit roundoff of the result's dtype; the product is rounded before the bias is added.
    """
    value, error = x
    dense = dequantise(*weight).double()
    size = value.abs() @ dense.T.abs()
    exact = value @ dense.T
    moved = error @ dense.T.abs() + (weight_rounding + (dense.shape[1] + 1) * SUM_UNIT) * size
    moved += rounding * (exact.abs() + moved)
    if bias is not None:
        exact = exact + bias.double()
        moved += rounding * (exact.abs() + moved)
    return exact, moved


def moe_bound(
    x: torch.Tensor,
    w13: Packed,
    w2: Packed,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    *,
    rounding: float,
    weight_rounding: float = 0.0,
) -> Bounded:
    """Bound ``int4_moe``, each product, activation and sum of which is rounded to the activations' dtype.

    The derivative of silu is at most 1.1 in magnitude; its own evaluation errs by a few float32 units.
    """
    local = topk_ids.long() if expert_map is None else expert_map[topk_ids.long()].long()
    total = torch.zeros(x.shape, dtype=torch.float64)
    moved = torch.zeros_like(total)
    roundings = {"rounding": rounding, "weight_rounding": weight_rounding}
    for expert in range(len(w13[0])):
        token, choice = (local == expert).nonzero(as_tuple=True)
        rows = x[token].double()
        hidden, hidden_error = linear_bound(
            (rows, torch.zeros_like(rows)), (w13[0][expert], w13[1][expert]), **roundings
        )
        (gate, up), (gate_error, up_error) = hidden.chunk(2, -1), hidden_error.chunk(2, -1)
        active = torch.nn.functional.silu(gate)
        error = 1.1 * gate_error * (up.abs() + up_error) + active.abs() * up_error
        error += (rounding + 8 * UNIT[torch.float32]) * ((active * up).abs() + error)
        y, y_error = linear_bound((active * up, error), (w2[0][expert], w2[1][expert]), **roundings)
        factor = topk_weights[token, choice, None].double()
        total.index_add_(0, token, y * factor)
        moved.index_add_(0, token, y_error * factor.abs() + (topk_ids.shape[1] + 1) * SUM_UNIT * (y * factor).abs())
    return total, moved + rounding * (total.abs() + moved)


def assert_within(actual: torch.Tensor, bounded: Bounded) -> None:
    """Fail unless every element is a number within its bound."""
    exact, bound = bounded
    error = (actual.double().cpu() - exact).abs()
    assert actual.shape == exact.shape
    assert bool((error <= bound).all()), f"error {error.max().item()}, {(error / bound).max().item()} of its bound"
