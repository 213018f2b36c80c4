"""Triton compaction of accepted slots: one launch for each layer's cache, no memory between.

Owns the kernel and its launch. A program takes all moves of one request for some part of a slot, in their order:
each goes to the left and none overwrites what a later one reads, so the ranges may overlap. Every element is loaded
and stored by one thread, whose own accesses stay in order, so nothing needs to wait.
"""

# Kernel parameters are pointers and compile-time values, for which Python has no annotations.
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.kv_attention.cache import KVCache
from kernels.tree_attention.cache import PagedCache, check_moves
from kernels.tree_attention.moves import SlotMoves

_NUM_WARPS = 4


@triton.jit
def _compact_kernel(
    first_ptr,
    second_ptr,
    source_ptr,
    target_ptr,
    start_ptr,
    first_strides,
    second_strides,
    num_heads,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Move one request's slots of two tensors [num_blocks, BLOCK_SIZE, num_heads, WIDTH] of one dtype."""
    request = tl.program_id(0)
    heads = tl.arange(0, HEADS).to(tl.int64)
    elements = tl.arange(0, WIDTH)
    mask = (heads < num_heads)[:, None] & (elements >= 0)[None, :]
    first = first_ptr + (heads * first_strides[2])[:, None] + (elements * first_strides[3])[None, :]
    second = second_ptr + (heads * second_strides[2])[:, None] + (elements * second_strides[3])[None, :]
    for move in range(tl.load(start_ptr + request), tl.load(start_ptr + request + 1)):
        source = tl.load(source_ptr + move)
        target = tl.load(target_ptr + move)
        from_block = source // BLOCK_SIZE
        from_offset = source % BLOCK_SIZE
        to_block = target // BLOCK_SIZE
        to_offset = target % BLOCK_SIZE
        moved = tl.load(first + from_block * first_strides[0] + from_offset * first_strides[1], mask=mask)
        tl.store(first + to_block * first_strides[0] + to_offset * first_strides[1], moved, mask=mask)
        moved = tl.load(second + from_block * second_strides[0] + from_offset * second_strides[1], mask=mask)
        tl.store(second + to_block * second_strides[0] + to_offset * second_strides[1], moved, mask=mask)


@torch.no_grad()
def compact_kv_triton(caches: Sequence[PagedCache], moves: SlotMoves) -> None:
    """Move the slots of all caches without waiting for the device. See ``compact_kv``.

    Raises:
        ValueError: A device is wrong. Slots on a device are not read.
    """
    check_moves(caches, moves)
    num_requests = len(moves.start_loc) - 1
    if not len(moves.sources):
        return
    for cache in caches:
        pairs = [(cache.key, cache.value)]
        if isinstance(cache, KVCache):
            pairs = [(cache.key.view(torch.int32), cache.value.view(torch.int32))]
            pairs.append((cache.key_scale.unsqueeze(3), cache.value_scale.unsqueeze(3)))
        with torch.cuda.device_of(cache.key):
            for first, second in pairs:
                _compact_kernel[(num_requests,)](
                    first,
                    second,
                    moves.sources,
                    moves.targets,
                    moves.start_loc,
                    first.stride(),
                    second.stride(),
                    cache.num_kv_heads,
                    BLOCK_SIZE=cache.block_size,
                    HEADS=triton.next_power_of_2(cache.num_kv_heads),
                    WIDTH=first.shape[3],
                    num_warps=_NUM_WARPS,
                )
