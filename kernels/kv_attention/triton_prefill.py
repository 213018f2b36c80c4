"""Triton attention of prefill chunks over the INT8 KV cache.

Owns the kernel and its launch; the arithmetic is ``triton_tile.py``'s, the contract ``reference.py``'s.

A program serves some consecutive tokens of one sequence with all query heads of one KV head, so that a tile of
keys and values is read once for all of them. Keys and values of the chunk itself come back from the cache, as
those of earlier chunks do: a token's result does not hang on where its prompt was cut but for rounding.
"""

# Kernel parameters are pointers and compile-time values, for which Python has no annotations.
# mypy: disable-error-code="no-untyped-def"

import math

import torch
import triton
import triton.language as tl

from kernels.kv_attention.cache import KVCache, check_attention
from kernels.kv_attention.triton_tile import codes_to_float, find_slots, normalise_query, weigh

_ROWS = 128
_TILE = 64
_FLOAT32_ROWS = 16
_FLOAT32_TILE = 32

_LOG2_E = math.log2(math.e)
_LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def _find_sequence(query_start_ptr, num_sequences, tile, TOKENS: tl.constexpr):
    """Return (sequence int64, first token of the tile in it). Sequence b owns the tiles from start[b] // TOKENS + b on.

    These are at least as many as it needs, so the grid's size takes no length that only the device knows.
    """
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle).to(tl.int32) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    first_tile = tl.load(query_start_ptr + low).to(tl.int32) // TOKENS + low
    return tl.full([], 0, tl.int64) + low, (tile - first_tile) * TOKENS


# An integer argument equal to 1 is made a compile-time constant, and each such pattern compiles anew.
@triton.jit(do_not_specialize=["num_sequences"])
def _prefill_kernel(
    query_ptr,
    table_ptr,
    query_start_ptr,
    seq_lens_ptr,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    output_ptr,
    lse_ptr,
    query_strides,
    table_stride,
    key_strides,
    value_strides,
    key_scale_strides,
    value_scale_strides,
    score_scale,
    num_sequences,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Attend with ROWS // GROUP_ROWS consecutive tokens of one sequence and the query heads of one KV head."""
    TOKENS: tl.constexpr = ROWS // GROUP_ROWS
    kv_head = tl.program_id(1).to(tl.int64)
    sequence, first = _find_sequence(query_start_ptr, num_sequences, tl.program_id(0), TOKENS)
    query_start = tl.load(query_start_ptr + sequence).to(tl.int64)
    query_len = (tl.load(query_start_ptr + sequence + 1).to(tl.int64) - query_start).to(tl.int32)
    if first < query_len:
        before = tl.load(seq_lens_ptr + sequence).to(tl.int32) - query_len
        rows = tl.arange(0, ROWS)
        dims = tl.arange(0, HEAD_DIM)
        row_tokens = first + rows // GROUP_ROWS
        group_heads = rows % GROUP_ROWS
        mask = (row_tokens < query_len) & (group_heads < GROUP)
        heads = kv_head * GROUP + group_heads
        flat = query_start + row_tokens
        query = tl.load(
            query_ptr + (flat * query_strides[0] + heads * query_strides[1])[:, None] + dims[None, :],
            mask=mask[:, None],
            other=0.0,
        )
        query, power = normalise_query(query)
        score_scale = score_scale * power
        positions = before + row_tokens
        end = before + tl.minimum(first + TOKENS, query_len)
        table_ptr += sequence * table_stride
        key_ptr += kv_head * key_strides[2]
        value_ptr += kv_head * value_strides[2]
        key_scale_ptr += kv_head * key_scale_strides[2]
        value_scale_ptr += kv_head * value_scale_strides[2]

        output = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        maximum = tl.full([ROWS], float("-inf"), tl.float32)
        for start in range(0, end, TILE):
            tokens = start + tl.arange(0, TILE)
            # Past the end the last token is read again and hidden: no address and no scale is out of use.
            block, offset = find_slots(tl.minimum(tokens, end - 1), table_ptr, BLOCK_SIZE)
            key = tl.load(key_ptr + (block * key_strides[0] + offset * key_strides[1])[:, None] + dims[None, :])
            value = tl.load(value_ptr + (block * value_strides[0] + offset * value_strides[1])[:, None] + dims[None, :])
            key_scale = tl.load(key_scale_ptr + block * key_scale_strides[0] + offset * key_scale_strides[1])
            value_scale = tl.load(value_scale_ptr + block * value_scale_strides[0] + offset * value_scale_strides[1])
            scores = tl.dot(query, tl.trans(codes_to_float(key, query.dtype)), input_precision="ieee")
            scores = scores * (key_scale * score_scale)[None, :]
            scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
            weights, keep, maximum = weigh(scores, value_scale, maximum)
            total = total * keep + tl.sum(weights, 1)
            weights = (weights * value_scale[None, :]).to(query.dtype)
            value = codes_to_float(value, query.dtype)
            output = tl.dot(weights, value, output * keep[:, None], input_precision="ieee")

        slots = flat * (tl.num_programs(1) * GROUP) + heads
        result = (output / total[:, None]).to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + (slots * HEAD_DIM)[:, None] + dims[None, :], result, mask=mask[:, None])
        tl.store(lse_ptr + slots, (maximum + tl.log2(total)) * _LN_2, mask=mask)


@torch.no_grad()
def prefill_attention_triton(
    query: torch.Tensor,
    cache: KVCache,
    *,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with the new tokens of each sequence, without waiting for the device.

    A program walks the whole context of its rows: sequences of one row are served, but better by decoding.

    Args:
        query: [T, Hq, D] float32, bfloat16 or float16.
        cache: This layer's cache, already holding the rows' own tokens.
        block_table: [B, max_blocks] integer; entries past a sequence's end are not read.
        query_start_loc: [B + 1] integer; rows query_start_loc[b] .. query_start_loc[b + 1] - 1 are the last
            tokens of sequence b.
        seq_lens: [B] integer, lengths with the rows' own tokens.
        scale: Factor of the scores.

    Returns:
        (output [T, Hq, D] in the query's dtype, log-sum-exp [T, Hq] float32); rows of no sequence give 0 and
        -inf.

    Raises:
        ValueError: A shape, dtype, device or stride is wrong. Values on the device are not read.
    """
    check_attention(query, cache, block_table, query_start_loc, seq_lens, scale)
    num_rows, num_query_heads, head_dim = query.shape
    output = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.full(query.shape[:2], -torch.inf, device=query.device)
    num_sequences = len(seq_lens)
    if not num_sequences or not num_rows:
        return output, lse
    group = num_query_heads // cache.num_kv_heads
    group_rows = triton.next_power_of_2(group)
    is_float32 = query.dtype == torch.float32
    rows = max(_FLOAT32_ROWS if is_float32 else _ROWS, group_rows)
    if block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    with torch.cuda.device_of(query):
        _prefill_kernel[(num_rows // (rows // group_rows) + num_sequences, cache.num_kv_heads)](
            query,
            block_table,
            query_start_loc.contiguous(),
            seq_lens.contiguous(),
            cache.key,
            cache.value,
            cache.key_scale,
            cache.value_scale,
            output,
            lse,
            query.stride()[:2],
            block_table.stride(0),
            cache.key.stride()[:3],
            cache.value.stride()[:3],
            cache.key_scale.stride(),
            cache.value_scale.stride(),
            scale * _LOG2_E,
            num_sequences,
            GROUP=group,
            GROUP_ROWS=group_rows,
            BLOCK_SIZE=cache.block_size,
            TILE=_FLOAT32_TILE if is_float32 else _TILE,
            ROWS=rows,
            HEAD_DIM=head_dim,
            num_warps=4 if is_float32 else 8,
            num_stages=3,
        )
    return output, lse
