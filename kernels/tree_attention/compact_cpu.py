"""Compaction on the CPU: all moves of a step at once, one gather and one scatter of each of a cache's tensors.

Everything is read before anything is written, so sources and targets may overlap.
"""

from collections.abc import Sequence

import torch

from kernels.tree_attention.cache import PagedCache, check_moves
from kernels.tree_attention.moves import SlotMoves
from kernels.tree_attention.reference import cache_tensors


@torch.no_grad()
def compact_kv_cpu(caches: Sequence[PagedCache], moves: SlotMoves) -> None:
    """Move the slots of all caches, whose blocks are those of one block table. See ``compact_kv``."""
    check_moves(caches, moves)
    if not len(moves.sources):
        return
    # Layers mostly agree; where they do not, the places are found anew.
    block_size = 0
    for cache in caches:
        if cache.block_size != block_size:
            block_size = cache.block_size
            source = moves.sources // block_size, moves.sources % block_size
            target = moves.targets // block_size, moves.targets % block_size
        for tensor in cache_tensors(cache):
            tensor[target] = tensor[source]
