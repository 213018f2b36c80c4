"""Attention of branching trees over vLLM's CPU cache, with as few operations as can be.

A step of a small model is the overhead of its operations. Where `kernels.tree_attention.native` runs there is one a
layer. Elsewhere the keys and values of each request are gathered whole, padded to the longest, and attended to in two
products; `kernels.tree_attention`, which goes chunk by chunk, needs three times the operations. Nothing is promised but
rounding: the other rows of a step go through vLLM's own kernel.

vLLM's layout for vector instructions, which is read here: a block and head holds D rows of block_size keys, that is
their transpose, then block_size rows of D values.

Shape legend: t trees, R rows of the largest, K KV heads, G query heads of each, D head width, P blocks of the longest
context, L = P · block_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from actors.vllm_plugin.trees import TreeBatch, parent_rows
from kernels.tree_attention.native import Attend, native_tree_attention

MAX_ELEMENTS = 2**21  # of keys gathered together, where one request does not have more: they stay in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeGroup:
    """t trees that are computed together; the same for every layer.

    Attributes:
        rows: [t * R] int64 flat rows of the batch; a smaller tree repeats its last row.
        kept: [m] int64 places of `rows` that are no repeats; None if all are.
        targets: [m] int64 flat rows at these places.
        keys: [t * K * D * P] int64 rows of block_size elements.
        values: [t * K * P] int64 rows of block_size · D elements.
        tail: First position that some row does not see.
        is_hidden: [t, 1, 1, R, L - tail] bool: the row does not see the position.
        is_unused: [t, 1, L - tail, 1] bool: the position is none of the request's; what lies there may be NaN.
    """

    rows: torch.Tensor
    kept: torch.Tensor | None
    targets: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tail: int
    is_hidden: torch.Tensor
    is_unused: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeTrees:
    """t trees for the compiled kernel; the same for every layer. Fields as the kernel takes them."""

    attend: Attend
    table: torch.Tensor
    trees: torch.Tensor
    parents: torch.Tensor


Plan = NativeTrees | list[TreeGroup]


def plan_step(
    batch: TreeBatch,
    places: np.ndarray,
    block_table: np.ndarray,
    dtype: torch.dtype,
    *,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
) -> Plan:
    """Lay out the trees of the requests at `places` of a step for `attend_trees`.

    Args:
        batch, places, block_table, num_kv_heads, block_size, head_dim: As of `plan_trees`.
        dtype: Of queries and cache.
    """
    attend = native_tree_attention(dtype, block_size=block_size, head_dim=head_dim)
    if attend is None:
        sizes = {"num_kv_heads": num_kv_heads, "block_size": block_size, "head_dim": head_dim}
        return plan_trees(batch, places, block_table, **sizes)
    trees = [batch.trees[place] for place in places.tolist()]
    counts = np.array([tree.num_rows for tree in trees])
    numbers = np.stack([batch.starts[places + 1] - counts, batch.bases[places], counts], axis=1)
    return NativeTrees(
        attend=attend,
        table=torch.from_numpy(np.ascontiguousarray(block_table[places], dtype=np.int32)),
        trees=torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int64)),
        parents=torch.from_numpy(parent_rows(trees)),
    )


def plan_trees(
    batch: TreeBatch, places: np.ndarray, block_table: np.ndarray, *, num_kv_heads: int, block_size: int, head_dim: int
) -> list[TreeGroup]:
    """Lay out the trees of the requests at `places` of a step.

    Args:
        batch: The step's trees.
        places: [t] int64 requests, ascending.
        block_table: [B, blocks] of the KV cache.
        num_kv_heads: K.
        block_size: Tokens of a block.
        head_dim: D.
    """
    sizes = np.array([batch.trees[place].num_rows for place in places])
    lengths = batch.bases[places] + sizes
    heads = np.arange(num_kv_heads)
    groups = []
    for part in _parts(lengths, num_kv_heads * head_dim):
        counts, ends = sizes[part], lengths[part]
        bases = ends - counts
        masks = batch.masks(places[part].tolist())
        height = masks.shape[1]
        num_blocks = -(-int(ends.max()) // block_size)
        offset = np.arange(height)
        tail = int(bases.min()) + 1
        offset_from_root = np.arange(tail, num_blocks * block_size) - bases[:, None]
        rows = (batch.starts[places[part] + 1] - counts)[:, None] + np.minimum(offset, counts[:, None] - 1)
        kept = (offset < counts[:, None]).ravel().nonzero()[0]
        blocks: np.ndarray = block_table[places[part], :num_blocks].astype(np.int64)
        # Entries past a shorter request's end may be anything; block 0 exists.
        blocks[np.arange(num_blocks) >= -(-ends // block_size)[:, None]] = 0
        pages = (blocks[:, None] * num_kv_heads + heads[:, None]) * 2  # [t, K, P]: keys; the values lie behind them
        lines = pages[:, :, None] * head_dim + np.arange(head_dim)[:, None]
        groups.append(
            TreeGroup(
                rows=torch.from_numpy(rows.ravel()),
                kept=None if len(kept) == rows.size else torch.from_numpy(kept),
                targets=torch.from_numpy(rows.ravel()[kept]),
                keys=torch.from_numpy(lines.ravel()),
                values=torch.from_numpy((pages + 1).ravel()),
                tail=tail,
                is_hidden=torch.from_numpy(~_visible(masks, offset_from_root)[:, None, None]),
                is_unused=torch.from_numpy((offset_from_root >= counts[:, None])[:, None, :, None]),
            )
        )
    return groups


def _visible(masks: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """[t, R, n] bool: which rows see positions at these offsets [t, n] from the root, of masks [t, R, R]."""
    count, height, _ = masks.shape
    # One column more than there are rows: what follows the last row is seen by nobody.
    seen = np.concatenate([masks, np.zeros((count, height, 1), dtype=bool)], axis=2)
    seen[:, :, 0] = True  # the root; what precedes it is looked up as it is
    return np.take_along_axis(seen, np.clip(offset, 0, height)[:, None], axis=2)


def _parts(lengths: np.ndarray, width: int) -> Iterator[slice]:
    """Runs of requests whose keys, padded to the longest, are not too many elements together."""
    start = longest = 0
    for place, length in enumerate(lengths.tolist()):
        if place > start and (place + 1 - start) * max(longest, length) * width > MAX_ELEMENTS:
            yield slice(start, place)
            start, longest = place, 0
        longest = max(longest, length)
    yield slice(start, len(lengths))


def attend_trees(query: torch.Tensor, kv_cache: torch.Tensor, plan: Plan, scale: float, output: torch.Tensor) -> None:
    """Attend with the rows of trees.

    Args:
        query: [T, K * G, D].
        kv_cache: [num_blocks, K, block_size, 2 * D], in vLLM's layout; holds this step's keys and values.
        plan: Of the step.
        scale: Factor of the scores.
        output: [T, K * G, D], of which the trees' rows are written.
    """
    if isinstance(plan, NativeTrees):
        plan.attend(query.contiguous(), kv_cache, plan.table, plan.trees, plan.parents, scale, output)
        return
    _, num_kv_heads, block_size, width = kv_cache.shape
    head_dim = width // 2
    lines, pages = kv_cache.view(-1, block_size), kv_cache.view(-1, block_size * head_dim)
    for group in plan:
        count, height = group.is_hidden.shape[0], group.is_hidden.shape[3]
        matrices = count * num_kv_heads
        tiled = query.index_select(0, group.rows).float().mul_(scale).view(count, height, num_kv_heads, -1, head_dim)
        tiled = tiled.permute(0, 2, 3, 1, 4).reshape(matrices, -1, head_dim)
        keys = lines.index_select(0, group.keys).view(matrices, head_dim, -1).float()
        scores = torch.bmm(tiled, keys)
        by_row = scores.view(count, num_kv_heads, -1, height, scores.shape[2])
        by_row[..., group.tail :].masked_fill_(group.is_hidden, -torch.inf)
        values = pages.index_select(0, group.values).view(matrices, -1, head_dim).float()
        values.view(count, num_kv_heads, -1, head_dim)[:, :, group.tail :].masked_fill_(group.is_unused, 0.0)
        result = torch.bmm(scores.softmax(-1), values).view(count, num_kv_heads, -1, height, head_dim)
        result = result.permute(0, 3, 1, 2, 4).reshape(count * height, -1, head_dim)
        if group.kept is not None:
            result = result.index_select(0, group.kept)
        output.index_copy_(0, group.targets, result.to(output.dtype))
