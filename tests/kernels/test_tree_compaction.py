"""Compaction of accepted slots: the moves that are planned, and that the stored bits arrive.

The Triton kernel is tested in ``test_tree_attention_triton.py``.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.kv_attention import decode_attention
from kernels.tree_attention import SlotMoves, accepted_moves, compact_kv, tree_attention
from kernels.tree_attention.reference import compact_kv_reference
from tests.kernels.tree_cases import (
    KINDS,
    Case,
    cache_tensors,
    path_of,
    random_case,
    random_parents,
    random_query,
    slots_of,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in which NaN equals itself."""
    return tensor.contiguous().view(torch.int8).clone()


def moves_of(case: Case, paths: list[list[int]]) -> SlotMoves:
    return accepted_moves(
        rows=torch.tensor([row for path in paths for row in path], dtype=torch.int64),
        counts=torch.tensor([len(path) for path in paths]),
        bases=torch.tensor(case.bases),
        block_table=case.block_table,
        block_size=case.cache.block_size,
    )


def check_compaction(case: Case, paths: list[list[int]]) -> None:
    """Compare each slot with where it came from, and with the reference."""
    block_size = case.cache.block_size
    place = torch.arange(case.cache.num_blocks * block_size)
    for b, (base, path) in enumerate(zip(case.bases, paths, strict=True)):
        positions = torch.tensor(path, dtype=torch.int64) + base
        place[slots_of(case.block_table, b, torch.arange(len(path)) + base, block_size)] = slots_of(
            case.block_table, b, positions, block_size
        )
    expected = [bits(tensor[place // block_size, place % block_size]) for tensor in cache_tensors(case.cache)]
    twin = random_case(case.bases, case.parents, **layout_of(case))
    compact_kv([case.cache], moves_of(case, paths))
    compact_kv_reference([twin.cache], moves_of(twin, paths))
    for tensor, other, wanted in zip(cache_tensors(case.cache), cache_tensors(twin.cache), expected, strict=True):
        assert torch.equal(bits(tensor.flatten(0, 1)), wanted)
        assert torch.equal(bits(other.flatten(0, 1)), wanted)


def layout_of(case: Case) -> dict[str, object]:
    key = case.cache.key
    kind = "int8" if key.dtype == torch.int8 else "transposed" if key.stride(1) == 1 else "plain"
    _, block_size, num_kv_heads, head_dim = key.shape
    dtype = case.keys[0].dtype
    return dict(kind=kind, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)


@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(1, 20), st.integers(0, 2**20)), min_size=1, max_size=4),
    st.sampled_from(KINDS),
    st.sampled_from([2, 16]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None, max_examples=40)
def test_accepted_rows_become_consecutive(
    requests: list[tuple[int, int, int]], kind: str, block_size: int, dtype: torch.dtype
) -> None:
    parents = [random_parents(rows, torch.Generator().manual_seed(seed)) for _, rows, seed in requests]
    bases = [base for base, *_ in requests]
    case = random_case(bases, parents, kind=kind, block_size=block_size, dtype=dtype)
    check_compaction(
        case, [path_of(rows, seed % len(rows)) for rows, (*_, seed) in zip(parents, requests, strict=True)]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_that_overlap(kind: str) -> None:
    """Each row moves to where the one before it lay."""
    case = random_case([13, 0], [[0, 0, 0, *range(2, 39)], [0, 0]], kind=kind)
    check_compaction(case, [[0, *range(2, 40)], []])


def test_what_lies_where_it_must_does_not_move() -> None:
    case = random_case([5, 5, 5], [[0, 0, 1, 1], [0, 0], [0, 0, 0]])
    moves = moves_of(case, [[0, 1, 3], [0, 1], [0, 2]])
    assert moves.start_loc.tolist() == [0, 1, 1, 2]
    sources, targets = (
        [int(slots_of(case.block_table, b, torch.tensor(position), 16)) for b, position in places]
        for places in (((0, 8), (2, 7)), ((0, 7), (2, 6)))
    )
    assert moves.sources.tolist() == sources
    assert moves.targets.tolist() == targets


def test_after_compaction_decoding_goes_on_with_the_bits_of_the_tree() -> None:
    generator = torch.Generator().manual_seed(1)
    parents = [random_parents(rows, generator) for rows in (17, 9, 30)]
    case = random_case([120, 3, 1015], parents)
    paths = [path_of(rows, len(rows) - 1) for rows in parents]
    query = random_query(case.trees.num_rows, 4, 32)
    output, _ = tree_attention(query, case.cache, **case.arguments(), scale=0.2)
    compact_kv([case.cache], moves_of(case, paths))
    last = case.trees.query_start_loc[1:] - 1
    lengths = torch.tensor([base + len(path) for base, path in zip(case.bases, paths, strict=True)])
    after, _ = decode_attention(query[last], case.cache, block_table=case.block_table, seq_lens=lengths, scale=0.2)
    assert torch.equal(after, output[last])


def test_layers_of_several_layouts() -> None:
    parents = [[0, 0, 0, 2], [0, 0, 0]]
    cases = [random_case([14, 30], parents, kind=kind, seed=seed) for kind in KINDS for seed in (0, 0)]
    path = [[0, 2, 3], [0, 2]]
    expected = [bits(read_path(case, path)) for case in cases]
    compact_kv([case.cache for case in cases], moves_of(cases[0], path))
    for case, wanted in zip(cases, expected, strict=True):
        assert torch.equal(bits(read_path(case, [[0, 1, 2], [0, 1]])), wanted)


def read_path(case: Case, paths: list[list[int]]) -> torch.Tensor:
    slots = torch.cat(
        [slots_of(case.block_table, b, torch.tensor(path) + case.bases[b], 16) for b, path in enumerate(paths)]
    )
    return case.cache.value[slots // 16, slots % 16]


def test_wrong_moves_are_refused() -> None:
    case = random_case([5], [[0, 0, 1]])
    table = torch.zeros(1, 1, dtype=torch.int32)
    for arguments, name in (
        ({"rows": torch.tensor([1, 2]), "counts": torch.tensor([2])}, "rows"),
        ({"rows": torch.tensor([0, 2, 1]), "counts": torch.tensor([3])}, "rows"),
        ({"rows": torch.tensor([0, 2]), "counts": torch.tensor([3])}, "counts"),
        ({"rows": torch.tensor([0]), "counts": torch.tensor([1, 0])}, "counts"),
        ({"rows": torch.tensor([0, 11]), "counts": torch.tensor([2])}, "rows"),
    ):
        with pytest.raises(ValueError, match=name + ": got .* expected"):
            accepted_moves(**arguments, bases=torch.tensor([5]), block_table=table, block_size=16)
    slots, start_loc = torch.tensor([10**6]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"moves: got .* expected"):
        compact_kv([case.cache], SlotMoves(sources=slots, targets=torch.tensor([0]), start_loc=start_loc))
