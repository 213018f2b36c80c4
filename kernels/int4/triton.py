"""INT4 weights in Triton: quantisation and the linear layer with bfloat16 activations.

Owns the kernels and launches of two operations, whose contracts are the dispatcher's; the arguments have
been checked there. The product of a tile is ``triton_tile.py``'s.

A row's sum does not depend on what the other rows hold, but its order does depend on their number, from which
the tile's shape and the split of K follow.
"""

# Kernel parameters are pointers and compile-time values, for which Python has no annotations.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from kernels.int4.reference import MAX_CODE, MIN_CODE, ZERO_NIBBLE
from kernels.int4.triton_tile import choose_tile, tile_product

_MAX_CODE = tl.constexpr(float(MAX_CODE))
_MIN_CODE = tl.constexpr(float(MIN_CODE))
_ROUNDER = tl.constexpr(1.5 * 2.0**23 + ZERO_NIBBLE)
_QUANTISE_ELEMENTS = 4096
_MIN_PROGRAMS = 128
"""A linear layer of fewer tiles than this, about the multiprocessors of an H200, splits K between programs."""
_MAX_SPLIT = 8


@triton.jit
def _quantise_kernel(weight_ptr, packed_ptr, scale_ptr, num_groups, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Quantise GROUPS groups; the bytes are those of ``quantise_reference``."""
    HALF: tl.constexpr = GROUP // 2
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    mask = (group < num_groups)[:, None]
    element = tl.arange(0, HALF)[None, :]
    low_ptr = weight_ptr + group[:, None] * GROUP + element
    low = tl.load(low_ptr, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(low_ptr + HALF, mask=mask, other=0.0).to(tl.float32)

    # As integers the magnitudes keep their order, with infinity and then NaN above: the maximum finds them.
    low_bits = low.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    high_bits = high.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    absmax = tl.max(tl.maximum(low_bits, high_bits), 1).to(tl.float32, bitcast=True)
    scale_bits = _round_to_bfloat16(tl.div_rn(absmax, tl.full([GROUPS], _MAX_CODE, tl.float32)))
    scale_bits = tl.where(scale_bits == 0, 0x3F800000, scale_bits)
    scale = scale_bits.to(tl.float32, bitcast=True)

    divisor = tl.broadcast_to(scale[:, None], [GROUPS, HALF])
    nibbles = _round_to_nibble(tl.div_rn(low, divisor)) | (_round_to_nibble(tl.div_rn(high, divisor)) << 4)
    tl.store(packed_ptr + group[:, None] * HALF + element, nibbles.to(tl.uint8), mask=mask)
    tl.store(scale_ptr + group, (scale_bits >> 16).to(tl.int16), mask=group < num_groups)


@triton.jit
def _round_to_bfloat16(value):
    """Return the bits of value >= 0 rounded to bfloat16, half to even, as those of a float32; NaN stays NaN.

    Written out because the interpreter's conversion truncates and the bytes must be the same everywhere.
    """
    bits = tl.minimum(value.to(tl.int32, bitcast=True), 0x7FC00000)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & 0x7FFF0000


@triton.jit
def _round_to_nibble(ratio):
    """Round half to even and add 8: both happen in the addition, whose low bits are the result."""
    clamped = tl.minimum(tl.maximum(ratio, _MIN_CODE), _MAX_CODE)
    return (clamped + _ROUNDER).to(tl.int32, bitcast=True) & 15


@triton.jit
def _linear_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    num_out,
    x_stride,
    num_steps,
    steps_a_split,
    NUM_GROUPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
):
    """Write one tile of y, or of one split's part of it, y [splits, M, N]."""
    first_token = tl.program_id(0).to(tl.int64) * TOKENS
    first_row = tl.program_id(1).to(tl.int64) * ROWS
    split = tl.program_id(2)
    tokens = first_token + tl.arange(0, TOKENS)
    rows = first_row + tl.arange(0, ROWS)
    first_step = split * steps_a_split
    sums = tile_product(
        packed_ptr,
        scale_ptr,
        rows,
        rows < num_out,
        x_ptr,
        tokens,
        tokens < num_rows,
        x_stride,
        first_step,
        tl.minimum(first_step + steps_a_split, num_steps),
        NUM_GROUPS,
        GROUP,
        ROWS,
        TOKENS,
        STEP,
        SCALE_SUMS,
    )
    if HAS_BIAS:
        sums += tl.load(bias_ptr + rows, mask=rows < num_out, other=0.0).to(tl.float32)[:, None]
    place = (split.to(tl.int64) * num_rows + tokens)[None, :] * num_out + rows[:, None]
    mask = (rows < num_out)[:, None] & (tokens < num_rows)[None, :]
    tl.store(y_ptr + place, sums.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_splits_kernel(
    parts_ptr, bias_ptr, y_ptr, numel, num_out, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, TILE: tl.constexpr
):
    """Add the parts of each element in the order of their splits."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = place < numel
    sums = tl.zeros([TILE], tl.float32)
    for split in tl.static_range(SPLITS):
        sums += tl.load(parts_ptr + split * numel + place, mask=mask, other=0.0)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + place % num_out, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, sums.to(y_ptr.dtype.element_ty), mask=mask)


def quantise_triton(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantise`` on the device.

    Raises:
        ValueError: A weight is NaN or infinite; looking waits for the device.
    """
    *leading, num_in = weight.shape
    weight = weight.detach().contiguous()
    packed = torch.empty(*leading, num_in // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(*leading, num_in // group_size, dtype=torch.bfloat16, device=weight.device)
    num_groups = scale.numel()
    if num_groups == 0:
        return packed, scale
    groups = _QUANTISE_ELEMENTS // group_size
    with torch.cuda.device_of(weight):
        _quantise_kernel[(triton.cdiv(num_groups, groups),)](
            weight,
            packed,
            scale.view(torch.int16),
            num_groups,
            GROUP=group_size,
            GROUPS=groups,
            num_warps=4,
            enable_fp_fusion=False,
        )
    if not bool(scale.isfinite().all()):
        raise ValueError("weight: got NaN or infinite values, expected finite ones")
    return packed, scale


def int4_linear_triton(
    x: torch.Tensor, form: tuple[torch.Tensor, torch.Tensor], group_size: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """``int4_linear`` on the device, without waiting for it.

    The grid depends on shapes alone. Where K is split, a second kernel adds the parts in a fixed order.
    """
    (packed, scale), num_rows = form, x.shape[0]
    bias = None if bias is None else bias.contiguous()
    num_out, num_groups = scale.shape
    y = torch.empty(num_rows, num_out, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    tile = choose_tile(num_rows)
    num_tiles = triton.cdiv(num_rows, tile.tokens), triton.cdiv(num_out, tile.rows)
    num_steps = triton.cdiv(num_groups, tile.step // group_size)
    wanted = min(_MAX_SPLIT, num_steps, triton.cdiv(_MIN_PROGRAMS, num_tiles[0] * num_tiles[1]))
    steps_a_split = triton.cdiv(num_steps, wanted)
    num_splits = triton.cdiv(num_steps, steps_a_split)
    is_split = num_splits > 1
    target = torch.empty(num_splits, *y.shape, dtype=torch.float32, device=x.device) if is_split else y
    with torch.cuda.device_of(x):
        _linear_kernel[(*num_tiles, num_splits)](
            x,
            packed,
            scale,
            bias,
            target,
            num_rows,
            num_out,
            x.stride(0),
            num_steps,
            steps_a_split,
            NUM_GROUPS=num_groups,
            HAS_BIAS=bias is not None and not is_split,
            GROUP=group_size,
            ROWS=tile.rows,
            TOKENS=tile.tokens,
            STEP=tile.step,
            SCALE_SUMS=tile.scale_sums,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
        if is_split:
            _add_splits_kernel[(triton.cdiv(y.numel(), 1024),)](
                target,
                bias,
                y,
                y.numel(),
                num_out,
                SPLITS=num_splits,
                HAS_BIAS=bias is not None,
                TILE=1024,
                enable_fp_fusion=True,
            )
    return y
