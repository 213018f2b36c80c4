"""The product of one tile of packed weights with one tile of inputs, shared by every INT4 matmul.

Owns how a product is cut and the loop over the input features; knows nothing of routing or launches.

A tile is computed transposed, [output features, tokens]: the weights are then the left operand of the
tensor cores, which Hopper takes from registers, so that a code goes from its byte to the product without
passing through shared memory again. Either nibble of the G/2 bytes of a group meets a contiguous half of
the group's inputs, so a group is two products.

There are two regimes. With few tokens the weights are the traffic, and a group's scale is applied to its
sums, of which there are fewer than weights: codes are exact in bfloat16, so nothing is rounded but float32
sums. With many tokens the scale is applied to the weights, each rounded once to bfloat16, so that the sums
stay with the tensor cores and one half group is unpacked while the other is multiplied.
"""

# Kernel parameters are pointers and compile-time values, for which Python has no annotations.
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass

import triton
import triton.language as tl

OPERAND = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)
"""Of the products. Triton's interpreter has no arithmetic on bfloat16; what is exact in it is so in float32."""
_SECTOR_SCALES = tl.constexpr(16)
"""Scales in the 32 bytes that one miss brings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How a product is cut.

    Attributes:
        rows: Weight rows of a tile, a multiple of 64 (one warp group's share of a Hopper product).
        tokens: Tokens of a tile.
        step: Input features of one pass of the loop; at least one group.
        scale_sums: Apply scales to the sums (few tokens) and not to the weights.
        num_warps: Of a program.
        num_stages: Passes whose loads are in flight.
    """

    rows: int
    tokens: int
    step: int
    scale_sums: bool
    num_warps: int
    num_stages: int


def _few(tokens: int, step: int, num_stages: int) -> Tile:
    return Tile(rows=64, tokens=tokens, step=step, scale_sums=True, num_warps=4, num_stages=num_stages)


def _many(tokens: int) -> Tile:
    return Tile(rows=128, tokens=tokens, step=128, scale_sums=False, num_warps=8, num_stages=3)


# Stages: with one program on a multiprocessor, about 24 KiB of weights must be on their way to keep an H200's
# memory busy. 128 x 256 with eight warps is the most that their registers hold; it halves the unpacking
# per product. With 64 tokens a step of 256 would not fit them.
_TILES = (_few(16, 256, 5), _few(32, 256, 4), _few(64, 128, 5), _many(128), _many(256))


def choose_tile(tokens: float) -> Tile:
    """Return the tile for a number of tokens that meet the same weights."""
    return next((tile for tile in _TILES if tokens <= tile.tokens), _TILES[-1])


@triton.jit
def nibbles_to_codes(nibbles):
    """Turn uint8 nibbles into codes: 0x4300 | n is the bfloat16 128 + n, and the difference is exact."""
    return (nibbles.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True).to(OPERAND) - 136.0


@triton.jit
def tile_product(
    packed_ptr,
    scale_ptr,
    rows,
    row_mask,
    x_ptr,
    x_rows,
    x_mask,
    x_stride,
    first_step,
    last_step,
    NUM_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
):
    """Return the float32 sums [ROWS, TOKENS] over steps first_step .. last_step - 1 of STEP features.

    rows [ROWS] and x_rows [TOKENS] are int64 places in their matrices; what is masked adds zero. The
    number of groups is known to the compiler, which thereby knows how the rows are aligned.
    """
    HALF: tl.constexpr = GROUP // 2
    SECTORS: tl.constexpr = triton.next_power_of_2(triton.cdiv(NUM_GROUPS, _SECTOR_SCALES))
    STEP_GROUPS: tl.constexpr = STEP // GROUP
    byte = tl.arange(0, HALF)
    packed_rows = packed_ptr + (rows * (NUM_GROUPS * HALF))[:, None] + byte[None, :]
    scale_rows = scale_ptr + rows * NUM_GROUPS
    x_columns = x_ptr + (x_rows * x_stride)[None, :] + byte[:, None]
    # The loop reads one scale a row, too narrow to be fetched ahead of its use: bring them all into the first
    # cache before it. Zero times them is added at the end, so that the compiler cannot drop the load.
    sector = tl.arange(0, SECTORS) * _SECTOR_SCALES
    touched = tl.load(
        scale_rows[:, None] + sector[None, :], mask=row_mask[:, None] & (sector < NUM_GROUPS)[None, :], other=0.0
    )
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in range(first_step, last_step):
        for i in tl.static_range(STEP_GROUPS):
            group = step * STEP_GROUPS + i
            weight_mask, token_mask = row_mask[:, None], x_mask[None, :]
            if NUM_GROUPS % STEP_GROUPS != 0:
                weight_mask &= (group * HALF + byte < NUM_GROUPS * HALF)[None, :]
                token_mask &= (group * HALF + byte < NUM_GROUPS * HALF)[:, None]
            packed = tl.load(packed_rows + group * HALF, mask=weight_mask, other=0)
            x_low = tl.load(x_columns + group * GROUP, mask=token_mask, other=0.0).to(OPERAND)
            x_high = tl.load(x_columns + group * GROUP + HALF, mask=token_mask, other=0.0).to(OPERAND)
            scale = tl.load(scale_rows + tl.minimum(group, NUM_GROUPS - 1), mask=row_mask, other=0.0)[:, None]
            low = nibbles_to_codes(packed & 15)
            high = nibbles_to_codes(packed >> 4)
            if SCALE_SUMS:
                part = tl.dot(low, x_low)
                part = tl.dot(high, x_high, part)
                sums += part * scale.to(tl.float32)
            else:
                sums = tl.dot(low * scale.to(OPERAND), x_low, sums)
                sums = tl.dot(high * scale.to(OPERAND), x_high, sums)
    return sums + tl.sum(touched.to(tl.float32) * 0.0, 1)[:, None]
