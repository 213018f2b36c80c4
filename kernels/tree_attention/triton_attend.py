"""Triton decoding of token trees over a paged cache: attention to splits of each context, then their merge.

Owns the split kernel and the launch; the merge is decoding's, the arithmetic over INT8 ``triton_tile.py``'s, the
contract ``reference.py``'s.

All rows of a tree and all query heads of one KV head share a tile of a product, so that the prefix is read from
memory once for all of them; where they are more than a tile holds, the programs of the same tokens run side by side
and find them in the second-level cache. Prefix tiles need no mask; the tree's own tokens, the last ones, are masked
by ancestors, and their part is merged with the prefix's by log-sum-exp, as splits are (Flash-Decoding, Dao et al.,
2023). As in decoding, the grid follows from shapes and max_seq_len alone and nothing waits for the device.

What this can cost: the bytes read are decoding's, the arithmetic is its (N + 1)-fold. Over INT8 a token of one KV
head is 2 D + 8 bytes and 4 D (N + 1) G operations for a group of G heads, so with 16 nodes and D = 128 about 33 G
operations a byte; a tree is as fast as a decoding row up to the device's own ratio, and slower beyond it.
"""

# Kernel parameters are pointers and compile-time values, for which Python has no annotations.
# mypy: disable-error-code="no-untyped-def"

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.kv_attention.cache import KVCache
from kernels.kv_attention.triton_decode import merge_splits_kernel
from kernels.kv_attention.triton_tile import codes_to_float, find_slots, normalise_query, weigh
from kernels.tree_attention.batch import TreeBatch
from kernels.tree_attention.cache import PagedCache, check_tree_attention

_MIN_SPLIT_TOKENS = 512
_MAX_SPLIT_TOKENS = 8192
_PROGRAMS_PER_SM = 2
_MIN_ROWS = 16
_MAX_ROWS = 64
"""Rows times query heads of a program: what a tensor core product has at least, what its registers hold with the
output's accumulators."""
_FLOAT32_ROWS = 16
_MERGE_SPLITS = 16
_MAX_TILE = 128
_TILE = 64
_SHORT_TILE = 32
"""Tokens of a tile for float32, and for INT8 where a program has the most rows and a long head: its registers hold
no more."""

_LOG2_E = math.log2(math.e)
_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b):
    """Return a @ b in float32. The interpreter multiplies bfloat16 as the integers it keeps it in."""
    if _IS_INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _dot_add(a, b, c):
    """Return a @ b + c in float32."""
    if _IS_INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    else:
        return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def _attend_tile(
    query,
    tokens,
    end,
    is_seen,
    state,
    pointers,
    strides,
    score_scale,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    """Take a tile of tokens, of which each row sees is_seen [ROWS, TILE], into a row's state.

    Args:
        state: (output [ROWS, HEAD_DIM], total [ROWS], maximum [ROWS]).
    """
    output, total, maximum = state
    table_ptr, key_ptr, value_ptr, key_scale_ptr, value_scale_ptr = pointers
    key_strides, value_strides, key_scale_strides, value_scale_strides = strides
    dims = tl.arange(0, HEAD_DIM)
    # Past the end the last token is read again and hidden: no address and no scale is out of use.
    block, offset = find_slots(tl.minimum(tokens, end - 1), table_ptr, BLOCK_SIZE)
    key_slots = block * key_strides[0] + offset * key_strides[1]
    key = tl.load(key_ptr + key_slots[:, None] + (dims * key_strides[3])[None, :])
    value = tl.load(value_ptr + (block * value_strides[0] + offset * value_strides[1])[:, None] + dims[None, :])
    if IS_INT8:
        key_scale = tl.load(key_scale_ptr + block * key_scale_strides[0] + offset * key_scale_strides[1])
        value_scale = tl.load(value_scale_ptr + block * value_scale_strides[0] + offset * value_scale_strides[1])
        score_scale = (key_scale * score_scale)[None, :]
        key = codes_to_float(key, query.dtype)
        value = codes_to_float(value, query.dtype)
    else:
        value_scale = tl.full(tokens.shape, 1.0, tl.float32)
    scores = tl.where(is_seen, _dot(query, tl.trans(key)) * score_scale, float("-inf"))
    weights, keep, maximum = weigh(scores, value_scale, maximum)
    total = total * keep + tl.sum(weights, 1)
    weights = (weights * value_scale[None, :]).to(query.dtype)
    return _dot_add(weights, value, output * keep[:, None]), total, maximum


# An integer argument equal to 1 is made a compile-time constant, and each such pattern compiles anew.
@triton.jit(do_not_specialize=["num_splits", "split_tokens"])
def _tree_split_kernel(
    query_ptr,
    table_ptr,
    query_start_ptr,
    seq_lens_ptr,
    mask_ptr,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    partial_ptr,
    partial_lse_ptr,
    row_lens_ptr,
    query_strides,
    table_stride,
    mask_stride,
    key_strides,
    value_strides,
    key_scale_strides,
    value_scale_strides,
    score_scale,
    num_splits,
    split_tokens,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    """Attend with ROWS of one tree's rows and query heads of one KV head to one split of its context."""
    # The parts of the same tokens, and heads that are neighbours in memory, run together.
    kv_head = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    split = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    first_row = tl.load(query_start_ptr + request).to(tl.int64)
    count = (tl.load(query_start_ptr + request + 1) - first_row).to(tl.int32)
    length = tl.load(seq_lens_ptr + request).to(tl.int32)
    rows = part * ROWS + tl.arange(0, ROWS)
    tree_rows = rows // GROUP
    mask = tree_rows < count
    begin = split * split_tokens
    if part * ROWS < count * GROUP:
        flat = first_row + tree_rows
        if split == 0:
            tl.store(row_lens_ptr + flat, length, mask=mask)
        if begin < length:
            end = tl.minimum(begin + split_tokens, length)
            dims = tl.arange(0, HEAD_DIM)
            heads = kv_head * GROUP + rows % GROUP
            query = tl.load(
                query_ptr + (flat * query_strides[0] + heads * query_strides[1])[:, None] + dims[None, :],
                mask=mask[:, None],
                other=0.0,
            )
            if IS_INT8:
                query, power = normalise_query(query)
                score_scale = score_scale * power
            pointers = (
                table_ptr + request * table_stride,
                key_ptr + kv_head * key_strides[2],
                value_ptr + kv_head * value_strides[2],
                key_scale_ptr + kv_head * key_scale_strides[2],
                value_scale_ptr + kv_head * value_scale_strides[2],
            )
            strides = (key_strides, value_strides, key_scale_strides, value_scale_strides)
            state = (
                tl.zeros([ROWS, HEAD_DIM], tl.float32),
                tl.zeros([ROWS], tl.float32),
                tl.full([ROWS], float("-inf"), tl.float32),
            )
            # Tiles up to the root need no mask.
            base = length - count
            unmasked = tl.maximum(tl.minimum(end, base + 1) - begin, 0) // TILE * TILE
            everything = tl.full([ROWS, TILE], 1, tl.int1)
            for start in range(begin, begin + unmasked, TILE):
                state = _attend_tile(
                    query,
                    start + tl.arange(0, TILE),
                    end,
                    everything,
                    state,
                    pointers,
                    strides,
                    score_scale,
                    BLOCK_SIZE,
                    HEAD_DIM,
                    IS_INT8,
                )
            for start in range(begin + unmasked, end, TILE):
                tokens = start + tl.arange(0, TILE)
                nodes = tokens - base
                is_node = (nodes > 0) & (nodes < count)
                is_ancestor = tl.load(
                    mask_ptr + (flat * mask_stride)[:, None] + nodes[None, :],
                    mask=mask[:, None] & is_node[None, :],
                    other=0,
                )
                state = _attend_tile(
                    query,
                    tokens,
                    end,
                    ((nodes <= 0)[None, :] | (is_ancestor != 0)) & (tokens < end)[None, :],
                    state,
                    pointers,
                    strides,
                    score_scale,
                    BLOCK_SIZE,
                    HEAD_DIM,
                    IS_INT8,
                )

            output, total, maximum = state
            # Not every row sees something of every split.
            is_empty = total == 0.0
            row_total = tl.where(is_empty, 1.0, total)
            # [T, Hq, num_splits, D]: the merge reads a head's splits in a row.
            slots = (flat * (tl.num_programs(0) // PARTS * GROUP) + heads) * num_splits + split
            partial_ptrs = partial_ptr + (slots * HEAD_DIM)[:, None] + dims[None, :]
            tl.store(partial_ptrs, output / row_total[:, None], mask=mask[:, None])
            lse = tl.where(is_empty, float("-inf"), maximum + tl.log2(row_total))
            tl.store(partial_lse_ptr + slots, lse, mask=mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How the rows and query heads of one KV head are cut.

    Attributes:
        num_rows: Of a program, a power of two.
        num_parts: Programs for the largest tree.
        tile: Tokens of a step.
    """

    num_rows: int
    num_parts: int
    tile: int


def choose_launch(num_rows: int, head_dim: int, *, is_int8: bool, is_float32: bool) -> Launch:
    """Choose a launch for at most num_rows rows times query heads of a KV head."""
    most = _FLOAT32_ROWS if is_float32 else _MAX_ROWS
    rows = min(most, max(_MIN_ROWS, triton.next_power_of_2(num_rows)))
    is_short = is_float32 or (is_int8 and rows == _MAX_ROWS and head_dim == 128)
    return Launch(num_rows=rows, num_parts=triton.cdiv(num_rows, rows), tile=_SHORT_TILE if is_short else _TILE)


def default_split_tokens(num_programs: int, max_seq_len: int, num_sms: int) -> int:
    """Return the power of two that gives each multiprocessor 2 to 4 programs, within [512, 8192].

    Args:
        num_programs: Programs if contexts were not split.
        max_seq_len: Tokens of the longest.
        num_sms: Multiprocessors.

    A tile of a whole tree has the work of many decoding rows, and a shorter split would write more partial results
    than it is worth: those of 17 rows and 16 heads are as many bytes as 527 tokens of one KV head in INT8.
    """
    tokens = num_programs * max_seq_len // (_PROGRAMS_PER_SM * num_sms)
    return min(_MAX_SPLIT_TOKENS, max(_MIN_SPLIT_TOKENS, 1 << max(0, tokens.bit_length() - 1)))


@torch.no_grad()
def tree_attention_triton(
    query: torch.Tensor,
    cache: PagedCache,
    *,
    trees: TreeBatch,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    max_seq_len: int | None = None,
    split_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with the rows of each request's tree, without waiting for the device.

    Args:
        query: [T, Hq, D] float32, bfloat16 or float16, of a float cache its dtype.
        cache: This layer's cache, already holding the rows' own tokens.
        trees: The step's trees, on the device.
        block_table: [B, max_blocks] integer; entries past a sequence's end are not read.
        seq_lens: [B] integer, lengths with all rows of the trees.
        scale: Factor of the scores.
        max_seq_len: Upper bound of seq_lens; None: max_blocks * block_size.
        split_tokens: Tokens a program attends to, a multiple of 128; None: from the shapes and the device.

    Returns:
        (output [T, Hq, D] in the query's dtype, log-sum-exp [T, Hq] float32). Rows of no request give 0 and -inf.

    Raises:
        ValueError: A shape, dtype, device, stride, max_seq_len or split_tokens is wrong. Values on the device
            are not read.
    """
    check_tree_attention(query, cache, trees, block_table, seq_lens, scale)
    num_rows, num_query_heads, head_dim = query.shape
    group = num_query_heads // cache.num_kv_heads
    is_int8 = isinstance(cache, KVCache)
    launch = choose_launch(trees.max_rows * group, head_dim, is_int8=is_int8, is_float32=query.dtype == torch.float32)
    limit = block_table.shape[1] * cache.block_size
    if max_seq_len is None:
        max_seq_len = limit
    if not 0 <= max_seq_len <= limit:
        raise ValueError(f"max_seq_len: got {max_seq_len}, expected [0, {limit}] (max_blocks * block_size)")
    if split_tokens is None:
        num_programs = trees.num_requests * cache.num_kv_heads * launch.num_parts
        split_tokens = default_split_tokens(num_programs, max_seq_len, _num_sms(query.device))
    if split_tokens <= 0 or split_tokens % _MAX_TILE:
        raise ValueError(f"split_tokens: got {split_tokens}, expected a positive multiple of {_MAX_TILE}")
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    if not num_rows:
        return output, lse
    num_splits = max(1, triton.cdiv(max_seq_len, split_tokens))
    partial_shape = (num_rows, num_query_heads, num_splits)
    partial = torch.empty((*partial_shape, head_dim), dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(partial_shape, dtype=torch.float32, device=query.device)
    # What each row attends to at most; 0 stays where a row is no request's.
    row_lens = torch.zeros(num_rows, dtype=torch.int32, device=query.device)
    if block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    # A float cache has no scales, and its kernel does not look at them.
    scales = (cache.key_scale, cache.value_scale) if isinstance(cache, KVCache) else (partial_lse, partial_lse)
    with torch.cuda.device_of(query):
        if trees.num_requests:
            _tree_split_kernel[(cache.num_kv_heads * launch.num_parts, num_splits, trees.num_requests)](
                query,
                block_table,
                trees.query_start_loc,
                seq_lens.contiguous(),
                trees.mask.view(torch.int8),
                cache.key,
                cache.value,
                *scales,
                partial,
                partial_lse,
                row_lens,
                query.stride()[:2],
                block_table.stride(0),
                trees.mask.stride(0),
                cache.key.stride(),
                cache.value.stride()[:3],
                scales[0].stride(),
                scales[1].stride(),
                scale * _LOG2_E,
                num_splits,
                split_tokens,
                PARTS=launch.num_parts,
                GROUP=group,
                BLOCK_SIZE=cache.block_size,
                TILE=launch.tile,
                ROWS=launch.num_rows,
                HEAD_DIM=head_dim,
                IS_INT8=is_int8,
                num_warps=4,
                num_stages=3,
            )
        merge_splits_kernel[(num_query_heads, num_rows)](
            partial,
            partial_lse,
            row_lens,
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
