"""The CPU implementations: batched torch operations instead of the reference's loops, same contract.

Owns the arithmetic; ``plan.py`` owns which rows meet which chunks of the cache. Knows nothing of an engine.

A tile's chunks are computed under one maximum within a superchunk, then superchunk by superchunk as online softmax
does (Milakov and Gimelshein, 2018; Dao, FlashAttention-2, 2023). An output row is the same bits in any batch
and however its sequence is cut into steps, wherever the BLAS computes each row of a product alone, as MKL does on
one thread from 4 rows on (see ``plan.py``). This matters beyond rounding: what a layer computes is quantised in the
next one's cache, where a last bit becomes a whole code.
"""

import math
import threading

import torch

from kernels.kv_attention.cache import KVCache, check_attention, check_norm_rope, check_write
from kernels.kv_attention.plan import AttentionPlan, PairBatch, TileGroup, plan_attention
from kernels.kv_attention.reference import norm_rope_reference, quantise


class _Scratch(threading.local):
    """This thread's memory for one gathered batch. Fresh memory would be returned to the system after each
    batch, and its page faults cost more than the products."""

    def __init__(self) -> None:
        self.integers = torch.empty(0, dtype=torch.int8)
        self.floats = torch.empty(0)

    def take(self, num_elements: int) -> tuple[torch.Tensor, torch.Tensor]:
        if len(self.floats) < num_elements:
            self.integers = torch.empty(num_elements, dtype=torch.int8)
            self.floats = torch.empty(num_elements)
        return self.integers[:num_elements], self.floats[:num_elements]


_SCRATCH = _Scratch()


@torch.no_grad()
def paged_attention_cpu(
    query: torch.Tensor, cache: KVCache, *, plan: AttentionPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with every row of a step; decoding rows and prefill chunks may be mixed.

    Args:
        query: [T, Hq, D] float32, bfloat16 or float16, T at least the plan's rows.
        cache: This layer's cache, already holding the rows' own tokens.
        plan: From ``plan_attention`` of this step.
        scale: Factor of the scores.

    Returns:
        (output [T, Hq, D] in the query's dtype, log-sum-exp [T, Hq] float32); rows of no sequence and rows
        of length 0 give 0 and -inf.

    Raises:
        ValueError: Query or cache are not those the plan was made for.
    """
    _check_plan(query, cache, plan)
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = torch.full(query.shape[:2], -torch.inf)
    for group in plan.groups:
        accumulated, total, maximum = _attend_group(group, query, cache, plan, scale)
        num_tiles, height = group.rows.shape
        rows = group.rows.flatten()[group.is_row]
        # [n, Hkv, M, G] to [n * M, Hq], as the query has it.
        shape = (num_tiles, plan.num_kv_heads, height, -1)
        result = accumulated.div_(torch.where(total > 0, total, 1.0).unsqueeze(-1)).unflatten(2, (height, -1))
        result = result.transpose(1, 2).reshape(num_tiles * height, *query.shape[1:])[group.is_row]
        output[rows] = result.to(query.dtype)
        group_lse = (total.log() + maximum).view(shape).transpose(1, 2).reshape(num_tiles * height, -1)
        lse[rows] = group_lse[group.is_row]
    return output, lse


def _check_plan(query: torch.Tensor, cache: KVCache, plan: AttentionPlan) -> None:
    expected = (plan.num_query_heads, plan.head_dim)
    if query.dim() != 3 or len(query) < plan.num_rows or query.shape[1:] != expected:
        raise ValueError(
            f"query: got shape {tuple(query.shape)}, expected [at least {plan.num_rows}, {expected[0]}, {expected[1]}]"
        )
    got = (cache.block_size, cache.num_kv_heads, cache.head_dim)
    if got != (plan.block_size, plan.num_kv_heads, plan.head_dim):
        raise ValueError(
            f"cache: got (block_size, Hkv, D) {got}, expected"
            f" {(plan.block_size, plan.num_kv_heads, plan.head_dim)} as in the plan"
        )


def _attend_group(
    group: TileGroup, query: torch.Tensor, cache: KVCache, plan: AttentionPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the unnormalised output [n, Hkv, M * G, D], its sum and its maximum [n, Hkv, M * G]."""
    num_tiles, height = group.rows.shape
    tiled = query.index_select(0, group.rows.flatten()).float().mul_(scale)
    tiled = tiled.view(num_tiles, height, plan.num_kv_heads, -1, plan.head_dim).transpose(1, 2).flatten(2, 3)
    tiled = tiled.contiguous()
    accumulated = torch.zeros_like(tiled)
    total = torch.zeros(tiled.shape[:3])
    maximum = torch.full(tiled.shape[:3], -torch.inf)
    for batch in group.batches:
        tiles = batch.tiles
        part, part_total, part_maximum = _attend_batch(batch, group, tiled, cache, plan)
        old = maximum[tiles]
        new = torch.maximum(old, part_maximum)
        keep, add = (old - new).exp_(), (part_maximum - new).exp_()
        maximum[tiles] = new
        total[tiles] = total[tiles] * keep + part_total * add
        accumulated[tiles] = accumulated[tiles] * keep.unsqueeze(-1) + part * add.unsqueeze(-1)
    return accumulated, total, maximum


def _attend_batch(
    batch: PairBatch, group: TileGroup, tiled: torch.Tensor, cache: KVCache, plan: AttentionPlan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what ``_attend_group`` accumulates, for the tiles of a batch and their chunks of one superchunk."""
    num_pairs = len(batch.owner)
    num_kv_heads, num_rows, head_dim = tiled.shape[1:]
    height = group.rows.shape[1]
    owner_tile = batch.tiles[batch.owner]
    key, key_scale = gather_chunks(cache.key, cache.key_scale, batch.blocks, num_pairs)
    chunk_tokens = key.shape[1]
    query = tiled.index_select(0, owner_tile).view(-1, num_rows, head_dim)
    scores = torch.bmm(query, key.transpose(1, 2)).view(num_pairs, num_kv_heads, num_rows, chunk_tokens)
    scores.mul_(key_scale)
    tokens = batch.starts.unsqueeze(1) + torch.arange(chunk_tokens)
    if batch.is_partial:
        is_hidden = tokens.unsqueeze(1) > group.positions[owner_tile].unsqueeze(2)
        by_row = scores.view(num_pairs, num_kv_heads, height, -1, chunk_tokens)
        by_row.masked_fill_(is_hidden.view(num_pairs, 1, height, 1, chunk_tokens), -torch.inf)
    maximum = torch.segment_reduce(scores.amax(-1), "max", lengths=batch.counts, axis=0, unsafe=True)
    # A row that sees nothing of this superchunk would otherwise take -inf - -inf.
    shift = maximum.masked_fill(maximum == -torch.inf, 0.0)
    scores.sub_(shift[batch.owner].unsqueeze(-1)).exp_()
    total = torch.zeros_like(maximum).index_add_(0, batch.owner, scores.sum(-1))

    value, value_scale = gather_chunks(cache.value, cache.value_scale, batch.blocks, num_pairs)
    if batch.is_partial:
        # Where the weight is 0 the scale of an unused slot may still be NaN.
        is_unused = tokens >= group.lengths[owner_tile].unsqueeze(1)
        value_scale = value_scale.masked_fill(is_unused.view(num_pairs, 1, 1, chunk_tokens), 0.0)
    scores.mul_(value_scale)
    part = torch.bmm(scores.view(-1, num_rows, chunk_tokens), value).view(num_pairs, num_kv_heads, num_rows, head_dim)
    zeros = torch.zeros(len(batch.tiles), num_kv_heads, num_rows, head_dim)
    return zeros.index_add_(0, batch.owner, part), total, maximum


def gather_chunks(
    codes: torch.Tensor, scales: torch.Tensor, blocks: torch.Tensor, num_pairs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes as float32 [N * Hkv, C, D], valid until the next call, and scales [N, Hkv, 1, C] of N chunks."""
    _, block_size, num_kv_heads, head_dim = codes.shape
    shape = (len(blocks), num_kv_heads, block_size, head_dim)
    integers, floats = _SCRATCH.take(math.prod(shape))
    picked = torch.index_select(codes.transpose(1, 2), 0, blocks, out=integers.view(shape))
    # Head-major copies: [N, P, Hkv, block_size, ..] to [N, Hkv, P, block_size, ..].
    picked = picked.unflatten(0, (num_pairs, -1)).transpose(1, 2)
    chunks = floats.view(picked.shape).copy_(picked).view(num_pairs * num_kv_heads, -1, head_dim)
    picked_scales = scales.transpose(1, 2).index_select(0, blocks).unflatten(0, (num_pairs, -1)).transpose(1, 2)
    return chunks, picked_scales.reshape(num_pairs, num_kv_heads, 1, -1)


@torch.no_grad()
def attention_cpu(
    query: torch.Tensor,
    cache: KVCache,
    *,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    seq_lens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plan and attend in one call; query_start_loc None is decoding. See ``paged_attention_cpu``."""
    check_attention(query, cache, block_table, query_start_loc, seq_lens, scale)
    plan = plan_attention(
        block_table=block_table,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        num_query_heads=query.shape[1],
        cache=cache,
    )
    return paged_attention_cpu(query, cache, plan=plan, scale=scale)


@torch.no_grad()
def write_kv_cpu(key: torch.Tensor, value: torch.Tensor, cache: KVCache, *, slot_mapping: torch.Tensor) -> None:
    """Quantise key and value [T, Hkv, D] and write row t at slot_mapping[t]; -1 writes nothing."""
    check_write(key, value, cache, slot_mapping)
    _write(key, value, cache, slot_mapping)


def _write(key: torch.Tensor, value: torch.Tensor, cache: KVCache, slot_mapping: torch.Tensor) -> None:
    is_used = slot_mapping >= 0
    if not is_used.all():
        key, value, slot_mapping = key[is_used], value[is_used], slot_mapping[is_used]
    place = (slot_mapping // cache.block_size, slot_mapping % cache.block_size)
    cache.key[place], cache.key_scale[place] = quantise(key)
    cache.value[place], cache.value_scale[place] = quantise(value)


@torch.no_grad()
def norm_rope_write_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: KVCache,
    *,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Normalise and rotate query and key, write key and value, return the query [T, Hq, D] in its dtype."""
    check_write(key, value, cache, slot_mapping)
    check_norm_rope(query, key, (q_weight, k_weight), positions, cos_sin_cache, cache)
    key = norm_rope_reference(key, k_weight, eps, positions, cos_sin_cache)
    _write(key, value, cache, slot_mapping)
    return norm_rope_reference(query, q_weight, eps, positions, cos_sin_cache).to(query.dtype)
