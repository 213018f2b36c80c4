"""The unquantised paged cache that trees may also sit on, and the checks of what is called with a tree.

Owns the tensors of one layer's float cache. The INT8 cache is ``kernels.kv_attention.cache.KVCache``; an operation
of this package takes either. Knows nothing of requests or of who hands out blocks.

Blocks, slots and block tables are those of ``kernels.kv_attention.cache``. Unused slots may hold anything, NaN
included: nothing reads them into a result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.kv_attention.cache import HEAD_DIMS, QUERY_DTYPES, KVCache
from kernels.tree_attention.batch import TreeBatch
from kernels.tree_attention.moves import SlotMoves

_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainCache:
    """One layer's cache of float32, bfloat16 or float16.

    Attributes:
        key: [num_blocks, block_size, Hkv, D], any strides: keys may lie token by token or transposed.
        value: As key, its last dimension contiguous.

    Raises:
        ValueError: A shape, dtype, device or stride is wrong.
    """

    key: torch.Tensor
    value: torch.Tensor

    def __post_init__(self) -> None:
        if self.key.dim() != 4 or self.key.shape[3] not in HEAD_DIMS or 0 in self.key.shape:
            raise ValueError(
                f"key: got shape {tuple(self.key.shape)}, expected [num_blocks, block_size, Hkv, D], none 0,"
                f" D one of {HEAD_DIMS}"
            )
        if self.key.dtype not in QUERY_DTYPES:
            raise ValueError(f"key: got {self.key.dtype}, expected {' or '.join(map(str, QUERY_DTYPES))}")
        for attribute in ("shape", "dtype", "device"):
            got, expected = getattr(self.value, attribute), getattr(self.key, attribute)
            if got != expected:
                raise ValueError(f"value: got {attribute} {got}, expected {expected} as key")
        if self.value.stride(3) != 1:
            raise ValueError(f"value: got strides {self.value.stride()}, expected a contiguous last dimension")

    @property
    def num_blocks(self) -> int:
        return self.key.shape[0]

    @property
    def block_size(self) -> int:
        return self.key.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.key.shape[2]

    @property
    def head_dim(self) -> int:
        return self.key.shape[3]


PagedCache = KVCache | PlainCache


def plain_cache_from_pages(pages: torch.Tensor, *, is_key_transposed: bool) -> PlainCache:
    """View one allocation as a cache without copying; a page holds a block's keys, then its values, head by head.

    Args:
        pages: [num_blocks, Hkv, 2 * block_size, D], a head's bytes contiguous: block_size rows of keys, then of
            values.
        is_key_transposed: The keys of a block and head lie as [D, block_size], as CPU attention kernels that
            multiply column by column want them.

    Raises:
        ValueError: A shape, dtype or stride is wrong.
    """
    if pages.dim() != 4 or pages.shape[2] % 2 or pages.stride()[2:] != (pages.shape[3], 1):
        raise ValueError(
            f"pages: got shape {tuple(pages.shape)} and strides {pages.stride()}, expected [num_blocks, Hkv,"
            " 2 * block_size, D] with contiguous last two dimensions"
        )
    key, value = pages.chunk(2, 2)
    if is_key_transposed:
        key = key.flatten(2).unflatten(2, (key.shape[3], key.shape[2])).transpose(2, 3)
    return PlainCache(key=key.transpose(1, 2), value=value.transpose(1, 2))


def check_tree_attention(
    query: torch.Tensor,
    cache: PagedCache,
    trees: TreeBatch,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> None:
    """Raise ValueError unless the arguments of tree attention fit one another."""
    device = cache.key.device
    if query.dim() != 3 or query.shape[1] == 0 or query.shape[1] % cache.num_kv_heads:
        raise ValueError(
            f"query: got shape {tuple(query.shape)}, expected [T, Hq, D], Hq a multiple of {cache.num_kv_heads}"
        )
    if len(query) < trees.num_rows or query.shape[2] != cache.head_dim or query.stride(2) != 1:
        raise ValueError(
            f"query: got shape {tuple(query.shape)} and strides {query.stride()}, expected [at least"
            f" {trees.num_rows}, Hq, {cache.head_dim}] with a contiguous last dimension"
        )
    dtypes = (cache.key.dtype,) if isinstance(cache, PlainCache) else QUERY_DTYPES
    if query.dtype not in dtypes or query.device != device:
        raise ValueError(
            f"query: got {query.dtype} on {query.device}, expected {' or '.join(map(str, dtypes))} on {device}"
        )
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale: got {scale}, expected a positive finite number")
    check_sequences(trees, block_table, seq_lens, cache)


def check_sequences(trees: TreeBatch, block_table: torch.Tensor, seq_lens: torch.Tensor, cache: PagedCache) -> None:
    """Raise ValueError unless the sequences hold their trees; values are compared on the CPU only."""
    num_requests = trees.num_requests
    if block_table.dim() != 2 or len(block_table) != num_requests or block_table.dtype not in _INTEGERS:
        raise ValueError(
            f"block_table: got {block_table.dtype} of shape {tuple(block_table.shape)}, expected integers"
            f" [{num_requests}, max_blocks]"
        )
    if seq_lens.shape != (num_requests,) or seq_lens.dtype not in _INTEGERS:
        raise ValueError(
            f"seq_lens: got {seq_lens.dtype} of shape {tuple(seq_lens.shape)}, expected integers [{num_requests}]"
        )
    for name, tensor in (("block_table", block_table), ("seq_lens", seq_lens), ("trees", trees.mask)):
        if tensor.device != cache.key.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {cache.key.device} as the cache")
    if seq_lens.device.type != "cpu" or not num_requests:
        return
    limit = block_table.shape[1] * cache.block_size
    if (seq_lens < trees.counts).any() or (seq_lens > limit).any():
        raise ValueError(
            f"seq_lens: got {seq_lens.tolist()}, expected at least the rows of each tree, {trees.counts.tolist()},"
            f" and at most {limit} (max_blocks * block_size)"
        )


def check_moves(caches: Sequence[PagedCache], moves: SlotMoves) -> None:
    """Raise ValueError unless the moves are of these caches' slots; values are compared on the CPU only."""
    for i, cache in enumerate(caches):
        if cache.key.device != moves.sources.device:
            raise ValueError(
                f"caches[{i}]: got device {cache.key.device}, expected {moves.sources.device} as the moves"
            )
    if moves.sources.device.type != "cpu" or not len(moves.sources) or not caches:
        return
    slots = torch.cat((moves.sources, moves.targets))
    low, high = (int(bound) for bound in slots.aminmax())
    limit = min(cache.num_blocks * cache.block_size for cache in caches)
    if low < 0 or high >= limit:
        raise ValueError(f"moves: got slots in [{low}, {high}], expected [0, {limit}), those of every cache")
