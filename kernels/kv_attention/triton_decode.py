"""Triton decoding over the INT8 KV cache: attention to splits of each context, then their merge.

Owns the two kernels and their launch; the arithmetic is ``triton_tile.py``'s, the contract ``reference.py``'s.

All query heads of a KV head share one program, which thus reads keys and values once. Each context is cut into
splits of a fixed number of tokens, merged in order by log-sum-exp (Flash-Decoding, Dao et al., 2023). The grid
follows from shapes and max_seq_len alone, lengths are read on the device: nothing waits, and a CUDA graph can
replay the launches. A row's bits depend on ``split_tokens``, not on other rows or on max_seq_len: pass one to
have them independent of the batch's size too.
"""

# Kernel parameters are pointers and compile-time values, for which Python has no annotations.
# mypy: disable-error-code="no-untyped-def"

import functools
import math

import torch
import triton
import triton.language as tl

from kernels.kv_attention.cache import KVCache, check_attention
from kernels.kv_attention.triton_tile import codes_to_float, find_slots, normalise_query, weigh, words_to_floats

_MIN_SPLIT_TOKENS = 256
_MAX_SPLIT_TOKENS = 4096
_PROGRAMS_PER_SM = 8
_ROWS = 16
"""Query heads of a program: what a tensor core product has at least. More heads take more programs."""
_MERGE_SPLITS = 16
_MAX_TILE = 128
_FLOAT32_TILE = 32

_LOG2_E = math.log2(math.e)
_LN_2 = tl.constexpr(math.log(2.0))


# An integer argument equal to 1 is made a compile-time constant, and each such pattern compiles anew.
@triton.jit(do_not_specialize=["num_splits", "split_tokens"])
def _decode_split_kernel(
    query_ptr,
    table_ptr,
    seq_lens_ptr,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    partial_ptr,
    partial_lse_ptr,
    query_strides,
    table_stride,
    key_strides,
    value_strides,
    key_scale_strides,
    value_scale_strides,
    score_scale,
    num_splits,
    split_tokens,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Attend with one sequence's query heads of one KV head, at most ROWS, to one split of its context.

    Values come as words of four codes: a word's bytes go to four products of a quarter of the head each, because
    pairs of tokens, as the tensor core wants them, then form by permuting bytes of registers.
    """
    WORDS: tl.constexpr = HEAD_DIM // 4
    PARTS: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    # The heads of the same tokens, neighbours in memory, run together.
    kv_head = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens_ptr + sequence).to(tl.int32)
    begin = split * split_tokens
    if begin < length:
        end = tl.minimum(begin + split_tokens, length)
        group_heads = part * ROWS + tl.arange(0, ROWS)
        dims = tl.arange(0, HEAD_DIM)
        words = tl.arange(0, WORDS)
        heads = kv_head * GROUP + group_heads
        mask = group_heads < GROUP
        query = tl.load(
            query_ptr + sequence * query_strides[0] + (heads * query_strides[1])[:, None] + dims[None, :],
            mask=mask[:, None],
            other=0.0,
        )
        query, power = normalise_query(query)
        score_scale = score_scale * power
        table_ptr += sequence * table_stride
        key_ptr += kv_head * key_strides[2]
        value_ptr += kv_head * value_strides[2]
        key_scale_ptr += kv_head * key_scale_strides[2]
        value_scale_ptr += kv_head * value_scale_strides[2]

        output0 = tl.zeros([ROWS, WORDS], tl.float32)
        output1 = tl.zeros([ROWS, WORDS], tl.float32)
        output2 = tl.zeros([ROWS, WORDS], tl.float32)
        output3 = tl.zeros([ROWS, WORDS], tl.float32)
        total = tl.zeros([ROWS, TILE], tl.float32)
        maximum = tl.full([ROWS], float("-inf"), tl.float32)
        for start in range(begin, end, TILE):
            tokens = start + tl.arange(0, TILE)
            # Past the end the last token is read again and hidden: no address and no scale is out of use.
            block, offset = find_slots(tl.minimum(tokens, end - 1), table_ptr, BLOCK_SIZE)
            key = tl.load(key_ptr + (block * key_strides[0] + offset * key_strides[1])[:, None] + dims[None, :])
            value = tl.load(
                value_ptr + (block * value_strides[0] + offset * value_strides[1])[:, None] + words[None, :]
            )
            key_scale = tl.load(key_scale_ptr + block * key_scale_strides[0] + offset * key_scale_strides[1])
            value_scale = tl.load(value_scale_ptr + block * value_scale_strides[0] + offset * value_scale_strides[1])
            scores = tl.dot(query, tl.trans(codes_to_float(key, query.dtype)), input_precision="ieee")
            scores = tl.where(tokens[None, :] < end, scores * (key_scale * score_scale)[None, :], float("-inf"))
            weights, keep, maximum = weigh(scores, value_scale, maximum)
            # Not summed over the tile's columns before the end: that would cost a barrier in each step.
            total = total * keep[:, None] + weights
            weights = (weights * value_scale[None, :]).to(query.dtype)
            value0, value1, value2, value3 = words_to_floats(value, query.dtype)
            output0 = tl.dot(weights, value0, output0 * keep[:, None], input_precision="ieee")
            output1 = tl.dot(weights, value1, output1 * keep[:, None], input_precision="ieee")
            output2 = tl.dot(weights, value2, output2 * keep[:, None], input_precision="ieee")
            output3 = tl.dot(weights, value3, output3 * keep[:, None], input_precision="ieee")

        row_total = tl.sum(total, 1)
        output = tl.interleave(tl.interleave(output0, output2), tl.interleave(output1, output3))
        # [B, Hq, num_splits, D]: the merge reads a head's splits in a row.
        slots = (sequence * (tl.num_programs(0) // PARTS * GROUP) + heads) * num_splits + split
        pointers = partial_ptr + (slots * HEAD_DIM)[:, None] + dims[None, :]
        tl.store(pointers, output / row_total[:, None], mask=mask[:, None])
        tl.store(partial_lse_ptr + slots, maximum + tl.log2(row_total), mask=mask)


@triton.jit(do_not_specialize=["num_splits", "split_tokens"])
def merge_splits_kernel(
    partial_ptr,
    partial_lse_ptr,
    seq_lens_ptr,
    output_ptr,
    lse_ptr,
    num_splits,
    split_tokens,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Merge the splits of one sequence and query head in their order; without any, give 0 and -inf."""
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    row = sequence * tl.num_programs(0) + head
    used_splits = tl.cdiv(tl.load(seq_lens_ptr + sequence).to(tl.int32), split_tokens)
    dims = tl.arange(0, HEAD_DIM)
    output = tl.zeros([HEAD_DIM], tl.float32)
    total = tl.zeros([SPLITS], tl.float32)
    maximum = tl.full([], float("-inf"), tl.float32)
    for start in range(0, used_splits, SPLITS):
        splits = start + tl.arange(0, SPLITS)
        mask = splits < used_splits
        slots = row * num_splits + splits
        lse = tl.load(partial_lse_ptr + slots, mask=mask, other=float("-inf"))
        partial = tl.load(partial_ptr + (slots * HEAD_DIM)[:, None] + dims[None, :], mask=mask[:, None], other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(lse, 0))
        keep = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(lse - new_maximum)
        total = total * keep + weights
        output = output * keep + tl.sum(partial * weights[:, None], 0)
        maximum = new_maximum
    is_empty = used_splits == 0
    row_total = tl.where(is_empty, 1.0, tl.sum(total, 0))
    tl.store(output_ptr + row * HEAD_DIM + dims, (output / row_total).to(output_ptr.dtype.element_ty))
    tl.store(lse_ptr + row, tl.where(is_empty, float("-inf"), (maximum + tl.log2(row_total)) * _LN_2))


def default_split_tokens(num_sequences: int, num_kv_heads: int, max_seq_len: int, num_sms: int) -> int:
    """Return the power of two that makes 8 to 16 programs for each multiprocessor, within [256, 4096].

    Fewer would leave much of the last wave empty; shorter splits would write more partial results than they are
    worth: those of 16 heads are as many bytes as 32 tokens.
    """
    tokens = num_sequences * num_kv_heads * max_seq_len // (_PROGRAMS_PER_SM * num_sms)
    return min(_MAX_SPLIT_TOKENS, max(_MIN_SPLIT_TOKENS, 1 << max(0, tokens.bit_length() - 1)))


@torch.no_grad()
def decode_attention_triton(
    query: torch.Tensor,
    cache: KVCache,
    *,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    max_seq_len: int | None = None,
    split_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with one row a sequence, without waiting for the device; a CUDA graph can capture it.

    Args:
        query: [B, Hq, D] float32, bfloat16 or float16.
        cache: This layer's cache, already holding the rows' own tokens.
        block_table: [B, max_blocks] integer; entries past a sequence's end are not read.
        seq_lens: [B] integer; 0 gives output 0 and log-sum-exp -inf.
        scale: Factor of the scores.
        max_seq_len: Upper bound of seq_lens; None: max_blocks * block_size.
        split_tokens: Tokens a program attends to, a multiple of 128; None: from the shapes and the device.

    Returns:
        (output [B, Hq, D] in the query's dtype, log-sum-exp [B, Hq] float32).

    Raises:
        ValueError: A shape, dtype, device, stride, max_seq_len or split_tokens is wrong. Values on the device
            are not read.
    """
    check_attention(query, cache, block_table, None, seq_lens, scale)
    num_sequences, num_query_heads, head_dim = query.shape
    limit = block_table.shape[1] * cache.block_size
    if max_seq_len is None:
        max_seq_len = limit
    if not 0 <= max_seq_len <= limit:
        raise ValueError(f"max_seq_len: got {max_seq_len}, expected [0, {limit}] (max_blocks * block_size)")
    if split_tokens is None:
        split_tokens = default_split_tokens(num_sequences, cache.num_kv_heads, max_seq_len, _num_sms(query.device))
    if split_tokens <= 0 or split_tokens % _MAX_TILE:
        raise ValueError(f"split_tokens: got {split_tokens}, expected a positive multiple of {_MAX_TILE}")
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    if not num_sequences:
        return output, lse
    num_splits = max(1, triton.cdiv(max_seq_len, split_tokens))
    partial_shape = (num_sequences, num_query_heads, num_splits)
    partial = torch.empty((*partial_shape, head_dim), dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(partial_shape, dtype=torch.float32, device=query.device)
    seq_lens = seq_lens.contiguous()
    if block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    words = cache.value.view(torch.int32)
    group = num_query_heads // cache.num_kv_heads
    is_float32 = query.dtype == torch.float32
    with torch.cuda.device_of(query):
        _decode_split_kernel[(cache.num_kv_heads * triton.cdiv(group, _ROWS), num_splits, num_sequences)](
            query,
            block_table,
            seq_lens,
            cache.key,
            words,
            cache.key_scale,
            cache.value_scale,
            partial,
            partial_lse,
            query.stride()[:2],
            block_table.stride(0),
            cache.key.stride()[:3],
            words.stride()[:3],
            cache.key_scale.stride(),
            cache.value_scale.stride(),
            scale * _LOG2_E,
            num_splits,
            split_tokens,
            GROUP=group,
            BLOCK_SIZE=cache.block_size,
            TILE=_FLOAT32_TILE if is_float32 else head_dim,
            ROWS=_ROWS,
            HEAD_DIM=head_dim,
            # A warp takes 32 elements of the head: fewer, and warps would repeat one another's products.
            num_warps=head_dim // 32,
            num_stages=3,
        )
        merge_splits_kernel[(num_query_heads, num_sequences)](
            partial,
            partial_lse,
            seq_lens,
            output,
            lse,
            num_splits,
            split_tokens,
            SPLITS=_MERGE_SPLITS,
            HEAD_DIM=head_dim,
            num_warps=4,
        )
    return output, lse


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
