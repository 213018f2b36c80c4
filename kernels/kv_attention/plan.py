"""The plan of a step on the CPU: which rows meet which chunks of the cache, in what batches.

Owns the cutting; knows lengths and the block table alone, no layer and no element, so one plan serves all layers
of a step. ``cpu.py`` computes by it.

The queries of each sequence are cut into tiles of one height (see ``_TILE_HEIGHTS``), the
context into chunks of a fixed number of tokens. Each (tile, chunk) pair is one matrix of a batched product, so
any mixture of lengths wastes less than a chunk for each tile. A tile merges its chunks in their order, superchunk
by superchunk. Neither the matrices' shapes nor the order of a tile's sums depend on other sequences or on the
padding of the block table.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from kernels.kv_attention.cache import KVCache, check_lengths

_TILE_HEIGHTS = (16, 64)
"""A sequence's rows are cut into tiles of the smallest height that holds them all, or of the largest. Before these
comes the least height that gives a matrix ``MIN_MATRIX_ROWS`` rows."""
MIN_MATRIX_ROWS = 4
"""Rows of a product at least. MKL computes fewer by other kernels, which round otherwise; from 4 rows on a row's
bits do not depend on how many there are, so that decoding a token gives what prefilling it gives."""
CHUNK_TOKENS = 128
"""Tokens of a chunk, rounded to whole blocks."""
SUPERCHUNK = 8
"""Chunks a tile merges under one maximum. Fixed, because a row's sums must not depend on the batch."""
MAX_PAIRS = 256
"""Pairs computed together at most; with ``MAX_ELEMENTS`` this keeps the float32 copies in the cache."""
MAX_ELEMENTS = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """Some tiles of a group with their chunks of one superchunk. N pairs, t tiles, P blocks a chunk.

    Attributes:
        tiles: [t] int64 places in the group.
        counts: [t] int64 chunks of each tile, at least 1.
        owner: [N] int64 places in ``tiles``, rising.
        starts: [N] int64 first token of the chunk.
        blocks: [N * P] int64 blocks of the chunks; 0 past the sequence's end.
        is_partial: Some token of some chunk is hidden from some row.
    """

    tiles: torch.Tensor
    counts: torch.Tensor
    owner: torch.Tensor
    starts: torch.Tensor
    blocks: torch.Tensor
    is_partial: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TileGroup:
    """All tiles of one height M. n tiles.

    Attributes:
        rows: [n, M] int64 rows of the flat query; a short tile repeats its last row.
        positions: [n, M] int64 last position each row attends to.
        lengths: [n] int64 sequence lengths.
        is_row: [n * M] int64 places that are not repeats.
        batches: The pairs, superchunk by superchunk.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    is_row: torch.Tensor
    batches: tuple[PairBatch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """What ``paged_attention_cpu`` needs to know of a step, whatever the layer. See ``plan_attention``."""

    groups: tuple[TileGroup, ...]
    num_rows: int
    block_size: int
    num_blocks_per_chunk: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int


@torch.no_grad()
def plan_attention(
    *,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    seq_lens: torch.Tensor,
    num_query_heads: int,
    cache: KVCache,
) -> AttentionPlan:
    """Plan one step; every cache of the same shape and block table can use it.

    Args:
        block_table: [B, max_blocks] integer on the CPU; entries past a sequence's end are not read.
        query_start_loc: [B + 1] integer, rows query_start_loc[b] .. query_start_loc[b + 1] - 1 belong to
            sequence b; None: one row a sequence.
        seq_lens: [B] integer, lengths with the rows' own tokens.
        num_query_heads: Hq.
        cache: Any layer's cache.

    Raises:
        ValueError: Lengths do not fit one another or the block table.
    """
    if query_start_loc is None:
        query_start_loc = torch.arange(len(seq_lens) + 1)
    else:
        check_lengths(block_table, query_start_loc, seq_lens, int(query_start_loc[-1]), cache.block_size)
    starts, lengths = query_start_loc[:-1].long(), seq_lens.long()
    query_lens = query_start_loc.diff().long()
    num_blocks_per_chunk = max(1, CHUNK_TOKENS // cache.block_size)
    groups = []
    shorter = 0
    smallest = math.ceil(MIN_MATRIX_ROWS * cache.num_kv_heads / num_query_heads)
    for height in (smallest, *_TILE_HEIGHTS):
        is_last = height == _TILE_HEIGHTS[-1]
        sequences = ((query_lens > shorter) & ((query_lens <= height) | is_last)).nonzero().squeeze(1)
        shorter = height
        if len(sequences):
            groups.append(
                _plan_group(
                    height,
                    starts[sequences],
                    query_lens[sequences],
                    lengths[sequences],
                    block_table[sequences].long(),
                    num_blocks_per_chunk,
                    num_query_heads,
                    cache,
                )
            )
    return AttentionPlan(
        groups=tuple(groups),
        num_rows=int(query_start_loc[-1]),
        block_size=cache.block_size,
        num_blocks_per_chunk=num_blocks_per_chunk,
        num_query_heads=num_query_heads,
        num_kv_heads=cache.num_kv_heads,
        head_dim=cache.head_dim,
    )


def _plan_group(
    height: int,
    starts: torch.Tensor,
    query_lens: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    num_blocks_per_chunk: int,
    num_query_heads: int,
    cache: KVCache,
) -> TileGroup:
    """Cut the rows of some sequences into tiles of one height and pair these with their chunks."""
    num_tiles = (query_lens + height - 1) // height
    sequence, tile = ragged(num_tiles)
    last_row = query_lens[sequence].unsqueeze(1) - 1
    row = tile.unsqueeze(1) * height + torch.arange(height)
    is_row = (row <= last_row).flatten().nonzero().squeeze(1)
    row = torch.minimum(row, last_row)
    first_position = (lengths - query_lens)[sequence].unsqueeze(1)
    group = TileGroup(
        rows=starts[sequence].unsqueeze(1) + row,
        positions=first_position + row,
        lengths=lengths[sequence],
        is_row=is_row,
        batches=(),
    )
    chunk_tokens = num_blocks_per_chunk * cache.block_size
    num_elements = chunk_tokens * max(cache.num_kv_heads * cache.head_dim, num_query_heads * height)
    max_pairs = min(MAX_PAIRS, max(SUPERCHUNK, MAX_ELEMENTS // num_elements))
    batches = tuple(_pair(group, sequence, block_table, cache.block_size, num_blocks_per_chunk, max_pairs))
    return replace(group, batches=batches)


def _pair(
    group: TileGroup,
    sequence: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    num_blocks_per_chunk: int,
    max_pairs: int,
) -> Iterator[PairBatch]:
    """Pair tiles with chunks, superchunk by superchunk, in batches of whole tiles and at most max_pairs."""
    chunk_tokens = num_blocks_per_chunk * block_size
    num_chunks = group.positions[:, -1] // chunk_tokens + 1
    most = int(num_chunks.max())
    within = torch.arange(num_blocks_per_chunk)
    for superchunk in range(0, most, SUPERCHUNK):
        tiles = (num_chunks > superchunk).nonzero().squeeze(1)
        counts = (num_chunks[tiles] - superchunk).clamp(max=SUPERCHUNK)
        owner, chunk = ragged(counts)
        chunk += superchunk
        owner_tile = tiles[owner]
        starts = chunk * chunk_tokens
        block = chunk.unsqueeze(1) * num_blocks_per_chunk + within
        # Entries past the end may be anything; block 0 exists, and what it gives is hidden.
        is_used = block * block_size < group.lengths[owner_tile].unsqueeze(1)
        column = block.clamp(max=block_table.shape[1] - 1)
        blocks = torch.where(is_used, block_table[sequence[owner_tile].unsqueeze(1), column], 0)
        is_partial = starts + chunk_tokens - 1 > group.positions[owner_tile, 0]
        first_pair = first_tile = 0
        for num_batch_tiles, num_pairs in runs(counts.tolist(), max_pairs):
            pairs = slice(first_pair, first_pair + num_pairs)
            yield PairBatch(
                tiles=tiles[first_tile : first_tile + num_batch_tiles],
                counts=counts[first_tile : first_tile + num_batch_tiles],
                owner=owner[pairs] - first_tile,
                starts=starts[pairs],
                blocks=blocks[pairs].flatten(),
                is_partial=bool(is_partial[pairs].any()),
            )
            first_pair, first_tile = first_pair + num_pairs, first_tile + num_batch_tiles


def ragged(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (owner, place): counts[i] entries i, and their numbers 0 .. counts[i] - 1."""
    owner = torch.repeat_interleave(counts)
    return owner, torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]


def runs(counts: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Cut counts into runs of a sum of at most limit, none empty; yield (length, sum) of each."""
    length = total = 0
    for count in counts:
        if length and total + count > limit:
            yield length, total
            length = total = 0
        length, total = length + 1, total + count
    if length:
        yield length, total
