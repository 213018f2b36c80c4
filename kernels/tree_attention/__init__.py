"""Decoding of token trees over a paged cache, INT8 or float, and compaction of what was accepted.

The one dispatcher: CUDA tensors go to the Triton kernels, all others to batched torch operations; it imports
Triton on the first CUDA call. ``batch.py`` documents the rows of a tree, ``reference.py`` is what both are tested
against. Writing is ``kernels.kv_attention.write_kv``'s: before attention, row i of a tree goes to the slot of
position base + i, whatever its depth.

On the CPU a step's plan serves all layers: ``plan_step``, then ``paged_step_attention_cpu`` a layer, where requests
without trees take part; ``plan_tree_attention``, then ``paged_tree_attention_cpu``, for the trees alone.
"""

from collections.abc import Sequence

import torch

from kernels.tree_attention.batch import TreeBatch, tree_batch
from kernels.tree_attention.cache import PagedCache, PlainCache, plain_cache_from_pages
from kernels.tree_attention.compact_cpu import compact_kv_cpu
from kernels.tree_attention.cpu import paged_tree_attention_cpu, tree_attention_cpu
from kernels.tree_attention.moves import SlotMoves, accepted_moves
from kernels.tree_attention.plan import TreePlan, plan_tree_attention
from kernels.tree_attention.step import StepPlan, paged_step_attention_cpu, plan_step

__all__ = [
    "PagedCache",
    "PlainCache",
    "SlotMoves",
    "StepPlan",
    "TreeBatch",
    "TreePlan",
    "accepted_moves",
    "compact_kv",
    "paged_step_attention_cpu",
    "paged_tree_attention_cpu",
    "plain_cache_from_pages",
    "plan_step",
    "plan_tree_attention",
    "tree_attention",
    "tree_batch",
]


def tree_attention(
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
    """Attend with each row of each request's tree to the prefix, its ancestors and itself.

    Args:
        query: [T, Hq, D] float32, bfloat16 or float16, of a float cache its dtype; Hq a multiple of Hkv.
        cache: This layer's cache, already holding the rows' own tokens.
        trees: The step's trees, on the cache's device.
        block_table: [B, max_blocks] integer; entries past a sequence's end are not read.
        seq_lens: [B] integer, lengths with all rows of the trees.
        scale: Factor of the scores.
        max_seq_len: CUDA only: upper bound of seq_lens known on the host, None the table's.
        split_tokens: CUDA only: tokens one program attends to, a multiple of 128; None lets the shapes decide.

    Returns:
        (output [T, Hq, D] in the query's dtype, log-sum-exp [T, Hq] float32). Rows of no request give 0 and -inf.

    Raises:
        ValueError: A shape, dtype, device, stride or (where it costs no sync) length is wrong.
    """
    if query.is_cuda:
        from kernels.tree_attention.triton_attend import tree_attention_triton

        return tree_attention_triton(
            query,
            cache,
            trees=trees,
            block_table=block_table,
            seq_lens=seq_lens,
            scale=scale,
            max_seq_len=max_seq_len,
            split_tokens=split_tokens,
        )
    return tree_attention_cpu(query, cache, trees=trees, block_table=block_table, seq_lens=seq_lens, scale=scale)


def compact_kv(caches: Sequence[PagedCache], moves: SlotMoves) -> None:
    """Move the keys and values of a step's accepted rows to the slots of their positions, in every layer.

    Copies are of the stored bits: codes and scales, or elements.

    Args:
        caches: One for each layer, whose blocks are those of one block table; written in place.
        moves: From ``accepted_moves``, on the caches' device.

    Raises:
        ValueError: A device or (where it costs no sync) a slot is wrong.
    """
    if moves.sources.is_cuda:
        from kernels.tree_attention.triton_compact import compact_kv_triton as implementation
    else:
        implementation = compact_kv_cpu
    implementation(caches, moves)
