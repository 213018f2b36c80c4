"""Token trees: their masks, the CPU attention against the reference, and the bits of decoding each path.

The reference is compared with that of ``kernels.kv_attention``, path by path. The Triton kernels are compared with it
in ``test_tree_attention_triton.py``.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.kv_attention import decode_attention, prefill_attention
from kernels.kv_attention.reference import decode_attention_reference
from kernels.tree_attention import (
    PlainCache,
    TreeBatch,
    paged_step_attention_cpu,
    paged_tree_attention_cpu,
    plain_cache_from_pages,
    plan_step,
    plan_tree_attention,
    tree_attention,
    tree_batch,
)
from kernels.tree_attention.reference import tree_attention_reference
from tests.kernels.tree_cases import (
    KINDS,
    Case,
    assert_attention_close,
    cache_tensors,
    path_of,
    poisoned_cache,
    random_case,
    random_parents,
    random_query,
    slots_of,
    write,
)

CHUNK, SUPERCHUNK = 128, 1024
"""Tokens that ``kernels.kv_attention.plan`` sums at once, and that it merges under one maximum."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill the floats that an implementation allocates with NaN: an element never written cannot pass."""
    empty = torch.empty

    def poisoned(*size: object, **options: object) -> torch.Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@st.composite
def parent_lists(draw: st.DrawFn, max_rows: int = 20) -> list[int]:
    """A tree of at least its root; shrinks to a star."""
    parents = [0]
    for row in range(draw(st.integers(0, max_rows - 1))):
        parents.append(draw(st.integers(0, row)))
    return parents


def decode_path(case: Case, request: int, row: int, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode one row's path in a cache of its own, as if no other node had been."""
    base = case.bases[request]
    order = torch.cat((torch.arange(base), base + torch.tensor(path_of(case.parents[request], row))))
    cache = case.cache
    num_blocks = -(-len(order) // cache.block_size)
    alone = poisoned_cache(
        num_blocks, block_size=cache.block_size, num_kv_heads=cache.num_kv_heads, head_dim=cache.head_dim
    )
    write(alone, case.keys[request][order], case.values[request][order], torch.arange(len(order)))
    table, lengths = torch.arange(num_blocks).unsqueeze(0), torch.tensor([len(order)])
    return decode_attention(query.unsqueeze(0), alone, block_table=table, seq_lens=lengths, scale=cache.head_dim**-0.5)


def check_against_reference(case: Case, num_query_heads: int, dtype: torch.dtype = torch.float32) -> None:
    """Compare all rows, and one of no request behind them."""
    head_dim = case.cache.head_dim
    query = random_query(case.trees.num_rows + 1, num_query_heads, head_dim, dtype=dtype)
    scale = head_dim**-0.5
    got = tree_attention(query, case.cache, **case.arguments(), scale=scale)
    expected = tree_attention_reference(query, case.cache, **case.arguments(), scale=scale)
    assert_attention_close(got, expected, query, case.cache, scale, int(case.seq_lens.max()))
    assert not got[0][-1].any()
    assert (got[1][-1] == -math.inf).all()


@given(st.lists(parent_lists(), min_size=1, max_size=5))
@settings(deadline=None, max_examples=100)
def test_a_row_sees_its_path_and_nothing_else(parents: list[list[int]]) -> None:
    trees = tree_batch(
        torch.tensor([parent for rows in parents for parent in rows]), torch.tensor([len(rows) for rows in parents])
    )
    assert trees.max_rows == max(len(rows) for rows in parents)
    flat = 0
    for request, rows in enumerate(parents):
        assert trees.query_start_loc[request] == flat
        for row in range(len(rows)):
            path = path_of(rows, row)
            assert trees.mask[flat].nonzero().squeeze(1).tolist() == path
            assert trees.depths[flat] == len(path) - 1
            flat += 1


@pytest.mark.parametrize(
    ("parents", "counts", "name"),
    [
        ([0, 1], [2], "parents"),
        ([0, 0, 3, 0], [4], "parents"),
        ([0, -1], [2], "parents"),
        ([1, 0], [2], "parents"),
        ([0, 0], [0, 2], "counts"),
        ([0, 0], [3], "counts"),
        ([0, 0], [1], "counts"),
        ([0.0, 0.0], [2], "parents"),
        ([[0, 0]], [2], "parents"),
        ([0, 0], [[2]], "counts"),
    ],
)
def test_wrong_trees_are_refused(parents: list, counts: list, name: str) -> None:
    with pytest.raises(ValueError, match=name + ": got .* expected"):
        tree_batch(torch.tensor(parents), torch.tensor(counts))


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_the_reference_is_decoding_path_by_path(rows: int) -> None:
    case = random_case([0, 15, 37], [random_parents(rows, torch.Generator().manual_seed(b)) for b in range(3)])
    query = random_query(3 * rows, 4, 32)
    output, lse = tree_attention_reference(query, case.cache, **case.arguments(), scale=0.2)
    for request, base in enumerate(case.bases):
        for row in range(rows):
            flat = request * rows + row
            order = torch.cat((torch.arange(base), base + torch.tensor(path_of(case.parents[request], row))))
            alone = poisoned_cache(len(order), block_size=1)
            write(alone, case.keys[request][order], case.values[request][order], torch.arange(len(order)))
            expected = decode_attention_reference(
                query[flat : flat + 1],
                alone,
                block_table=torch.arange(len(order)).unsqueeze(0),
                seq_lens=torch.tensor([len(order)]),
                scale=0.2,
            )
            got = output[flat : flat + 1], lse[flat : flat + 1]
            # The same operations on the same numbers.
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_query_heads", "num_kv_heads", "head_dim", "block_size"),
    [(4, 4, 32, 16), (4, 2, 32, 32), (9, 3, 64, 24), (8, 1, 128, 16), (16, 1, 32, 1), (2, 1, 64, 256)],
)
def test_heads_and_layouts(kind: str, num_query_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> None:
    generator = torch.Generator().manual_seed(5)
    parents = [random_parents(rows, generator) for rows in (1, 17, 5)]
    case = random_case(
        [130, 119, 0], parents, kind=kind, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size
    )
    check_against_reference(case, num_query_heads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(kind: str, dtype: torch.dtype) -> None:
    parents = [random_parents(rows, torch.Generator().manual_seed(6)) for rows in (6, 18)]
    check_against_reference(random_case([250, 3], parents, kind=kind, dtype=dtype), 4, dtype)


@given(
    st.lists(st.tuples(st.integers(0, 300), parent_lists()), min_size=1, max_size=4),
    st.sampled_from(KINDS),
    st.sampled_from([1, 3, 16]),
    st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=40)
def test_random_trees(requests: list[tuple[int, list[int]]], kind: str, block_size: int, seed: int) -> None:
    bases, parents = map(list, zip(*requests, strict=True))
    check_against_reference(random_case(bases, parents, kind=kind, block_size=block_size, seed=seed), 4)


def check_bits_of_decoding(case: Case, num_query_heads: int) -> None:
    query = random_query(case.trees.num_rows, num_query_heads, case.cache.head_dim)
    output, lse = tree_attention(query, case.cache, **case.arguments(), scale=case.cache.head_dim**-0.5)
    starts = case.trees.query_start_loc.tolist()
    for request, parents in enumerate(case.parents):
        for row in range(len(parents)):
            flat = starts[request] + row
            expected = decode_path(case, request, row, query[flat])
            assert torch.equal(output[flat], expected[0][0]), (request, row)
            assert torch.equal(lse[flat], expected[1][0]), (request, row)


@given(
    st.lists(
        st.tuples(st.sampled_from([0, CHUNK, SUPERCHUNK]), st.integers(-20, 4), parent_lists()),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([(4, 2, 32, 16), (4, 4, 32, 24), (16, 1, 32, 32), (3, 1, 64, 1)]),
    st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=25)
def test_a_row_has_the_bits_of_decoding_its_path(
    requests: list[tuple[int, int, list[int]]], shape: tuple[int, int, int, int], seed: int
) -> None:
    """Where paths cross the edges of what decoding sums at once, too."""
    num_query_heads, num_kv_heads, head_dim, block_size = shape
    case = random_case(
        [max(0, edge + offset) for edge, offset, _ in requests],
        [parents for *_, parents in requests],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        seed=seed,
    )
    check_bits_of_decoding(case, num_query_heads)


def adds_token_by_token(width: int) -> bool:
    """Whether the BLAS sums so many terms one after the other, and not in blocks: MKL takes 192 on CPUs of AMD."""
    if width <= CHUNK:  # what decoding sums at once
        return True
    generator = torch.Generator().manual_seed(0)
    weights, values = torch.randn(4, CHUNK, generator=generator), torch.randn(CHUNK, 32, generator=generator)
    spread = torch.zeros(4, width), torch.zeros(width, 32)
    places = [*range(CHUNK - 1), width - 1]
    spread[0][:, places], spread[1][places] = weights, values
    return torch.equal(spread[0] @ spread[1], weights @ values)


@pytest.mark.parametrize("base", [0, 126, 127, 128, 1022])
@pytest.mark.parametrize("length", [62, 140], ids=["64 nodes", "142 nodes"])
def test_large_trees_have_the_bits_of_decoding(base: int, length: int) -> None:
    """As large as an engine makes them; and of more rows than a tile, and of paths that are longer than a chunk."""
    deep = [0, *range(length), 3, length + 1]
    if not adds_token_by_token(base % CHUNK + len(deep)):
        assert length == 140, "trees that an engine makes fit every BLAS that is known"
        pytest.skip("this BLAS adds up in blocks that a chunk and a tree of 143 rows do not fit")
    case = random_case([base, 5], [deep, random_parents(70, torch.Generator().manual_seed(base))])
    check_bits_of_decoding(case, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_is_a_causal_chunk(kind: str) -> None:
    counts = [1, 4, 17, 33]
    case = random_case([40, 126, 0, 1020], [[0, *range(count - 1)] for count in counts], kind=kind)
    query = random_query(sum(counts), 4, 32)
    got = tree_attention(query, case.cache, **case.arguments(), scale=0.2)
    start_loc = torch.tensor([0, *counts]).cumsum(0)
    table, lengths = case.block_table, case.seq_lens
    if kind == "int8":
        expected = prefill_attention(
            query, case.cache, block_table=table, query_start_loc=start_loc, seq_lens=lengths, scale=0.2
        )
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        return
    for b, (key, value) in enumerate(zip(case.keys, case.values, strict=True)):
        rows = slice(int(start_loc[b]), int(start_loc[b + 1]))
        is_seen = torch.ones(counts[b], len(key), dtype=torch.bool).tril(case.bases[b])
        heads = (x.transpose(0, 1).repeat_interleave(2, 0) for x in (key, value))
        expected_output = torch.nn.functional.scaled_dot_product_attention(
            query[rows].transpose(0, 1), *heads, attn_mask=is_seen, scale=0.2
        )
        # As in assert_attention_close, where the terms are derived.
        bound = 4 * 2 * 32 * 2.0**-24 * query.norm(dim=-1).max() * key.norm(dim=-1).max() * 0.2
        atol = value.abs().max().item() * (bound.item() + 2 * len(key) * 2.0**-24)
        torch.testing.assert_close(got[0][rows].transpose(0, 1), expected_output, rtol=2.0**-23, atol=atol)


def test_no_nodes_are_plain_decoding() -> None:
    case = random_case([0, 1, 15, 127, 128, 1023, 1500], [[0]] * 7)
    query = random_query(7, 4, 32)
    got = tree_attention(query, case.cache, **case.arguments(), scale=0.2)
    expected = decode_attention(query, case.cache, block_table=case.block_table, seq_lens=case.seq_lens, scale=0.2)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@given(parent_lists(), st.integers(0, 2**20), st.integers(100, 140))
@settings(deadline=None, max_examples=25)
def test_what_a_row_does_not_see_does_not_reach_it(parents: list[int], seed: int, base: int) -> None:
    case = random_case([base], [parents], seed=seed)
    query = random_query(len(parents), 4, 32)
    before = tree_attention(query, case.cache, **case.arguments(), scale=0.2)
    changed = seed % len(parents)
    place = slice(base + changed, base + changed + 1)
    key, value = case.keys[0][place], case.values[0][place] + 5
    write(case.cache, key, value, slots_of(case.block_table, 0, torch.tensor([base + changed]), 16))
    after = tree_attention(query, case.cache, **case.arguments(), scale=0.2)
    for row in range(len(parents)):
        is_reached = changed in path_of(parents, row)
        assert torch.equal(before[0][row], after[0][row]) != is_reached


def test_batches_of_many_pairs() -> None:
    """More pairs than are computed at once, over several superchunks."""
    generator = torch.Generator().manual_seed(9)
    parents = [random_parents(rows, generator) for rows in (17, 20, 33, 64, 65, 2)]
    check_against_reference(random_case([2500, 10, 1100, 900, 2100, 3000], parents), 4)


def step_of(case: Case, tree_requests: list[int], counts: list[int]) -> tuple[TreeBatch, dict[str, torch.Tensor]]:
    """Return the trees of some of a case's requests and the step in which the others have counts causal rows."""
    trees = tree_batch(
        torch.tensor([parent for b in tree_requests for parent in case.parents[b]]),
        torch.tensor([len(case.parents[b]) for b in tree_requests]),
    )
    return trees, {
        "tree_requests": torch.tensor(tree_requests),
        "block_table": case.block_table,
        "query_start_loc": torch.tensor([0, *counts]).cumsum(0),
        "seq_lens": case.seq_lens,
    }


@pytest.mark.parametrize("tree_requests", [[0, 2, 4], [3], [0, 1, 2, 3, 4, 5]])
def test_a_step_of_trees_decoding_rows_and_prefill_chunks(tree_requests: list[int]) -> None:
    generator = torch.Generator().manual_seed(2)
    parents = [random_parents(rows, generator) for rows in (5, 1, 12, 40, 3, 1)]
    case = random_case([200, 127, 3, 90, 1000, 0], parents)
    counts = [len(rows) for rows in parents]
    trees, step = step_of(case, tree_requests, counts)
    query = random_query(sum(counts) + 2, 4, 32)
    plan = plan_step(trees=trees, **step, num_query_heads=4, cache=case.cache)
    output, lse = paged_step_attention_cpu(query, case.cache, plan=plan, scale=0.2)
    expected = prefill_attention(
        query,
        case.cache,
        block_table=case.block_table,
        query_start_loc=step["query_start_loc"],
        seq_lens=case.seq_lens,
        scale=0.2,
    )
    in_trees = tree_attention(query, case.cache, **case.arguments(), scale=0.2)
    start_loc = step["query_start_loc"].tolist()
    for b in range(len(parents)):
        rows = slice(start_loc[b], start_loc[b + 1])
        wanted = in_trees if b in tree_requests else expected
        assert torch.equal(output[rows], wanted[0][rows])
        assert torch.equal(lse[rows], wanted[1][rows])
    assert not output[-2:].any()
    assert (lse[-2:] == -math.inf).all()


def test_a_step_whose_rows_are_not_the_trees_is_refused() -> None:
    case = random_case([20, 5], [[0, 0, 1], [0]])
    trees, step = step_of(case, [0], [2, 1])
    with pytest.raises(ValueError, match=r"query_start_loc: got \[2\] .* expected \[3\]"):
        plan_step(trees=trees, **step, num_query_heads=4, cache=case.cache)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_planned_rows_are_written(kind: str) -> None:
    case = random_case([30, 140], [[0, 0, 1], [0, 0]], kind=kind)
    rows = torch.tensor([1, 2, 3, 6, 7])
    query = random_query(9, 4, 32)
    plan = plan_tree_attention(**case.arguments(), num_query_heads=4, cache=case.cache, rows=rows)
    output = torch.full_like(query, 7.0)
    paged_tree_attention_cpu(query, case.cache, plan=plan, scale=0.2, output=output)
    expected, _ = tree_attention(query[rows], case.cache, **case.arguments(), scale=0.2)
    assert torch.equal(output[rows], expected)
    assert (output[[0, 4, 5, 8]] == 7.0).all()


def test_a_plan_serves_only_what_it_was_made_for() -> None:
    case = random_case([30], [[0, 0, 1]])
    plan = plan_tree_attention(**case.arguments(), num_query_heads=4, cache=case.cache)
    query = random_query(3, 4, 32)
    other = poisoned_cache(3, num_kv_heads=4)
    for arguments, name in (
        ({"query": query[:2], "output": query}, "query"),
        ({"query": query, "output": query[:, :2]}, "output"),
        ({"query": query, "output": query.clone(), "cache": other}, "cache"),
    ):
        with pytest.raises(ValueError, match=name + ": got .* expected"):
            paged_tree_attention_cpu(**{"cache": case.cache, **arguments}, plan=plan, scale=0.2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query", torch.zeros(2, 4, 32)),
        ("query", torch.zeros(4, 3, 32)),
        ("query", torch.zeros(4, 4, 64)),
        ("query", torch.zeros(4, 4, 32, dtype=torch.float64)),
        ("query", torch.zeros(4, 32, 4).transpose(1, 2)),
        ("block_table", torch.zeros(1, 4, dtype=torch.int32)),
        ("block_table", torch.zeros(2, 4)),
        ("seq_lens", torch.tensor([10])),
        ("seq_lens", torch.tensor([2, 10])),
        ("seq_lens", torch.tensor([65, 10])),
        ("scale", 0.0),
        ("scale", math.nan),
    ],
)
def test_wrong_attention_is_refused(name: str, value: torch.Tensor | float) -> None:
    arguments = {
        "query": torch.zeros(4, 4, 32),
        "block_table": torch.zeros(2, 4, dtype=torch.int32),
        "seq_lens": torch.tensor([10, 10]),
        "scale": 0.2,
        name: value,
    }
    trees = tree_batch(torch.tensor([0, 0, 1, 0]), torch.tensor([3, 1]))
    with pytest.raises(ValueError, match=name + ": got .* expected"):
        tree_attention(**arguments, trees=trees, cache=poisoned_cache(4))


def test_a_float_cache_takes_queries_of_its_dtype_only() -> None:
    case = random_case([3], [[0]], kind="plain")
    with pytest.raises(ValueError, match=r"query: got torch.bfloat16 .* expected torch.float32"):
        tree_attention(random_query(1, 4, 32, dtype=torch.bfloat16), case.cache, **case.arguments(), scale=0.2)


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        (torch.zeros(2, 16, 2, 48), torch.zeros(2, 16, 2, 48), "key"),
        (torch.zeros(2, 16, 32), torch.zeros(2, 16, 32), "key"),
        (torch.zeros(2, 16, 2, 32, dtype=torch.int8), torch.zeros(2, 16, 2, 32, dtype=torch.int8), "key"),
        (torch.zeros(2, 16, 2, 32), torch.zeros(2, 16, 1, 32), "value"),
        (torch.zeros(2, 16, 2, 32), torch.zeros(2, 16, 2, 32, dtype=torch.bfloat16), "value"),
        (torch.zeros(2, 16, 2, 32), torch.zeros(2, 16, 32, 2).transpose(2, 3), "value"),
    ],
)
def test_wrong_float_caches_are_refused(key: torch.Tensor, value: torch.Tensor, name: str) -> None:
    with pytest.raises(ValueError, match=name + ": got .* expected"):
        PlainCache(key=key, value=value)


def test_pages_are_used_to_the_last_element_by_one_each() -> None:
    for is_key_transposed in (False, True):
        pages = torch.zeros(3, 2, 10, 32)
        cache = plain_cache_from_pages(pages, is_key_transposed=is_key_transposed)
        assert cache.key.shape == cache.value.shape == (3, 5, 2, 32)
        for tensor in cache_tensors(cache):
            tensor.add_(1)
        assert (pages == 1).all()
    cache.key[1, 3, 1, 7] = 9
    assert pages[1, 1, :5].reshape(32, 5)[7, 3] == 9
    with pytest.raises(ValueError, match=r"pages: got .* expected"):
        plain_cache_from_pages(torch.zeros(3, 2, 9, 32), is_key_transposed=True)
