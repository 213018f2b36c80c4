"""The plan of a step's trees on the CPU: which rows meet which tokens of the cache, in what batches.

Owns the cutting; knows lengths, masks and the block table alone, so one plan serves all layers. ``cpu.py`` computes
by it.

A tree row is to give the bits that decoding the same path gives, though its path's keys and values do not lie one
after the other. So its context is cut as ``kernels.kv_attention.plan`` cuts it, by position:

    chunks     |  0  |  1  |  2  |  3 ..      whole chunks of the prefix up to the root are the same for all rows
    positions  |=====|=====|===R' '| ' '      and are computed as those of a decoding row; R is the root, ' nodes
    tail pairs             |-------->         each later chunk that a row's path reaches is a tail pair: the slots
                                 |---->       from the chunk's start to the last node's, whatever node they hold

A node belongs to the tail pair of the chunk its *position* lies in, and is hidden in the others, because decoding
sums chunk by chunk. Within a pair only two sums depend on the order of its columns. A product of weights and values
adds up token by token, and a hidden token adds 0, so the slots' order does, a path's rows lying in its order. The
sum of the weights is made by many lanes, so each row's weights are first put where their positions are.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.kv_attention.plan import (
    CHUNK_TOKENS,
    MAX_ELEMENTS,
    MAX_PAIRS,
    MIN_MATRIX_ROWS,
    SUPERCHUNK,
    ragged,
    runs,
)
from kernels.tree_attention.batch import TreeBatch
from kernels.tree_attention.cache import PagedCache, check_sequences

_TILE_HEIGHTS = (16, 64)
"""Trees of up to so many rows are computed together, in tiles as high as the largest of them; what is larger than
the last is cut into tiles of that height."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TailPairs:
    """m pairs of a tile of M rows with W slots from a chunk's start. K = R - 1 nodes, P blocks.

    Attributes:
        owner: [m] int64 places among the batch's tiles, rising.
        counts: [u] int64 how many of the pairs each of the batch's tiles has.
        is_one_each: Every tile has one: owner is 0, 1, ...
        blocks: [m * P] int64; 0 past the sequence's end.
        is_hidden: [m, 1, M, 1, W] bool: the row does not see the slot, or not in this chunk.
        is_unused: [m, 1, 1, W] bool: the slot holds nothing; true of the last one.
        sources: [m, 1, M, 1, K] int64 columns of the path's nodes by depth; the last column where there is none.
        targets: [m, 1, 1, 1, K] int64 columns of the depths' positions, likewise.
    """

    owner: torch.Tensor
    counts: torch.Tensor
    is_one_each: bool
    blocks: torch.Tensor
    is_hidden: torch.Tensor
    is_unused: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor

    def select(self, pairs: torch.Tensor, owner: torch.Tensor, num_tiles: int) -> "TailPairs":
        """Return some of the pairs, with owners of their own, num_tiles of them."""
        counts = torch.bincount(owner, minlength=num_tiles)
        return TailPairs(
            owner=owner,
            counts=counts,
            is_one_each=len(owner) == num_tiles and bool((counts == 1).all()),
            blocks=self.blocks.view(len(self.owner), -1)[pairs].flatten(),
            is_hidden=self.is_hidden[pairs],
            is_unused=self.is_unused[pairs],
            sources=self.sources[pairs],
            targets=self.targets[pairs],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeBatchPairs:
    """u tiles of a group of n with their chunks of one superchunk.

    Attributes:
        tiles: [u] int64 places in the group, rising.
        is_first: The superchunk is the first, in which every row sees something.
        owner: [N] int64 places in ``tiles`` of the pairs with whole chunks, rising.
        blocks: [N * P] int64 their blocks.
        counts: [u] int64 how many of them each tile has.
        tails: The other pairs; None where there are none.
    """

    tiles: torch.Tensor
    is_first: bool
    owner: torch.Tensor
    blocks: torch.Tensor
    counts: torch.Tensor
    tails: TailPairs | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeGroup:
    """n tiles of one height M.

    Attributes:
        height: M.
        rows: [n * M] int64 rows of the flat query; a short tile repeats its last row.
        is_row: [r] int64 places that are not repeats; None where none is.
        targets: [r] int64 rows of the flat query at these places.
        batches: Superchunk by superchunk. In its first one a row sees something.
    """

    height: int
    rows: torch.Tensor
    is_row: torch.Tensor | None
    targets: torch.Tensor
    batches: tuple[TreeBatchPairs, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TreePlan:
    """What ``paged_tree_attention_cpu`` needs to know of a step. See ``plan_tree_attention``."""

    groups: tuple[TreeGroup, ...]
    num_rows: int
    block_size: int
    chunk_tokens: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tiles:
    """The tiles of one height, before their pairing. n tiles of M rows; b requests.

    Attributes:
        sequence: [n] int64 request of the step.
        tree_rows: [n, M] int64 rows of the tree batch.
        bases: [n] int64 the root's position.
        counts: [n] int64 rows of the request.
        first_tail: [n] int64 the first chunk that not all rows share.
        num_tails: [n] int64 chunks from there on that some row reaches.
    """

    sequence: torch.Tensor
    tree_rows: torch.Tensor
    bases: torch.Tensor
    counts: torch.Tensor
    first_tail: torch.Tensor
    num_tails: torch.Tensor


@torch.no_grad()
def plan_tree_attention(
    *,
    trees: TreeBatch,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    num_query_heads: int,
    cache: PagedCache,
    rows: torch.Tensor | None = None,
) -> TreePlan:
    """Plan the trees of one step; every cache of the same shape and block table can use it.

    Args:
        trees: The requests' trees.
        block_table: [B, max_blocks] integer on the CPU; entries past a sequence's end are not read.
        seq_lens: [B] integer, lengths with all rows of the trees.
        num_query_heads: Hq.
        cache: Any layer's cache.
        rows: [t] int64 row of the query that each row of the trees is; None: the same one.

    Raises:
        ValueError: Lengths do not fit the trees or the block table.
    """
    check_sequences(trees, block_table, seq_lens, cache)
    if rows is not None and rows.shape != (trees.num_rows,):
        raise ValueError(f"rows: got shape {tuple(rows.shape)}, expected [{trees.num_rows}]")
    num_blocks_per_chunk = max(1, CHUNK_TOKENS // cache.block_size)
    chunk_tokens = num_blocks_per_chunk * cache.block_size
    smallest = math.ceil(MIN_MATRIX_ROWS * cache.num_kv_heads / num_query_heads)
    groups = []
    for requests, height in _by_height(trees.counts.tolist(), smallest):
        tiles, is_row = _cut(trees, seq_lens.long(), requests, height, chunk_tokens)
        num_elements = chunk_tokens * max(cache.num_kv_heads * cache.head_dim, num_query_heads * height)
        max_pairs = min(MAX_PAIRS, max(SUPERCHUNK, MAX_ELEMENTS // num_elements))
        tails = _tail_pairs(tiles, trees, block_table, cache.block_size, num_blocks_per_chunk)
        batches = _pair(tiles, tails, block_table, num_blocks_per_chunk, max_pairs)
        query_rows = (tiles.tree_rows if rows is None else rows[tiles.tree_rows]).flatten()
        is_full = len(is_row) == len(query_rows)
        groups.append(
            TreeGroup(
                height=height,
                rows=query_rows,
                is_row=None if is_full else is_row,
                targets=query_rows if is_full else query_rows[is_row],
                batches=tuple(batches),
            )
        )
    num_rows = trees.num_rows if rows is None else int(rows.max()) + 1 if len(rows) else 0
    return TreePlan(
        groups=tuple(groups),
        num_rows=num_rows,
        block_size=cache.block_size,
        chunk_tokens=chunk_tokens,
        num_query_heads=num_query_heads,
        num_kv_heads=cache.num_kv_heads,
        head_dim=cache.head_dim,
    )


def _by_height(counts: list[int], smallest: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Divide the requests by their rows; yield those [b] computed together and the height of their tiles."""
    shorter = 0
    for limit in _TILE_HEIGHTS:
        longest = limit if limit < _TILE_HEIGHTS[-1] else max(counts, default=0)
        members = [i for i, count in enumerate(counts) if shorter < count <= longest]
        if members:
            yield torch.tensor(members), max(smallest, min(limit, max(counts[i] for i in members)))
        shorter = limit


def _cut(
    trees: TreeBatch, seq_lens: torch.Tensor, requests: torch.Tensor, height: int, chunk_tokens: int
) -> tuple[_Tiles, torch.Tensor]:
    """Cut the rows of some requests into tiles of one height; return them and the places that are not repeats."""
    row = torch.arange(height)
    sequence, counts = requests, trees.counts[requests]
    if int(counts.max()) > height:
        owner, tile = ragged((counts + height - 1) // height)
        sequence, counts = requests[owner], counts[owner]
        row = tile.unsqueeze(1) * height + row
    last_row = counts.unsqueeze(1) - 1
    is_row = (row <= last_row).flatten().nonzero().squeeze(1)
    tree_rows = trees.query_start_loc[sequence].unsqueeze(1) + torch.minimum(row, last_row)
    bases = seq_lens[sequence] - counts
    first_tail = (bases + 1) // chunk_tokens
    last_chunk = (bases + trees.depths[tree_rows].amax(1)) // chunk_tokens
    tiles = _Tiles(
        sequence=sequence,
        tree_rows=tree_rows,
        bases=bases,
        counts=counts,
        first_tail=first_tail,
        num_tails=last_chunk - first_tail + 1,
    )
    return tiles, is_row


def _tail_pairs(
    tiles: _Tiles, trees: TreeBatch, block_table: torch.Tensor, block_size: int, num_blocks_per_chunk: int
) -> tuple[TailPairs, torch.Tensor] | None:
    """Return the tail pairs of all tiles, their owners places among these, and each pair's chunk [m]."""
    if not (is_one_each := bool((tiles.num_tails == 1).all())) and not tiles.num_tails.any():
        return None
    owner, turn = ragged(tiles.num_tails)
    chunk_tokens = num_blocks_per_chunk * block_size
    chunk = tiles.first_tail[owner] + turn
    counts, tree_rows = tiles.counts[owner].unsqueeze(1), tiles.tree_rows[owner]
    # Column of the root, which may lie in an earlier chunk; row i's is i further.
    root = (tiles.bases[owner] - chunk * chunk_tokens).unsqueeze(1)
    # One more than are used: the last column is nobody's.
    num_blocks = max(num_blocks_per_chunk, -(-(int((root + counts).max()) + 1) // block_size))
    width = num_blocks * block_size
    block = chunk.unsqueeze(1) * num_blocks_per_chunk + torch.arange(num_blocks)
    blocks = _used_blocks(block, tiles, owner, block_table, block_size)

    request_rows = trees.query_start_loc[tiles.sequence[owner]].unsqueeze(1)
    node = torch.arange(trees.max_rows)
    column_of_position = trees.depths[request_rows + torch.minimum(node, counts - 1)] + root
    is_here = (column_of_position >= 0) & (column_of_position < chunk_tokens)
    is_seen = torch.nn.functional.pad(trees.mask[tree_rows] & is_here.unsqueeze(1), (0, 1))
    # All that precedes the root is looked up as the root is, what follows the last row as what nobody sees.
    is_seen[:, :, 0] = True
    row_of_column = torch.arange(width) - root
    looked_up = row_of_column.clamp(0, trees.max_rows).unsqueeze(1).expand(-1, tree_rows.shape[1], -1)
    is_hidden = ~is_seen.gather(2, looked_up)

    depth = node[1:]
    is_reached = (depth <= trees.depths[tree_rows].unsqueeze(2)) & (depth + root >= 0).unsqueeze(1)
    sources = _paths(trees)[tree_rows][:, :, 1:] + root.unsqueeze(1)
    targets = depth + root
    targets = torch.where((targets >= 0) & (targets < width), targets, width - 1)
    pairs = TailPairs(
        owner=owner,
        counts=tiles.num_tails,
        is_one_each=is_one_each,
        blocks=blocks.flatten(),
        is_hidden=is_hidden[:, None, :, None],
        is_unused=(row_of_column >= counts)[:, None, None],
        sources=torch.where(is_reached, sources, width - 1)[:, None, :, None],
        targets=targets[:, None, None, None],
    )
    return pairs, chunk


def _paths(trees: TreeBatch) -> torch.Tensor:
    """Return [t, R] int64: the row of each row's ancestor at each depth, itself included; anything further down."""
    depth = torch.where(trees.mask, trees.mask.cumsum(1) - 1, trees.max_rows)
    paths = torch.zeros(trees.num_rows, trees.max_rows + 1, dtype=torch.int64)
    paths.scatter_(1, depth, torch.arange(trees.max_rows).expand(trees.num_rows, -1))
    return paths[:, :-1]


def _used_blocks(
    block: torch.Tensor, tiles: _Tiles, owner: torch.Tensor, block_table: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Return the cache's blocks for block [m, P] of each owner's sequence.

    Entries past the end may be anything; block 0 exists, and what it gives is hidden.
    """
    is_used = block * block_size < (tiles.bases + tiles.counts)[owner].unsqueeze(1)
    column = block.clamp(max=block_table.shape[1] - 1)
    return torch.where(is_used, block_table[tiles.sequence[owner].unsqueeze(1), column].long(), 0)


def _pair(
    tiles: _Tiles,
    tails: tuple[TailPairs, torch.Tensor] | None,
    block_table: torch.Tensor,
    num_blocks_per_chunk: int,
    max_pairs: int,
) -> Iterator[TreeBatchPairs]:
    """Pair tiles with chunks, superchunk by superchunk, in batches of whole tiles and at most max_pairs."""
    within = torch.arange(num_blocks_per_chunk)
    most = int((tiles.first_tail + tiles.num_tails).max())
    for superchunk in range(0, most, SUPERCHUNK):
        end = (tiles.first_tail + tiles.num_tails - superchunk).clamp(0, SUPERCHUNK)
        members = end.nonzero().squeeze(1)
        shared = (tiles.first_tail - superchunk).clamp(0, SUPERCHUNK)
        first = 0
        for num_tiles, _ in runs(end[members].tolist(), max_pairs):
            part = members[first : first + num_tiles]
            first += num_tiles
            counts = shared[part]
            owner, chunk = ragged(counts)
            block = (superchunk + chunk).unsqueeze(1) * num_blocks_per_chunk + within
            # A shared chunk is full, so all its blocks are in the table.
            blocks = block_table[tiles.sequence[part[owner]].unsqueeze(1), block]
            yield TreeBatchPairs(
                tiles=part,
                is_first=superchunk == 0,
                owner=owner,
                blocks=blocks.long().flatten(),
                counts=counts,
                tails=_tails_of(tails, part, superchunk, most, len(tiles.sequence)),
            )


def _tails_of(
    tails: tuple[TailPairs, torch.Tensor] | None, part: torch.Tensor, superchunk: int, most: int, num_tiles: int
) -> TailPairs | None:
    """Return the tail pairs of some tiles that lie in one superchunk, of most chunks in all."""
    if tails is None:
        return None
    pairs, chunk = tails
    if most <= SUPERCHUNK and len(part) == num_tiles:
        return pairs
    place = torch.full((num_tiles,), -1)
    place[part] = torch.arange(len(part))
    owner = place[pairs.owner]
    chosen = ((owner >= 0) & (chunk >= superchunk) & (chunk < superchunk + SUPERCHUNK)).nonzero().squeeze(1)
    return pairs.select(chosen, owner[chosen], len(part)) if len(chosen) else None
