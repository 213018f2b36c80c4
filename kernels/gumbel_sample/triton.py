"""Fused keyed sampling in Triton: one pass over the logits, then a merge of one number set per tile.

Owns the two kernels and their launch. The contract is that of ``reference.gumbel_sample_reference``:
the integers agree bit for bit, the noise up to the rounding of the two logarithms.

A program takes one tile of one row. The tile's size depends on V alone, so the order of a row's sum,
and with it every bit of the result, is independent of B; small batches fill the device because a row
of 151,936 logits makes 75 programs. The arithmetic of the noise, two logarithms a token before all,
and not the memory, is what the instruction count of the compiled kernel lets one expect as its limit.
"""

# Kernel parameters are pointers and compile-time values, for which Python has no annotations.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from kernels.gumbel_sample.reference import PHILOX_KEY_STEPS, PHILOX_MULTIPLIERS, check_arguments

_MAX_TILE = 2048
_MIN_TILE = 16
_NUM_WARPS = 4

_MULTIPLIER_0 = tl.constexpr(PHILOX_MULTIPLIERS[0])
_MULTIPLIER_1 = tl.constexpr(PHILOX_MULTIPLIERS[1])
_KEY_STEP_0 = tl.constexpr(PHILOX_KEY_STEPS[0])
_KEY_STEP_1 = tl.constexpr(PHILOX_KEY_STEPS[1])


@triton.jit
def _philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 operands, written out so that the bits are ours and not a library's."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, _MULTIPLIER_0)
        high1 = tl.umulhi(c2, _MULTIPLIER_1)
        low0 = c0 * _MULTIPLIER_0
        low1 = c2 * _MULTIPLIER_1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + _KEY_STEP_0
        k1 = k1 + _KEY_STEP_1
    return c0, c1, c2, c3


@triton.jit
def _gumbel_noise(seed, position, lane, first_token, TILE: tl.constexpr):
    """Return the float32 noise of tokens first_token .. first_token + TILE - 1; first_token % 4 == 0."""
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
    # (k + 1/2) / 2**23 without an integer conversion: k becomes the significand of 1 + k / 2**23,
    # and the difference is exact.
    uniform = ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - (1.0 - 1.0 / 16777216.0)
    return -tl.log(-tl.log(uniform))


@triton.jit
def _load_row_scale(temperature_ptr, row):
    """Return (T == 0, 1 / T or 1), the quotient rounded as IEEE 754 asks, as in the reference."""
    temperature = tl.load(temperature_ptr + row)
    is_greedy = temperature == 0.0
    inverse = tl.div_rn(1.0, tl.where(is_greedy, 1.0, temperature))
    return is_greedy, inverse


# An integer argument equal to 1 is made a compile-time constant, which has no dtype to convert from.
@triton.jit(do_not_specialize=["num_tiles", "lane"])
def _sample_tile_kernel(
    logits_ptr,
    seeds_ptr,
    positions_ptr,
    temperature_ptr,
    threshold_ptr,
    best_ptr,
    token_ptr,
    maximum_ptr,
    sum_ptr,
    row_stride,
    vocab_size,
    num_tiles,
    lane,
    HAS_THRESHOLD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reduce one tile to its best perturbed value and token, its maximum x and sum of exp(x - maximum)."""
    program = tl.program_id(0)
    row = (program // num_tiles).to(tl.int64)
    first_token = (program % num_tiles) * TILE
    tokens = first_token + tl.arange(0, TILE)
    is_greedy, inverse = _load_row_scale(temperature_ptr, row)

    logits = tl.load(
        logits_ptr + row * row_stride + tokens.to(tl.int64),
        mask=tokens < vocab_size,
        other=float("-inf"),
    )
    x = logits.to(tl.float32) * inverse
    if HAS_THRESHOLD:
        is_cut = (x < tl.load(threshold_ptr + row)) & (is_greedy == 0)
        x = tl.where(is_cut, float("-inf"), x)

    maximum = tl.max(x, 0)
    # A tile without any token left would otherwise take -inf - -inf.
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.exp(x - shift), 0)

    seed = tl.load(seeds_ptr + row)
    position = tl.load(positions_ptr + row)
    noise = _gumbel_noise(seed, position, lane, first_token, TILE)
    perturbed = tl.where(is_greedy, x, x + noise)
    best, place = tl.max(perturbed, 0, return_indices=True, return_indices_tie_break_left=True)

    slot = program.to(tl.int64)
    tl.store(best_ptr + slot, best)
    tl.store(token_ptr + slot, first_token + place)
    tl.store(maximum_ptr + slot, maximum)
    tl.store(sum_ptr + slot, total)


@triton.jit(do_not_specialize=["num_tiles"])
def _merge_tiles_kernel(
    logits_ptr,
    temperature_ptr,
    best_ptr,
    token_ptr,
    maximum_ptr,
    sum_ptr,
    tokens_ptr,
    logprobs_ptr,
    row_stride,
    vocab_size,
    num_tiles,
    TILES: tl.constexpr,
):
    """Merge the tiles of one row; the winner's x is read again rather than carried along."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES)
    mask = tiles < num_tiles
    slots = row * num_tiles + tiles

    best = tl.load(best_ptr + slots, mask=mask, other=float("-inf"))
    _, winner = tl.max(best, 0, return_indices=True, return_indices_tie_break_left=True)
    # NaN can win anything, the padding too: the token must stay inside the vocabulary all the same.
    token = tl.load(token_ptr + row * num_tiles + tl.minimum(winner, num_tiles - 1))
    token = tl.minimum(token, vocab_size - 1).to(tl.int64)

    maxima = tl.load(maximum_ptr + slots, mask=mask, other=float("-inf"))
    maximum = tl.max(maxima, 0)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    sums = tl.load(sum_ptr + slots, mask=mask, other=0.0)
    total = tl.sum(sums * tl.exp(maxima - shift), 0)

    _, inverse = _load_row_scale(temperature_ptr, row)
    x = tl.load(logits_ptr + row * row_stride + token).to(tl.float32) * inverse
    is_empty = maximum == float("-inf")
    logprob = (x - shift) - tl.log(tl.where(is_empty, 1.0, total))
    tl.store(tokens_ptr + row, token)
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
    best, maxima, sums = torch.empty(3, num_rows, num_tiles, dtype=torch.float32, device=logits.device)
    winners = torch.empty(num_rows, num_tiles, dtype=torch.int32, device=logits.device)
    seeds, positions, temperature = seeds.contiguous(), positions.contiguous(), temperature.contiguous()
    row_stride = logits.stride(0)
    with torch.cuda.device_of(logits):
        # Without enable_fp_fusion=False, logits * inverse + noise becomes one fused multiply-add and the
        # perturbed value is no longer the reference's.
        _sample_tile_kernel[(num_rows * num_tiles,)](
            logits,
            seeds,
            positions,
            temperature,
            None if threshold is None else threshold.contiguous(),
            best,
            winners,
            maxima,
            sums,
            row_stride,
            vocab_size,
            num_tiles,
            lane,
            HAS_THRESHOLD=threshold is not None,
            TILE=tile,
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
        )
        _merge_tiles_kernel[(num_rows,)](
            logits,
            temperature,
            best,
            winners,
            maxima,
            sums,
            tokens,
            logprobs,
            row_stride,
            vocab_size,
            num_tiles,
            TILES=triton.next_power_of_2(num_tiles),
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
        )
    return tokens, logprobs
