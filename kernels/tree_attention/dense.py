"""Tree attention over a float cache on the CPU where contexts are short: few operations a layer, no chunks.

A step of a small model is the overhead of its operations, of which ``cpu.py`` needs three times as many. Here each
request's keys and values are gathered whole, padded to the longest, and attended to in one product, as long as that
keeps to ``_MAX_ELEMENTS``; the requests are split where it does not. Nothing is promised but rounding, as for any
float cache.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.tree_attention.batch import TreeBatch
from kernels.tree_attention.cache import PlainCache, check_sequences

_MAX_ELEMENTS = 2**21
"""Of the keys gathered together at most, where one request does not have more: they stay in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseGroup:
    """n requests that are computed together, R rows and P blocks each at most.

    Attributes:
        rows: [n * R] int64 rows of the query; a smaller tree repeats its last row.
        is_row: [m] int64 places that are no repeats.
        targets: [m] int64 rows of the query at these places.
        pages: [n * Hkv * P] int64, block * Hkv + head.
        tail: First token that some row of some request does not see.
        is_hidden: [n, 1, 1, R, P * block_size - tail] bool.
        is_unused: [n, 1, P * block_size - tail, 1] bool: the slot holds nothing.
    """

    rows: torch.Tensor
    is_row: torch.Tensor
    targets: torch.Tensor
    pages: torch.Tensor
    tail: int
    is_hidden: torch.Tensor
    is_unused: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DensePlan:
    """What ``dense_tree_attention_cpu`` needs to know of a step, whatever the layer."""

    groups: tuple[DenseGroup, ...]
    num_query_heads: int
    num_kv_heads: int
    head_dim: int


@torch.no_grad()
def plan_dense(
    *,
    trees: TreeBatch,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    num_query_heads: int,
    cache: PlainCache,
    rows: torch.Tensor | None = None,
) -> DensePlan:
    """Plan one step; arguments as ``plan_tree_attention`` has them.

    Raises:
        ValueError: Lengths do not fit the trees or the block table.
    """
    check_sequences(trees, block_table, seq_lens, cache)
    lengths = seq_lens.tolist()
    starts, counts = trees.query_start_loc.tolist(), trees.counts.tolist()
    groups = []
    for members in _groups(lengths, cache):
        height = max(counts[i] for i in members)
        num_blocks = -(-max(lengths[i] for i in members) // cache.block_size)
        bases = [lengths[i] - counts[i] for i in members]
        tail = min(bases) + 1
        first = torch.tensor([starts[i] for i in members]).unsqueeze(1)
        size = torch.tensor([counts[i] for i in members]).unsqueeze(1)
        place = torch.arange(height)
        tree_rows = first + torch.minimum(place, size - 1)
        offset = torch.arange(tail, num_blocks * cache.block_size) - torch.tensor(bases).unsqueeze(1)
        # What precedes the root is seen as the root is, what follows the last row by nobody.
        mask = torch.nn.functional.pad(trees.mask[tree_rows], (0, 1))
        column = offset.clamp(0, trees.max_rows).unsqueeze(1).expand(-1, height, -1)
        is_unused = offset >= size
        is_hidden = ~mask.gather(2, column)
        blocks = block_table[torch.tensor(members), :num_blocks].long()
        # Entries past a shorter sequence's end may be anything; block 0 exists.
        blocks = blocks.masked_fill(
            torch.arange(num_blocks) * cache.block_size >= torch.tensor(bases).unsqueeze(1) + size, 0
        )
        heads = torch.arange(cache.num_kv_heads).view(1, -1, 1)
        query_rows = (tree_rows if rows is None else rows[tree_rows]).flatten()
        is_row = (place < size).flatten().nonzero().squeeze(1)
        groups.append(
            DenseGroup(
                rows=query_rows,
                is_row=is_row,
                targets=query_rows[is_row],
                pages=(blocks.unsqueeze(1) * cache.num_kv_heads + heads).flatten(),
                tail=tail,
                is_hidden=is_hidden[:, None, None],
                is_unused=is_unused[:, None, :, None],
            )
        )
    return DensePlan(
        groups=tuple(groups),
        num_query_heads=num_query_heads,
        num_kv_heads=cache.num_kv_heads,
        head_dim=cache.head_dim,
    )


def _groups(lengths: list[int], cache: PlainCache) -> Iterator[list[int]]:
    """Requests that are gathered together: consecutive ones, as long as the padded whole is not too much."""
    members: list[int] = []
    longest = 0
    each = cache.num_kv_heads * cache.head_dim
    for i, length in enumerate(lengths):
        padded = math.ceil(max(longest, length) / cache.block_size) * cache.block_size
        if members and (len(members) + 1) * padded * each > _MAX_ELEMENTS:
            yield members
            members, longest = [], 0
        members.append(i)
        longest = max(longest, length)
    if members:
        yield members


@torch.no_grad()
def dense_tree_attention_cpu(
    query: torch.Tensor, cache: PlainCache, *, plan: DensePlan, scale: float, output: torch.Tensor
) -> None:
    """Attend with the rows of a step's trees.

    Args:
        query: [T, Hq, D] in the cache's dtype.
        cache: This layer's cache, already holding the rows' own tokens.
        plan: From ``plan_dense`` of this step.
        scale: Factor of the scores.
        output: [T, Hq, D], the trees' rows written, the others left.
    """
    num_heads, head_dim = plan.num_kv_heads, plan.head_dim
    key, value = cache.key.transpose(1, 2), cache.value.transpose(1, 2)
    is_transposed = cache.key.stride(1) == 1
    for group in plan.groups:
        count, height = group.is_hidden.shape[0], group.is_hidden.shape[3]
        tiled = query.index_select(0, group.rows).float().mul_(scale)
        tiled = (
            tiled.view(count, height, num_heads, -1, head_dim)
            .permute(0, 2, 3, 1, 4)
            .reshape(count * num_heads, -1, head_dim)
        )
        if is_transposed:
            columns = _select(key.transpose(2, 3), group.pages, count * num_heads).transpose(1, 2).flatten(2)
        else:
            columns = _select(key, group.pages, count * num_heads).flatten(1, 2).transpose(1, 2)
        scores = torch.bmm(tiled, columns.float())
        by_row = scores.view(count, num_heads, -1, height, scores.shape[2])
        by_row[..., group.tail :].masked_fill_(group.is_hidden, -torch.inf)
        values = _select(value, group.pages, count * num_heads).flatten(1, 2).float()
        values.view(count, num_heads, -1, head_dim)[:, :, group.tail :].masked_fill_(group.is_unused, 0.0)
        result = torch.bmm(scores.softmax(-1), values).view(count, num_heads, -1, height, head_dim)
        result = result.permute(0, 3, 1, 2, 4).reshape(count * height, -1, head_dim)
        if len(group.is_row) < len(result):
            result = result.index_select(0, group.is_row)
        output.index_copy_(0, group.targets, result.to(output.dtype))


def _select(pages: torch.Tensor, chosen: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """[num_sequences, P, ..] of pages [num_blocks, Hkv, ..]."""
    return pages.flatten(0, 1).index_select(0, chosen).unflatten(0, (num_sequences, -1))
