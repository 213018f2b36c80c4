"""Random trees on paged caches whose unused slots are poison, and the error that tree attention may have."""

import math
from dataclasses import dataclass

import torch

from kernels.kv_attention import KVCache, kv_cache_from_pages, page_bytes
from kernels.kv_attention.cpu import write_kv_cpu
from kernels.tree_attention import PagedCache, PlainCache, TreeBatch, plain_cache_from_pages, tree_batch

INT8_FIELDS = ("key", "value", "key_scale", "value_scale")
KINDS = ("int8", "plain", "transposed")
"""INT8; float, key by key; float with the keys of a block transposed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Requests with trees, written into a cache.

    Attributes:
        parents: Of each request's rows.
        bases: Position of each root.
        keys: [length, Hkv, D] of each request: the prefix, then its rows.
        values: As keys.
    """

    cache: PagedCache
    trees: TreeBatch
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    parents: list[list[int]]
    bases: list[int]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def arguments(self) -> dict[str, object]:
        return {"trees": self.trees, "block_table": self.block_table, "seq_lens": self.seq_lens}


def random_parents(num_rows: int, generator: torch.Generator) -> list[int]:
    """Return a tree in which about half of the rows go on where the row before them ended."""
    parents = [0]
    for row in range(1, num_rows):
        goes_on = bool(torch.rand(1, generator=generator) < 0.5)
        parents.append(row - 1 if goes_on else int(torch.randint(0, row, (1,), generator=generator)))
    return parents


def path_of(parents: list[int], row: int) -> list[int]:
    """Return the rows from the root to a row, both included."""
    path = [row]
    while path[-1]:
        path.append(parents[path[-1]])
    return path[::-1]


def poisoned_cache(
    num_blocks: int,
    *,
    kind: str = "int8",
    block_size: int = 16,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
) -> PagedCache:
    """Return a cache none of whose slots is in use: NaN, and codes -128, which no write makes."""
    if kind != "int8":
        pages = torch.full((num_blocks, num_kv_heads, 2 * block_size, head_dim), math.nan, dtype=dtype)
        return plain_cache_from_pages(pages, is_key_transposed=kind == "transposed")
    memory = torch.zeros(num_blocks, page_bytes(block_size, num_kv_heads, head_dim), dtype=torch.uint8)
    cache = kv_cache_from_pages(memory, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim)
    for codes, scale in ((cache.key, cache.key_scale), (cache.value, cache.value_scale)):
        codes.fill_(-128)
        scale.fill_(math.nan)
    return cache


def write(cache: PagedCache, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    if isinstance(cache, KVCache):
        write_kv_cpu(key, value, cache, slot_mapping=slots)
    else:
        place = slots // cache.block_size, slots % cache.block_size
        cache.key[place], cache.value[place] = key, value


def slots_of(block_table: torch.Tensor, request: int, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    return block_table[request, positions // block_size].long() * block_size + positions % block_size


def random_case(
    bases: list[int],
    parents: list[list[int]],
    *,
    kind: str = "int8",
    block_size: int = 16,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Return requests in random blocks; the table holds garbage past each end."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [base + len(rows) for base, rows in zip(bases, parents, strict=True)]
    counts = [-(-length // block_size) for length in lengths]
    cache = poisoned_cache(
        sum(counts) + 3,
        kind=kind,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    )
    blocks = torch.randperm(cache.num_blocks, generator=generator)
    block_table = torch.full((len(bases), max(counts) + 1), 2**31 - 1, dtype=torch.int32)
    keys, values = [], []
    first = 0
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        block_table[b, :count] = blocks[first : first + count]
        first += count
        key, value = torch.randn(2, length, num_kv_heads, head_dim, generator=generator).to(dtype)
        key[::7] *= 2
        value[::5] *= 2
        value[1::11] = 0
        write(cache, key, value, slots_of(block_table, b, torch.arange(length), block_size))
        keys.append(key)
        values.append(value)
    flat = torch.tensor([parent for rows in parents for parent in rows])
    return Case(
        cache=cache,
        trees=tree_batch(flat, torch.tensor([len(rows) for rows in parents])),
        block_table=block_table,
        seq_lens=torch.tensor(lengths),
        parents=parents,
        bases=bases,
        keys=keys,
        values=values,
    )


def random_query(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cache_tensors(cache: PagedCache) -> list[torch.Tensor]:
    return [getattr(cache, name) for name in (INT8_FIELDS if isinstance(cache, KVCache) else ("key", "value"))]


def assert_attention_close(
    got: tuple[torch.Tensor, torch.Tensor],
    expected: tuple[torch.Tensor, torch.Tensor],
    query: torch.Tensor,
    cache: PagedCache,
    scale: float,
    max_length: int,
    *,
    rounds_weights: bool = False,
) -> None:
    """Compare with another evaluation, in float32 but for the output and, with rounds_weights, the weights.

    With u = 2**-24: a score is a sum of D products, off by at most D u |q| |k| scale (Cauchy-Schwarz) in either
    evaluation; a query made float16 adds at most as much. A weight has that as a relative error, in numerator and
    sum; a sum over N tokens adds at most N u. A weight rounded to the operands' 16 bits is off by half a unit in its
    last place, a whole one of bfloat16's where the interpreter truncates, or by 2**-25 of the largest, N times at
    most, where float16 has no normal number for it. The outputs' own rounding may differ by a unit in the last place.
    """
    if isinstance(cache, PlainCache):
        key_norm = cache.key.float().norm(dim=-1).nan_to_num(0.0).max().item()
        largest = cache.value.float().abs().nan_to_num(0.0).max().item()
    else:
        key_norm = (cache.key.float().norm(dim=-1) * cache.key_scale).nan_to_num(0.0).max().item()
        largest = (127 * cache.value_scale).nan_to_num(0.0).max().item()
    score_error = 2 * cache.head_dim * 2.0**-24 * query.float().norm(dim=-1).max().item() * key_norm * scale
    sum_error = max_length * 2.0**-24
    weight_error = 0.0
    if rounds_weights and query.dtype != torch.float32:
        is_bfloat16 = isinstance(cache, PlainCache) and query.dtype == torch.bfloat16
        weight_error = 2.0**-7 if is_bfloat16 else 2.0**-11 + 1.07 * max_length * 2.0**-25
    unit = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[query.dtype]
    output, lse = (x.cpu() for x in got)
    assert output.dtype == query.dtype
    assert not output.isnan().any()
    assert not lse.isnan().any()
    absolute = largest * (4 * score_error + 2 * sum_error + weight_error)
    torch.testing.assert_close(output.float(), expected[0].float(), rtol=unit, atol=absolute)
    torch.testing.assert_close(lse, expected[1], rtol=2.0**-22, atol=2 * score_error + 2 * sum_error)
