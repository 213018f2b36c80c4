"""Attention of trees over vLLM's CPU cache layout, against the reference of kernels.tree_attention."""

import numpy as np
import pytest
import torch

from actors.vllm_plugin import tree_rows
from actors.vllm_plugin.tree_rows import NativeTrees, attend_trees, plan_step
from actors.vllm_plugin.tree_steps import kernel_batch
from actors.vllm_plugin.trees import TreeBatch
from kernels.tree_attention import plain_cache_from_pages
from kernels.tree_attention.reference import tree_attention_reference
from rollout.speculation.tree import TokenTree
from tests.kernels.native_cases import needs_vectors

KV_HEADS, HEAD_DIM, BLOCK_SIZE = 2, 32, 32
SCALE = HEAD_DIM**-0.5
# Scores of size 1 from 32 products, weighted sums of at most 300 values below 5: as test_int8_kv.py derives.
TOLERANCE = 1e-4


def random_tree(draw: np.random.Generator, num_nodes: int) -> TokenTree:
    parents, depths, widths = [], [0], [0] * (num_nodes + 2)
    while len(parents) < num_nodes:
        parent = int(draw.integers(0, len(parents) + 1))
        depth = depths[parent] + 1
        if widths[depth] < 4:
            widths[depth] += 1
            parents.append(parent)
            depths.append(depth)
    return TokenTree.of_lists(list(range(num_nodes)), parents)


@pytest.mark.parametrize("num_query_heads", [2, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_elements", [2**21, 1, pytest.param(None, marks=needs_vectors, id="native")])
def test_rows_of_trees_agree_with_the_reference(
    monkeypatch: pytest.MonkeyPatch, num_query_heads: int, dtype: torch.dtype, max_elements: int | None
) -> None:
    """Trees of many sizes among other rows, bases at block edges and within; whatever is unused holds NaN."""
    if max_elements is not None:
        monkeypatch.setattr(tree_rows, "MAX_ELEMENTS", max_elements)
        monkeypatch.setattr(tree_rows, "native_tree_attention", lambda *_, **__: None)
    draw = np.random.default_rng(num_query_heads)
    torch.manual_seed(num_query_heads)
    bases, sizes = [0, 31, 32, 33, 7, 255, 130, 64], [3, 1, 12, 5, 16, 9, 2, 30]
    others = [5, 1, 0, 3, 1, 0, 0, 2]  # rows of a request without a tree before each
    trees, counts, all_bases = [], [], []
    for base, size, other in zip(bases, sizes, others, strict=True):
        if other:
            trees.append(TokenTree.empty())
            counts.append(other)
            all_bases.append(other - 1)
        trees.append(random_tree(draw, size))
        counts.append(size + 1)
        all_bases.append(base)
    batch = TreeBatch(trees=trees, starts=np.cumsum([0, *counts]), bases=np.array(all_bases))
    places = np.array([place for place, tree in enumerate(trees) if tree.num_nodes])

    num_blocks = 60
    cache = torch.full((num_blocks, KV_HEADS, BLOCK_SIZE, 2 * HEAD_DIM), torch.nan, dtype=dtype)
    view = plain_cache_from_pages(cache.view(num_blocks, KV_HEADS, 2 * BLOCK_SIZE, HEAD_DIM), is_key_transposed=True)
    free = draw.permutation(np.arange(1, num_blocks)).tolist()
    table = np.zeros((len(trees), 12), dtype=np.int32)
    lengths = []
    for place, tree in enumerate(trees):
        length = int(batch.bases[place]) + tree.num_rows
        lengths.append(length)
        table[place, : -(-length // BLOCK_SIZE)] = [free.pop() for _ in range(-(-length // BLOCK_SIZE))]
        for position in range(length):
            where = int(table[place, position // BLOCK_SIZE]), position % BLOCK_SIZE
            view.key[where], view.value[where] = torch.randn(2, KV_HEADS, HEAD_DIM).to(dtype)

    query = torch.randn(int(batch.starts[-1]), num_query_heads, HEAD_DIM).to(dtype)
    output = torch.full_like(query, -7.0)
    plan = plan_step(batch, places, table, dtype, num_kv_heads=KV_HEADS, block_size=BLOCK_SIZE, head_dim=HEAD_DIM)
    if max_elements is None:
        assert isinstance(plan, NativeTrees)
    else:
        assert isinstance(plan, list) and len(plan) == (1 if max_elements > 1 else len(places))
    attend_trees(query, cache, plan, SCALE, output)

    rows = np.concatenate([np.arange(batch.starts[place], batch.starts[place + 1]) for place in places])
    chosen = torch.from_numpy(places)
    expected, _ = tree_attention_reference(
        query[rows],
        view,
        trees=kernel_batch(batch, places),
        block_table=torch.from_numpy(table)[chosen],
        seq_lens=torch.tensor(lengths)[chosen],
        scale=SCALE,
    )
    half_ulp = 2.0**-8 if dtype is torch.bfloat16 else 0.0  # two roundings of the output, relative
    error = (output[rows].float() - expected.float()).abs()
    assert (error <= TOLERANCE + 2 * half_ulp * expected.float().abs()).all()
    rest = np.setdiff1d(np.arange(len(query)), rows)
    assert (output[rest] == -7.0).all(), "other rows are not touched"
