"""The Triton kernels of token trees against the reference: on CUDA, or interpreted with TRITON_INTERPRET=1.

Neither holds in an ordinary CPU run, where ``test_tree_attention.py`` starts this file interpreted.
"""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.kv_attention import KVCache
from kernels.tree_attention import PagedCache, PlainCache, accepted_moves
from kernels.tree_attention.reference import compact_kv_reference, tree_attention_reference
from tests.kernels.tree_cases import (
    INT8_FIELDS,
    KINDS,
    Case,
    assert_attention_close,
    cache_tensors,
    path_of,
    random_case,
    random_parents,
    random_query,
)

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
pytestmark = (
    []
    if IS_INTERPRETED
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA or TRITON_INTERPRET=1"),
    ]
)

if IS_INTERPRETED or torch.cuda.is_available():
    from kernels.tree_attention.triton_attend import default_split_tokens, tree_attention_triton
    from kernels.tree_attention.triton_compact import compact_kv_triton


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill the floats that a wrapper allocates with NaN: an element never written cannot pass."""
    empty = torch.empty

    def poisoned(*size: object, **options: object) -> torch.Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def on_device(cache: PagedCache) -> PagedCache:
    """Return a copy on the device, of the same strides."""
    copies = {}
    for name in INT8_FIELDS if isinstance(cache, KVCache) else ("key", "value"):
        tensor = getattr(cache, name)
        copies[name] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
        copies[name].copy_(tensor)
    return (KVCache if isinstance(cache, KVCache) else PlainCache)(**copies)


def check(
    case: Case, num_query_heads: int, dtype: torch.dtype = torch.float32, split_tokens: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare all rows, and one of no request behind them."""
    head_dim = case.cache.head_dim
    query = random_query(case.trees.num_rows + 1, num_query_heads, head_dim, dtype=dtype)
    scale = head_dim**-0.5
    got = tree_attention_triton(
        query.to(DEVICE),
        on_device(case.cache),
        trees=case.trees.to(DEVICE),
        block_table=case.block_table.to(DEVICE),
        seq_lens=case.seq_lens.to(DEVICE),
        scale=scale,
        split_tokens=split_tokens,
    )
    expected = tree_attention_reference(query, case.cache, **case.arguments(), scale=scale)
    max_length = int(case.seq_lens.max())
    assert_attention_close(got, expected, query, case.cache, scale, max_length, rounds_weights=True)
    assert not got[0][-1].any()
    assert (got[1][-1] == -math.inf).all()
    return got


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("int8", torch.bfloat16),
        ("int8", torch.float32),
        ("plain", torch.bfloat16),
        ("plain", torch.float16),
        ("transposed", torch.float32),
    ],
)
def test_block_tile_and_split_edges(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    bases = [0, 15, 16, 30, 62, 63, 64, 125, 127]
    parents = [random_parents(1 + 2 * b % 5, generator) for b in range(len(bases))]
    check(random_case(bases, parents, kind=kind, dtype=dtype, num_kv_heads=1), 1, dtype)


@pytest.mark.parametrize(
    ("num_query_heads", "num_kv_heads", "head_dim", "block_size", "kind"),
    [
        (16, 1, 128, 16, "int8"),
        (3, 3, 64, 24, "plain"),
        (17, 1, 32, 256, "int8"),
        (6, 2, 64, 1, "transposed"),
        (8, 2, 128, 32, "transposed"),
    ],
)
def test_heads_and_layouts(num_query_heads: int, num_kv_heads: int, head_dim: int, block_size: int, kind: str) -> None:
    """Trees that take a part of a tile, just one and several."""
    generator = torch.Generator().manual_seed(4)
    parents = [random_parents(rows, generator) for rows in (1, 2, 9)]
    layout = dict(num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size)
    check(
        random_case([130, 60, 5], parents, kind=kind, dtype=torch.bfloat16, **layout), num_query_heads, torch.bfloat16
    )


@given(
    st.lists(st.tuples(st.integers(0, 150), st.integers(1, 8), st.integers(0, 2**20)), min_size=1, max_size=2),
    st.sampled_from(KINDS),
)
@settings(deadline=None, max_examples=4)
def test_random_trees(requests: list[tuple[int, int, int]], kind: str) -> None:
    parents = [random_parents(rows, torch.Generator().manual_seed(seed)) for _, rows, seed in requests]
    check(random_case([base for base, *_ in requests], parents, kind=kind, dtype=torch.bfloat16), 4, torch.bfloat16)


def test_a_split_of_which_a_row_sees_nothing() -> None:
    """The second split holds nodes of one branch only."""
    parents = [0, *range(9), *[0] * 12]
    check(random_case([118], [parents], num_kv_heads=1), 1)


@pytest.mark.parametrize("split_tokens", [256, 384])
def test_other_splits(split_tokens: int) -> None:
    check(random_case([300, 20], [[0, 0, 1], [0]], num_kv_heads=1), 1, split_tokens=split_tokens)


def test_default_split_tokens() -> None:
    assert default_split_tokens(1, 1, 132) == 512
    assert default_split_tokens(12, 32_768, 132) == 1024
    assert default_split_tokens(10**6, 32_768, 132) == 8192


def test_wrong_launches_are_refused() -> None:
    case = random_case([3], [[0]])
    query = random_query(1, 4, 32).to(DEVICE)
    arguments = {
        "trees": case.trees.to(DEVICE),
        "block_table": case.block_table.to(DEVICE),
        "seq_lens": case.seq_lens.to(DEVICE),
        "scale": 0.2,
    }
    for name, value in (("split_tokens", 100), ("split_tokens", 0), ("max_seq_len", 10**6), ("max_seq_len", -1)):
        with pytest.raises(ValueError, match=name + ": got .* expected"):
            tree_attention_triton(query, on_device(case.cache), **arguments, **{name: value})


@pytest.mark.parametrize("kind", KINDS)
def test_compaction(kind: str) -> None:
    """Of ranges that overlap, too; unused slots are NaN and must stay as they are."""
    generator = torch.Generator().manual_seed(8)
    parents = [[0, 0, 0, *range(2, 19)], random_parents(12, generator), [0], random_parents(9, generator)]
    paths = [[0, *range(2, 20)], path_of(parents[1], 11), [], path_of(parents[3], 8)]
    case = random_case([13, 5, 40, 60], parents, kind=kind, num_kv_heads=3, dtype=torch.bfloat16)
    moves = accepted_moves(
        rows=torch.tensor([row for path in paths for row in path]),
        counts=torch.tensor([len(path) for path in paths]),
        bases=torch.tensor(case.bases),
        block_table=case.block_table,
        block_size=16,
    )
    moved = on_device(case.cache)
    compact_kv_triton([moved], moves.to(DEVICE))
    compact_kv_reference([case.cache], moves)
    for got, expected in zip(cache_tensors(moved), cache_tensors(case.cache), strict=True):
        got, expected = (x.cpu().contiguous().view(torch.int8) for x in (got, expected))
        assert torch.equal(got, expected)
