"""Plain torch: the definition that the CPU and Triton implementations are tested against.

Owns the arithmetic, row by row and head by head, in float32. Made to be read, not to be fast.

Shape legend: T rows of a step, B requests, Hq query heads, Hkv KV heads, D head dimension.

Source: one pass over a tree of drafts with the ancestors as mask is SpecInfer's (Miao et al., 2024).
"""

from collections.abc import Sequence

import torch

from kernels.kv_attention.cache import KVCache
from kernels.tree_attention.batch import TreeBatch
from kernels.tree_attention.cache import PagedCache, PlainCache, check_tree_attention
from kernels.tree_attention.moves import SlotMoves


def read_tokens(cache: PagedCache, blocks: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return key and value [n, Hkv, D] float32 of one sequence's slots at positions [n]."""
    place = blocks[positions // cache.block_size].long(), positions % cache.block_size
    key, value = cache.key[place].float(), cache.value[place].float()
    if isinstance(cache, PlainCache):
        return key, value
    return key * cache.key_scale[place].unsqueeze(-1), value * cache.value_scale[place].unsqueeze(-1)


@torch.no_grad()
def tree_attention_reference(
    query: torch.Tensor,
    cache: PagedCache,
    *,
    trees: TreeBatch,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (output [T, Hq, D] in the query's dtype, log-sum-exp [T, Hq] float32).

    Row i of a request sees the slots before its root's and those of its ancestors and itself. Rows of no request
    give 0 and -inf.
    """
    check_tree_attention(query, cache, trees, block_table, seq_lens, scale)
    output = torch.zeros_like(query)
    lse = torch.full(query.shape[:2], -torch.inf, device=query.device)
    group = query.shape[1] // cache.num_kv_heads
    starts = trees.query_start_loc.tolist()
    for b, length in enumerate(seq_lens.tolist()):
        base = length - (starts[b + 1] - starts[b])
        prefix = torch.arange(base, device=query.device)
        for row in range(starts[b], starts[b + 1]):
            positions = torch.cat((prefix, base + trees.mask[row].nonzero().squeeze(1)))
            key, value = read_tokens(cache, block_table[b], positions)
            for head in range(query.shape[1]):
                scores = key[:, head // group] @ query[row, head].float() * scale
                output[row, head] = scores.softmax(0) @ value[:, head // group]
                lse[row, head] = scores.logsumexp(0)
    return output, lse


@torch.no_grad()
def compact_kv_reference(caches: Sequence[PagedCache], moves: SlotMoves) -> None:
    """Copy each source slot to its target, one after the other."""
    for cache in caches:
        block_size = cache.block_size
        for source, target in zip(moves.sources.tolist(), moves.targets.tolist(), strict=True):
            for tensor in cache_tensors(cache):
                tensor[divmod(target, block_size)] = tensor[divmod(source, block_size)]


def cache_tensors(cache: PagedCache) -> tuple[torch.Tensor, ...]:
    """Return the tensors [num_blocks, block_size, Hkv, ...] of a cache: its codes and scales, or its elements."""
    if isinstance(cache, KVCache):
        return cache.key, cache.value, cache.key_scale, cache.value_scale
    return cache.key, cache.value
