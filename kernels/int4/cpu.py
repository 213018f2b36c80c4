"""INT4 weights on the CPU: quantisation in cache-sized pieces, products and experts.

Owns the CPU's kernel forms and what runs on them. There are two, told apart by the rank of the second
tensor:

- bfloat16 activations: torch's layout for ``_weight_int4pack_mm_for_cpu``, uint8 [N, K/2] in an order
  that depends on the vector width of this machine's CPU (so it must not travel to another), and
  bfloat16 [K/G, N, 2] of scales and zeros. N K / 2 bytes and 4 N K / G bytes. ``native.py`` reads it on a
  CPU with AVX-512's bfloat16, torch's kernel on any other.
- float32 activations: the canonical tensors, N K / 2 and 2 N K / G bytes. torch's INT4 matmul is tens of
  times slower than dense in float32, so these weights are made dense float32 in each call, which is
  exact and costs more time than the product at a few rows.

A row's result is, in bfloat16, independent of the other rows and of their number: either kernel takes K
in the same order at any number of rows, which tests check. In float32 it is the BLAS's business.
"""

import itertools
from collections.abc import Sequence

import torch
from torch.nn.functional import linear, silu

from kernels.int4.native import grouped_products
from kernels.int4.reference import MAX_CODE, MIN_CODE, ZERO_NIBBLE, dequantise_reference

Form = tuple[torch.Tensor, torch.Tensor]

_PIECE = 1 << 18
"""Elements quantised at a time: a piece and its temporaries stay in cache, and the calls on it cost little."""
_ROUNDER = 1.5 * 2.0**23 + ZERO_NIBBLE
"""Adding this to |v| < 2**22 rounds v to an integer, half to even, and leaves that integer + 8 in the low bits."""
_MAX_SERIAL = 32_768
"""Elements that torch leaves to one thread. Where threads share more, the ends of their shares are computed
without vector instructions, whose exponential differs, and an element's value depends on where it lies."""
_SMALLEST_NORMAL = 2.0**-126

_pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
_matmul = torch.ops.aten._weight_int4pack_mm_for_cpu


def quantise_cpu(weight: torch.Tensor, group_size: int) -> Form:
    """Quantise [..., N, K] to the bytes of ``quantise_reference``.

    Raises:
        ValueError: A weight is NaN or infinite.
    """
    shape = weight.shape
    groups = weight.detach().reshape(-1, group_size)
    packed = torch.empty(len(groups), group_size // 2, dtype=torch.uint8)
    scale = torch.empty(len(groups), dtype=torch.bfloat16)
    step = _PIECE // group_size
    for start in range(0, len(groups), step):
        stop = start + step
        _quantise_piece(groups[start:stop].float(), packed[start:stop], scale[start:stop])
    if not bool(scale.isfinite().all()):
        raise ValueError("weight: got NaN or infinite values, expected finite ones")
    return packed.view(*shape[:-1], shape[-1] // 2), scale.view(*shape[:-1], shape[-1] // group_size)


def _quantise_piece(groups: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> None:
    """Quantise float32 [n, G] into packed [n, G/2] and scale [n]; NaN and infinity reach the scale."""
    half = groups.shape[1] // 2
    rounded = groups.abs()
    scale.copy_(rounded.amax(1).div_(MAX_CODE))
    scale.masked_fill_(scale == 0, 1.0)
    divisor = scale.float().unsqueeze(1)
    torch.div(groups, divisor, out=rounded)
    if bool((divisor < _SMALLEST_NORMAL).any()):
        # A subnormal scale may be off by half of itself; any other keeps the codes within -7 .. 7.
        rounded.clamp_(MIN_CODE, MAX_CODE)
    bits = rounded.add_(_ROUNDER).view(torch.int32)
    # The low byte of either term is its nibble: the bits that _ROUNDER sets lie above it.
    packed.copy_(torch.add(bits[:, :half], bits[:, half:], alpha=16))


def kernel_form_cpu(packed: torch.Tensor, scale: torch.Tensor) -> Form:
    """Return torch's layout of canonical [..., N, K/2] and [..., N, K/G], for bfloat16 activations.

    Raises:
        ValueError: N is no multiple of 16, which torch's matmul asks for.
    """
    *leading, num_out, _ = packed.shape
    if num_out % 16:
        raise ValueError(f"packed: got {num_out} output features, expected a multiple of 16 on the CPU")
    scales_zeros = torch.zeros(*leading, scale.shape[-1], num_out, 2, dtype=torch.bfloat16)
    scales_zeros[..., 0] = scale.transpose(-1, -2)
    form = torch.empty_like(packed)
    matrices = packed.view(-1, num_out, scale.shape[-1], packed.shape[-1] // scale.shape[-1])
    for nibbles, target in zip(matrices, form.view(-1, *form.shape[-2:]), strict=True):
        codes = torch.cat([nibbles & 15, nibbles >> 4], dim=-1).flatten(1)
        target.copy_(_pack(codes.int(), 1))
    return form, scales_zeros


def is_torch_form(form: Form) -> bool:
    """Whether a form is torch's layout rather than the canonical tensors."""
    return form[1].dim() > form[0].dim()


def int4_linear_cpu(x: torch.Tensor, form: Form, group_size: int, bias: torch.Tensor | None) -> torch.Tensor:
    """``int4_linear`` on the CPU."""
    if is_torch_form(form):
        one = (form[0].unsqueeze(0), form[1].unsqueeze(0))
        y = _expert_products(x.contiguous(), one, (0, len(x)), group_size)
        return y if bias is None else y.add_(bias)
    return linear(x, dequantise_reference(*form), bias)


def int4_moe_cpu(
    x: torch.Tensor,
    w13: Form,
    w2: Form,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """``int4_moe`` on the CPU: tokens sorted by expert once, two products an expert, one SwiGLU for all.

    A token's terms are added in the order of its experts' numbers, in float32, so the sum does not depend
    on the other tokens.
    """
    num_experts, top_k = len(w13[0]), topk_ids.shape[1]
    output = torch.zeros(x.shape, dtype=torch.float32)
    local_ids = topk_ids.reshape(-1) if expert_map is None else expert_map[topk_ids.reshape(-1)]
    local_ids, order = local_ids.sort(stable=True)
    bounds = torch.searchsorted(local_ids, torch.arange(num_experts + 1, dtype=local_ids.dtype)).tolist()
    order = order[bounds[0] : bounds[-1]]
    if not len(order):
        return output.to(x.dtype)
    bounds = [bound - bounds[0] for bound in bounds]
    token = order // top_k
    hidden = _expert_products(x.index_select(0, token), w13, bounds, group_size)
    y = _expert_products(activate(hidden), w2, bounds, group_size).float()
    y.mul_(topk_weights.reshape(-1, 1).index_select(0, order))
    return output.index_add_(0, token, y).to(x.dtype)


def activate(hidden: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up of rows [n, 2 I], evaluated in float32; an element depends on its row alone."""
    pieces = []
    for piece in hidden.split(max(1, _MAX_SERIAL // hidden.shape[1])):
        gate, up = piece.float().chunk(2, dim=-1)
        pieces.append(silu(gate).mul_(up).to(hidden.dtype))
    return torch.cat(pieces)


def _expert_products(x: torch.Tensor, weight: Form, bounds: Sequence[int], group_size: int) -> torch.Tensor:
    """Multiply rows bounds[e] up to bounds[e + 1] of x, contiguous, with the weight of expert e."""
    is_torch, dense = is_torch_form(weight), weight[0]
    if is_torch and (native := grouped_products()) is not None:
        return native(x, bounds, *weight, group_size)
    if not is_torch:
        dense = dequantise_reference(*weight)
    products = [x.new_empty(0, weight[0].shape[1])]
    for expert, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start == stop:
            continue
        rows = x[start:stop]
        if is_torch:
            products.append(_matmul(rows, weight[0][expert], group_size, weight[1][expert]))
        else:
            products.append(linear(rows, dense[expert]))
    return torch.cat(products)
