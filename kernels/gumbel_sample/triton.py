"""Fused keyed sampling in Triton: one pass over the logits that bounds, then an exact look at what can win.

Owns the two kernels and their launch. The contract is that of ``reference.gumbel_sample_reference``:
the integers agree bit for bit, the noise up to the rounding of the two logarithms.

The noise takes two logarithms, about 60 instructions a token, and only the best token's matters. As
-log(u) >= 1 - u, the noise is at most -log(1 - u), one fast logarithm. The first kernel finds each tile's
highest x plus bound; the second evaluates exactly the tile whose bound is highest, and any other whose
bound reaches what it found. The gap of a bound is near (1 - u) / 2, small where the noise is high, so one
tile is nearly always enough. What is sampled is the exact maximum in any case.

A program takes one tile of one row. The tile's size depends on V alone, so the order of a row's sum,
and with it every bit of the result, is independent of B. Sums of exponentials are taken in base 2.
"""

# Kernel parameters are pointers and compile-time values, for which Python has no annotations.
# mypy: disable-error-code="no-untyped-def"

import math

import torch
import triton
import triton.language as tl

from kernels.gumbel_sample.reference import PHILOX_KEY_STEPS, PHILOX_MULTIPLIERS, check_arguments

_MAX_TILE = 4096
_MIN_TILE = 16
_TILE_WARPS = 4
_MERGE_WARPS = 16

_MULTIPLIER_0 = tl.constexpr(PHILOX_MULTIPLIERS[0])
_MULTIPLIER_1 = tl.constexpr(PHILOX_MULTIPLIERS[1])
_KEY_STEP_0 = tl.constexpr(PHILOX_KEY_STEPS[0])
_KEY_STEP_1 = tl.constexpr(PHILOX_KEY_STEPS[1])

_LN_2 = tl.constexpr(math.log(2.0))
_LOG2_E = tl.constexpr(math.log2(math.e))
_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 operands, written out so that the bits are ours and not a library's."""
    for _ in tl.static_range(10):
        # One wide multiplication gives both halves.
        product0 = c0.to(tl.uint64) * _MULTIPLIER_0
        product1 = c2.to(tl.uint64) * _MULTIPLIER_1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = k0 + _KEY_STEP_0
        k1 = k1 + _KEY_STEP_1
    return c0, c1, c2, c3


@triton.jit
def _uniform_complement(seed, position, lane, first_token, TILE: tl.constexpr):
    """Return 1 - u, exactly, for tokens first_token .. first_token + TILE - 1; first_token % 4 == 0."""
    zeros = tl.zeros([TILE // 4], tl.uint32)
    index = (first_token // 4 + tl.arange(0, TILE // 4)).to(tl.uint32)
    word0, word1, word2, word3 = _philox4x32(
        index,
        zeros + (position & 0xFFFFFFFF).to(tl.uint32),
        zeros + (position >> 32).to(tl.uint32),
        zeros + lane.to(tl.uint32),
        zeros + (seed & 0xFFFFFFFF).to(tl.uint32),
        zeros + (seed >> 32).to(tl.uint32),
    )
    # Two interleavings bring word i of counter n to place 4 n + i.
    bits = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    # u = (k + 1/2) / 2**23, so 1 - u has the complement of k. It comes without an integer conversion: that
    # becomes the significand of 1 + k / 2**23, and the difference is exact.
    return ((~bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - (1.0 - 1.0 / 16777216.0)


@triton.jit
def _fast(operation: tl.constexpr, x):
    """Return lg2 or ex2 of x in one instruction.

    lg2 of numbers in [2**-24, 1) is off by at most 2**-22, or by 2**-22 of itself, whichever is more; ex2 by two
    units in the last place, and results below 2**-126 are 0.
    """
    if _IS_INTERPRETED:
        return tl.log2(x) if operation == "lg2" else tl.exp2(x)
    else:
        instruction: tl.constexpr = operation + ".approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(instruction, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _load_row_scale(temperature_ptr, row):
    """Return (T == 0, 1 / T or 1), the quotient rounded as IEEE 754 asks, as in the reference."""
    temperature = tl.load(temperature_ptr + row)
    is_greedy = temperature == 0.0
    inverse = tl.div_rn(1.0, tl.where(is_greedy, 1.0, temperature))
    return is_greedy, inverse


@triton.jit
def _load_scaled(
    row_ptr,
    threshold_ptr,
    row,
    is_greedy,
    inverse,
    first_token,
    vocab_size,
    HAS_THRESHOLD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return x of the tokens first_token .. first_token + TILE - 1, -inf where cut or past the vocabulary."""
    tokens = first_token + tl.arange(0, TILE)
    logits = tl.load(row_ptr + tokens.to(tl.int64), mask=tokens < vocab_size, other=float("-inf"))
    x = logits.to(tl.float32) * inverse
    if HAS_THRESHOLD:
        is_cut = (x < tl.load(threshold_ptr + row)) & (is_greedy == 0)
        x = tl.where(is_cut, float("-inf"), x)
    return x


# An integer argument equal to 1 is made a compile-time constant, which has no dtype to convert from.
@triton.jit(do_not_specialize=["num_tiles", "lane"])
def _sample_tile_kernel(
    logits_ptr,
    seeds_ptr,
    positions_ptr,
    temperature_ptr,
    threshold_ptr,
    bound_ptr,
    maximum_ptr,
    sum_ptr,
    row_stride,
    vocab_size,
    num_tiles,
    lane,
    HAS_THRESHOLD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reduce one tile to a bound of its perturbed values, and in base 2 its maximum and sum over that."""
    program = tl.program_id(0)
    row = (program // num_tiles).to(tl.int64)
    first_token = (program % num_tiles) * TILE
    is_greedy, inverse = _load_row_scale(temperature_ptr, row)
    row_ptr = logits_ptr + row * row_stride
    x = _load_scaled(row_ptr, threshold_ptr, row, is_greedy, inverse, first_token, vocab_size, HAS_THRESHOLD, TILE)
    # In base 2, the maximum rounded once and used so rounded everywhere.
    maximum = tl.max(x, 0) * _LOG2_E
    # A tile without any token left would otherwise take -inf - -inf.
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(_fast("ex2", tl.fma(x, _LOG2_E, -shift)), 0)

    complement = _uniform_complement(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), lane, first_token, TILE)
    bounds = tl.fma(_fast("lg2", complement), tl.where(is_greedy, 0.0, -_LN_2), x)

    slot = program.to(tl.int64)
    tl.store(bound_ptr + slot, tl.max(bounds, 0))
    tl.store(maximum_ptr + slot, maximum)
    tl.store(sum_ptr + slot, total)


@triton.jit(do_not_specialize=["num_tiles", "lane"])
def _merge_tiles_kernel(
    logits_ptr,
    seeds_ptr,
    positions_ptr,
    temperature_ptr,
    threshold_ptr,
    bound_ptr,
    maximum_ptr,
    sum_ptr,
    tokens_ptr,
    logprobs_ptr,
    row_stride,
    vocab_size,
    num_tiles,
    lane,
    HAS_THRESHOLD: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Evaluate exactly, highest bound first, the tiles of one row that can hold its best token; merge the sums."""
    row = tl.program_id(0).to(tl.int64)
    is_greedy, inverse = _load_row_scale(temperature_ptr, row)
    row_ptr = logits_ptr + row * row_stride
    seed = tl.load(seeds_ptr + row)
    position = tl.load(positions_ptr + row)
    tiles = tl.arange(0, TILES)
    mask = tiles < num_tiles
    slots = row * num_tiles + tiles

    bounds = tl.load(bound_ptr + slots, mask=mask, other=float("-inf"))
    best = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], 0, tl.int32)
    highest = tl.max(bounds, 0)
    # Off are a bound by its fast logarithm (24 * 2**-22) and two roundings, a value by its logarithms (2**-17)
    # and two roundings. No order of comparisons with NaN makes the loop endless.
    while (highest > float("-inf")) & (highest >= best - (2.0**-14 + 2.0**-21 * tl.abs(best))):
        tile = tl.min(tl.where(bounds == highest, tiles, TILES - 1), 0)
        first_token = tile * TILE
        x = _load_scaled(row_ptr, threshold_ptr, row, is_greedy, inverse, first_token, vocab_size, HAS_THRESHOLD, TILE)
        complement = _uniform_complement(seed, position, lane, first_token, TILE)
        perturbed = tl.where(is_greedy, x, x + -tl.log(-tl.log(1.0 - complement)))
        value, place = tl.max(perturbed, 0, return_indices=True, return_indices_tie_break_left=True)
        is_better = (value > best) | ((value == best) & (first_token + place < token))
        best = tl.where(is_better, value, best)
        token = tl.where(is_better, first_token + place, token)
        bounds = tl.where(tiles == tile, float("-inf"), bounds)
        highest = tl.max(bounds, 0)

    maxima = tl.load(maximum_ptr + slots, mask=mask, other=float("-inf"))
    maximum = tl.max(maxima, 0)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    sums = tl.load(sum_ptr + slots, mask=mask, other=0.0)
    total = tl.sum(sums * tl.exp2(maxima - shift), 0)
    x = tl.load(row_ptr + token.to(tl.int64)).to(tl.float32) * inverse
    is_empty = maximum == float("-inf")
    logprob = (tl.fma(x, _LOG2_E, -shift) - tl.log2(tl.where(is_empty, 1.0, total))) * _LN_2
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, tl.where(is_empty, float("-inf"), logprob))


def gumbel_sample_triton(
    logits: torch.Tensor,
    *,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    threshold: torch.Tensor | None = None,
    lane: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per row on the device, without waiting for it.

    Args:
        logits: [B, V] float32, bfloat16 or float16; any row stride, last dimension contiguous.
        seeds: [B] int64 in [0, 2**63).
        positions: [B] int64 >= 0.
        temperature: [B] float32, 0 is greedy.
        threshold: [B] float32 or None.
        lane: Stream at this position, in [0, 2**32).

    Returns:
        (tokens [B] int64, logprobs [B] float32).

    Raises:
        ValueError: A shape, dtype, device, stride or lane is wrong. Ranges of tensors on a device are
            not read, because that would wait for it.
    """
    check_arguments(logits, seeds, positions, temperature, threshold, lane)
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows == 0:
        return tokens, logprobs
    tile = min(_MAX_TILE, max(_MIN_TILE, triton.next_power_of_2(vocab_size)))
    num_tiles = triton.cdiv(vocab_size, tile)
    bounds, maxima, sums = torch.empty(3, num_rows, num_tiles, dtype=torch.float32, device=logits.device)
    row_arguments = (
        logits,
        seeds.contiguous(),
        positions.contiguous(),
        temperature.contiguous(),
        None if threshold is None else threshold.contiguous(),
        bounds,
        maxima,
        sums,
    )
    sizes = (logits.stride(0), vocab_size, num_tiles, lane)
    with torch.cuda.device_of(logits):
        # Without enable_fp_fusion=False, logits * inverse + noise becomes one fused multiply-add and the
        # perturbed value is no longer the reference's.
        _sample_tile_kernel[(num_rows * num_tiles,)](
            *row_arguments,
            *sizes,
            HAS_THRESHOLD=threshold is not None,
            TILE=tile,
            num_warps=_TILE_WARPS,
            enable_fp_fusion=False,
        )
        _merge_tiles_kernel[(num_rows,)](
            *row_arguments,
            tokens,
            logprobs,
            *sizes,
            HAS_THRESHOLD=threshold is not None,
            TILE=tile,
            TILES=triton.next_power_of_2(num_tiles),
            num_warps=_MERGE_WARPS,
            enable_fp_fusion=False,
        )
    return tokens, logprobs
