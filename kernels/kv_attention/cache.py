"""The INT8 paged KV cache: its layout and the checks of everything that is called on it.

Owns the tensors of one layer's cache. Knows nothing of requests, of who hands out blocks or of the engine
that allocates the memory.

One block holds block_size consecutive tokens of one sequence; a slot is block * block_size + offset. Each
token has, for each KV head, D codes and one scale for the key and the same for the value:

    key_cache   int8     [num_blocks, block_size, Hkv, D]      key_scale   float32 [num_blocks, block_size, Hkv]
    value_cache int8     [num_blocks, block_size, Hkv, D]      value_scale float32 [num_blocks, block_size, Hkv]

    block_table [B, max_blocks]     row 1: | 7 | 2 | 9 | . |     seq_lens[1] = 2 * block_size + 3
                                             |   |   +---------> block 9: three tokens in use, the rest unread
                                             |   +-------------> block 2: positions block_size .. 2 * block_size - 1
                                             +-----------------> block 7: positions 0 .. block_size - 1

scale = max|x| / 127 over the D elements, code = round_half_even(x / scale) clamped to [-127, 127], both in
float32 with correctly rounded division, so every implementation writes the same bytes; the zero vector has
scale 0 and codes 0. An element is off by at most half a scale.

Unused slots may hold anything, NaN scales included: nothing reads them into a result.
"""

from dataclasses import dataclass

import torch

HEAD_DIMS = (32, 64, 128)
QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCache:
    """One layer's cache; see the module for the layout.

    Any strides but that of D, which is 1; those of codes are multiples of 4, and of 16 where speed matters.

    Raises:
        ValueError: A shape, dtype, device or stride is wrong.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_scale: torch.Tensor
    value_scale: torch.Tensor

    def __post_init__(self) -> None:
        if self.key.dim() != 4 or self.key.shape[3] not in HEAD_DIMS or 0 in self.key.shape:
            raise ValueError(
                f"key: got shape {tuple(self.key.shape)}, expected [num_blocks, block_size, Hkv, D], none 0,"
                f" D one of {HEAD_DIMS}"
            )
        for name in ("key", "value"):
            tensor = getattr(self, name)
            _check(name, tensor, tuple(self.key.shape), (torch.int8,), self.key.device)
            if tensor.stride(3) != 1:
                raise ValueError(f"{name}: got strides {tensor.stride()}, expected a contiguous last dimension")
            if tensor.storage_offset() % 4 or any(stride % 4 for stride in tensor.stride()[:3]):
                raise ValueError(
                    f"{name}: got strides {tensor.stride()} and offset {tensor.storage_offset()}, expected multiples"
                    " of 4: codes are read four at a time"
                )
        for name in ("key_scale", "value_scale"):
            _check(name, getattr(self, name), tuple(self.key.shape[:3]), (torch.float32,), self.key.device)

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


def page_bytes(block_size: int, num_kv_heads: int, head_dim: int) -> int:
    """Return the bytes of one block of one layer: keys, values and their scales."""
    return block_size * num_kv_heads * 2 * (head_dim + SCALE_BYTES)


def kv_cache_from_pages(pages: torch.Tensor, *, block_size: int, num_kv_heads: int, head_dim: int) -> KVCache:
    """View one allocation as a cache, one page a block, without copying.

    A page holds, head-major: key codes [Hkv, block_size, D], value codes [Hkv, block_size, D], key scales
    [Hkv, block_size], value scales [Hkv, block_size]. Head-major because a head is read apart from the others.

    Args:
        pages: [num_blocks, page_bytes(...)] int8 or uint8, any stride between pages that is a multiple of 4.

    Raises:
        ValueError: A shape, dtype or stride is wrong, or the memory is not aligned to a float32.
    """
    if pages.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"pages: got {pages.dtype}, expected int8 or uint8")
    num_bytes = page_bytes(block_size, num_kv_heads, head_dim)
    if pages.dim() != 2 or pages.shape[1] != num_bytes or pages.stride(1) != 1:
        raise ValueError(
            f"pages: got shape {tuple(pages.shape)} and strides {pages.stride()}, expected [num_blocks, {num_bytes}]"
            " with a contiguous last dimension"
        )
    if pages.stride(0) % SCALE_BYTES or pages.storage_offset() % SCALE_BYTES:
        raise ValueError(
            f"pages: got stride {pages.stride(0)} and offset {pages.storage_offset()}, expected multiples of 4"
        )
    num_codes = block_size * num_kv_heads * head_dim
    codes = pages.view(torch.int8)
    key, value = (
        part.unflatten(1, (num_kv_heads, block_size, head_dim)).transpose(1, 2)
        for part in (codes[:, :num_codes], codes[:, num_codes : 2 * num_codes])
    )
    scales = pages[:, 2 * num_codes :].view(torch.float32).unflatten(1, (2, num_kv_heads, block_size))
    key_scale, value_scale = scales.transpose(2, 3).unbind(1)
    return KVCache(key=key, value=value, key_scale=key_scale, value_scale=value_scale)


def check_write(key: torch.Tensor, value: torch.Tensor, cache: KVCache, slot_mapping: torch.Tensor) -> None:
    """Raise ValueError unless key and value [T, Hkv, D] can be written at slot_mapping [T]."""
    if key.dim() != 3:
        raise ValueError(f"key: got shape {tuple(key.shape)}, expected [T, Hkv, D]")
    shape = (key.shape[0], cache.num_kv_heads, cache.head_dim)
    for name, tensor in (("key", key), ("value", value)):
        _check(name, tensor, shape, (key.dtype,) if key.dtype in QUERY_DTYPES else QUERY_DTYPES, cache.key.device)
        _check_last_stride(name, tensor)
    _check("slot_mapping", slot_mapping, shape[:1], (torch.int64,), cache.key.device)
    if slot_mapping.device.type == "cpu" and slot_mapping.numel():
        low, high = (bound.item() for bound in slot_mapping.aminmax())
        num_slots = cache.num_blocks * cache.block_size
        if low < -1 or high >= num_slots:
            raise ValueError(f"slot_mapping: got values in [{low}, {high}], expected -1 or a slot below {num_slots}")


def check_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    cache: KVCache,
) -> None:
    """Raise ValueError unless the arguments that ``write_kv`` does not have fit it and one another."""
    if query.dim() != 3 or query.shape[1] % cache.num_kv_heads:
        raise ValueError(f"query: got shape {tuple(query.shape)}, expected [T, a multiple of {cache.num_kv_heads}, D]")
    _check("query", query, (key.shape[0], query.shape[1], cache.head_dim), (key.dtype,), cache.key.device)
    _check_last_stride("query", query)
    for name, weight in zip(("q_weight", "k_weight"), weights, strict=True):
        _check(name, weight, (cache.head_dim,), QUERY_DTYPES, cache.key.device)
    _check("positions", positions, (key.shape[0],), (torch.int64,), cache.key.device)
    if cos_sin_cache.dim() != 2:
        raise ValueError(f"cos_sin_cache: got shape {tuple(cos_sin_cache.shape)}, expected [max_position, D]")
    _check("cos_sin_cache", cos_sin_cache, (cos_sin_cache.shape[0], cache.head_dim), QUERY_DTYPES, cache.key.device)
    _check_last_stride("cos_sin_cache", cos_sin_cache)
    if positions.device.type == "cpu" and positions.numel():
        low, high = (bound.item() for bound in positions.aminmax())
        if low < 0 or high >= len(cos_sin_cache):
            raise ValueError(f"positions: got values in [{low}, {high}], expected [0, {len(cos_sin_cache)})")


def check_attention(
    query: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    seq_lens: torch.Tensor,
    scale: float,
) -> None:
    """Raise ValueError unless the arguments of decode (query_start_loc None) or prefill attention fit."""
    if query.dim() != 3 or query.shape[1] == 0 or query.shape[1] % cache.num_kv_heads:
        raise ValueError(
            f"query: got shape {tuple(query.shape)}, expected [T, Hq, D], Hq a multiple of {cache.num_kv_heads}"
        )
    device = cache.key.device
    _check("query", query, (*query.shape[:2], cache.head_dim), QUERY_DTYPES, device)
    _check_last_stride("query", query)
    num_sequences = len(seq_lens) if query_start_loc is not None else len(query)
    integers = (torch.int32, torch.int64)
    _check("seq_lens", seq_lens, (num_sequences,), integers, device)
    if block_table.dim() != 2:
        raise ValueError(f"block_table: got shape {tuple(block_table.shape)}, expected [B, max_blocks]")
    _check("block_table", block_table, (num_sequences, block_table.shape[1]), integers, device)
    if query_start_loc is not None:
        _check("query_start_loc", query_start_loc, (num_sequences + 1,), integers, device)
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale: got {scale}, expected a positive finite number")
    if device.type == "cpu":
        check_lengths(block_table, query_start_loc, seq_lens, len(query), cache.block_size)


def check_lengths(
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    seq_lens: torch.Tensor,
    num_rows: int,
    block_size: int,
) -> None:
    """Raise ValueError unless the values, read on the host, describe sequences that the table can hold."""
    if not len(seq_lens):
        return
    low, high = (bound.item() for bound in seq_lens.aminmax())
    limit = block_table.shape[1] * block_size
    if low < 0 or high > limit:
        raise ValueError(f"seq_lens: got values in [{low}, {high}], expected [0, {limit}] (max_blocks * block_size)")
    if query_start_loc is None:
        return
    query_lens = query_start_loc.diff()
    if query_start_loc[0] != 0 or query_start_loc[-1] > num_rows or (query_lens < 0).any():
        raise ValueError(f"query_start_loc: got {query_start_loc.tolist()}, expected to rise from 0 to {num_rows}")
    if (query_lens > seq_lens).any():
        raise ValueError(
            f"query_start_loc: got query lengths {query_lens.tolist()}, expected at most seq_lens {seq_lens.tolist()}"
        )


def _check(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: got {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.device != device:
        raise ValueError(f"{name}: got device {tensor.device}, expected {device} as the cache")


def _check_last_stride(name: str, tensor: torch.Tensor) -> None:
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name}: got strides {tensor.stride()}, expected a contiguous last dimension")
