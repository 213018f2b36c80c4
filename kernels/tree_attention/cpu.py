"""Tree attention on the CPU: batched torch operations instead of the reference's loops, same contract.

Owns the arithmetic; ``plan.py`` owns which rows meet which tokens and says how a row's sums are ordered.

Over the INT8 cache a tree row is the same bits as decoding its path by ``kernels.kv_attention`` gives, as far as that
gives the same bits in any batch: on one thread, where the BLAS computes each row and each column of a product alone
and adds up token by token (MKL on CPUs of AMD: up to 192, which a chunk and a tree of 64 nodes are). This matters
beyond rounding: what a layer computes is quantised in the next one's cache, where a last bit becomes a whole code.
Over a float cache nothing is promised but rounding: the other rows of a step are some engine's own attention.
"""

import functools
from dataclasses import dataclass

import torch

from kernels.kv_attention.cache import KVCache
from kernels.kv_attention.cpu import gather_chunks
from kernels.tree_attention.batch import TreeBatch
from kernels.tree_attention.cache import PagedCache, check_tree_attention
from kernels.tree_attention.plan import TailPairs, TreeBatchPairs, TreeGroup, TreePlan, plan_tree_attention


@torch.no_grad()
def paged_tree_attention_cpu(
    query: torch.Tensor,
    cache: PagedCache,
    *,
    plan: TreePlan,
    scale: float,
    output: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    """Attend with the rows of a step's trees.

    Args:
        query: [T, Hq, D] float32, bfloat16 or float16, T at least the plan's rows.
        cache: This layer's cache, already holding the rows' own tokens.
        plan: From ``plan_tree_attention`` of this step.
        scale: Factor of the scores.
        output: [T, Hq, D], the trees' rows written, the others left.
        lse: [T, Hq] float32, likewise; None: not wanted.

    Raises:
        ValueError: Query, output or cache are not those the plan was made for.
    """
    _check_plan(query, output, cache, plan)
    for group in plan.groups:
        accumulated, total, maximum = _attend_group(group, query, cache, plan, scale)
        result = _by_row(accumulated.div_(total.unsqueeze(-1)), group).view(-1, *query.shape[1:])
        output.index_copy_(0, group.targets, result.to(output.dtype))
        if lse is not None:
            result = _by_row(total.log().add_(maximum), group).view(-1, query.shape[1])
            lse.index_copy_(0, group.targets, result)


def _by_row(tiled: torch.Tensor, group: TreeGroup) -> torch.Tensor:
    """Return tiled [n, Hkv, M * G, ..] as [r, Hkv, G, ..], the rows the query has, without repeats."""
    rows = tiled.unflatten(2, (group.height, -1)).transpose(1, 2).flatten(0, 1)
    return rows.contiguous() if group.is_row is None else rows.index_select(0, group.is_row)


def _check_plan(query: torch.Tensor, output: torch.Tensor, cache: PagedCache, plan: TreePlan) -> None:
    expected = (plan.num_query_heads, plan.head_dim)
    for name, tensor in (("query", query), ("output", output)):
        if tensor.dim() != 3 or len(tensor) < plan.num_rows or tensor.shape[1:] != expected:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected [at least {plan.num_rows}, {expected[0]},"
                f" {expected[1]}]"
            )
    got = (cache.block_size, cache.num_kv_heads, cache.head_dim)
    if got != (plan.block_size, plan.num_kv_heads, plan.head_dim):
        raise ValueError(
            f"cache: got (block_size, Hkv, D) {got}, expected"
            f" {(plan.block_size, plan.num_kv_heads, plan.head_dim)} as in the plan"
        )


def _attend_group(
    group: TreeGroup, query: torch.Tensor, cache: PagedCache, plan: TreePlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the unnormalised output [n, Hkv, M * G, D], its sum and its maximum [n, Hkv, M * G]."""
    tiled = query.index_select(0, group.rows).float().mul_(scale)
    tiled = tiled.view(-1, group.height, plan.num_kv_heads, tiled.shape[1] // plan.num_kv_heads, plan.head_dim)
    tiled = tiled.transpose(1, 2).flatten(2, 3).contiguous()
    if len(group.batches[0].tiles) == len(tiled):
        # Nothing to merge with: what the loop below would add to nothing.
        accumulated, total, maximum = _attend_batch(group.batches[0], group.height, tiled, cache, plan)
        batches = group.batches[1:]
    else:
        accumulated = torch.zeros_like(tiled)
        total = torch.zeros(tiled.shape[:3])
        maximum = torch.full(tiled.shape[:3], -torch.inf)
        batches = group.batches
    for batch in batches:
        tiles = batch.tiles
        part, part_total, part_maximum = _attend_batch(batch, group.height, tiled, cache, plan)
        old = maximum[tiles]
        new = torch.maximum(old, part_maximum)
        keep, add = (old - new).exp_(), (part_maximum - new).exp_()
        maximum[tiles] = new
        total[tiles] = total[tiles] * keep + part_total * add
        accumulated[tiles] = accumulated[tiles] * keep.unsqueeze(-1) + part * add.unsqueeze(-1)
    return accumulated, total, maximum


def _attend_batch(
    batch: TreeBatchPairs, height: int, tiled: torch.Tensor, cache: PagedCache, plan: TreePlan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what ``_attend_group`` accumulates, for the tiles of a batch and their chunks of one superchunk."""
    query = tiled if len(batch.tiles) == len(tiled) else tiled.index_select(0, batch.tiles)
    scored = []
    if len(batch.owner):
        scores = _scores(query.index_select(0, batch.owner), batch.blocks, cache)
        scored.append(_Scored(scores=scores, owner=batch.owner, counts=batch.counts, blocks=batch.blocks, tails=None))
    if (tails := batch.tails) is not None:
        owner = None if tails.is_one_each else tails.owner
        scores = _scores(_spread(query, owner), tails.blocks, cache)
        scores.unflatten(2, (height, -1)).masked_fill_(tails.is_hidden, -torch.inf)
        scored.append(_Scored(scores=scores, owner=owner, counts=tails.counts, blocks=tails.blocks, tails=tails))
    maximum = functools.reduce(torch.maximum, map(_largest, scored))
    # A row that sees nothing of this superchunk would otherwise take -inf - -inf.
    shift = (maximum if batch.is_first else maximum.masked_fill(maximum == -torch.inf, 0.0)).unsqueeze(-1)
    part, total = torch.zeros_like(query), torch.zeros_like(maximum)
    for pairs in scored:
        weights = pairs.scores.sub_(_spread(shift, pairs.owner)).exp_()
        if pairs.tails is None:
            sums, is_unused = weights.sum(-1), None
        else:
            sums, is_unused = _sum_by_position(weights, pairs.tails, height, plan.chunk_tokens), pairs.tails.is_unused
        values = _weighted_values(weights, pairs.blocks, is_unused, cache)
        for target, source in ((total, sums), (part, values)):
            target.add_(source) if pairs.owner is None else target.index_add_(0, pairs.owner, source)
    return part, total, maximum


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """Pairs of one kind and their scores.

    Attributes:
        scores: [N, Hkv, R, W], -inf where hidden.
        owner: [N] int64 tile of each; None: each tile has one, in order.
        counts: [u] int64 pairs of each tile.
        blocks: [N * P] int64.
        tails: Where they are tail pairs.
    """

    scores: torch.Tensor
    owner: torch.Tensor | None
    counts: torch.Tensor
    blocks: torch.Tensor
    tails: TailPairs | None


def _spread(by_tile: torch.Tensor, owner: torch.Tensor | None) -> torch.Tensor:
    return by_tile if owner is None else by_tile.index_select(0, owner)


def _largest(pairs: _Scored) -> torch.Tensor:
    """Return the largest score [u, Hkv, R] of each tile's pairs; -inf where it has none."""
    largest = pairs.scores.amax(-1)
    if pairs.owner is None:
        return largest
    return torch.segment_reduce(largest, "max", lengths=pairs.counts, axis=0, unsafe=True)


def _sum_by_position(weights: torch.Tensor, tails: TailPairs, height: int, chunk_tokens: int) -> torch.Tensor:
    """Return the sums [m, Hkv, M * G] of weights [m, Hkv, M * G, W], each row's where its positions are."""
    by_row = weights.unflatten(2, (height, -1))
    shape = (*by_row.shape[:4], tails.sources.shape[-1])
    placed = by_row.clone()
    placed.scatter_(4, tails.targets.expand(shape), by_row.gather(4, tails.sources.expand(shape)))
    return placed[..., :chunk_tokens].sum(-1).flatten(2)


def _scores(query: torch.Tensor, blocks: torch.Tensor, cache: PagedCache) -> torch.Tensor:
    """Return query [N, Hkv, R, D] times key [N, Hkv, R, W] of N pairs with N * P blocks."""
    num_pairs, _, num_rows, head_dim = query.shape
    chosen = query.view(-1, num_rows, head_dim)
    if isinstance(cache, KVCache):
        key, key_scale = gather_chunks(cache.key, cache.key_scale, blocks, num_pairs)
        scores = torch.bmm(chosen, key.transpose(1, 2)).view(num_pairs, -1, num_rows, key.shape[1])
        return scores.mul_(key_scale)
    key = cache.key.transpose(1, 2)
    if cache.key.stride(1) == 1:
        # [N, Hkv, P, D, block_size] to [N * Hkv, D, W].
        columns = _select(key.transpose(2, 3), blocks, num_pairs).transpose(2, 3).flatten(3)
    else:
        columns = _select(key, blocks, num_pairs).flatten(2, 3).transpose(2, 3)
    scores = torch.bmm(chosen, columns.flatten(0, 1).float())
    return scores.view(num_pairs, -1, num_rows, scores.shape[2])


def _weighted_values(
    weights: torch.Tensor, blocks: torch.Tensor, is_unused: torch.Tensor | None, cache: PagedCache
) -> torch.Tensor:
    """Return weights [N, Hkv, R, W] times values [N, Hkv, R, D]; the weights are overwritten.

    What an unused slot holds may be NaN, which a weight of 0 does not mend.
    """
    num_pairs, num_kv_heads, num_rows, width = weights.shape
    if isinstance(cache, KVCache):
        value, value_scale = gather_chunks(cache.value, cache.value_scale, blocks, num_pairs)
        weights.mul_(value_scale if is_unused is None else value_scale.masked_fill(is_unused, 0.0))
    else:
        value = _select(cache.value.transpose(1, 2), blocks, num_pairs).flatten(2, 3).float()
        if is_unused is not None:
            value = value.masked_fill(is_unused.transpose(2, 3), 0.0)
        value = value.flatten(0, 1)
    part = torch.bmm(weights.view(-1, num_rows, width), value)
    return part.view(num_pairs, num_kv_heads, num_rows, -1)


def _select(pages: torch.Tensor, blocks: torch.Tensor, num_pairs: int) -> torch.Tensor:
    """Return the blocks [N, Hkv, P, ..] of pages [num_blocks, Hkv, ..] for N * P blocks."""
    num_kv_heads = pages.shape[1]
    by_pair = blocks.view(num_pairs, 1, -1)
    heads = torch.arange(num_kv_heads).view(1, -1, 1)
    if pages.stride(0) != num_kv_heads * pages.stride(1):
        return pages[by_pair, heads]
    # Heads of neighbouring blocks are equally far apart: whole heads can be copied in the wanted order.
    picked = pages.flatten(0, 1).index_select(0, (by_pair * num_kv_heads + heads).flatten())
    return picked.unflatten(0, (num_pairs, num_kv_heads, -1))


@torch.no_grad()
def tree_attention_cpu(
    query: torch.Tensor,
    cache: PagedCache,
    *,
    trees: TreeBatch,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plan and attend in one call; rows of no request give 0 and -inf. See ``paged_tree_attention_cpu``."""
    check_tree_attention(query, cache, trees, block_table, seq_lens, scale)
    plan = plan_tree_attention(
        trees=trees, block_table=block_table, seq_lens=seq_lens, num_query_heads=query.shape[1], cache=cache
    )
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = torch.full(query.shape[:2], -torch.inf)
    paged_tree_attention_cpu(query, cache, plan=plan, scale=scale, output=output, lse=lse)
    return output, lse
