"""The INT4 kernels against the definition: on CUDA, or interpreted where TRITON_INTERPRET=1 is set.

Neither holds in an ordinary CPU run, where ``test_int4.py`` starts this file interpreted. The interpreter
multiplies in float32 and truncates what it stores as bfloat16; the tensor cores multiply in bfloat16, with
weights rounded to it where many tokens meet them, and stores round. The bounds say so.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.int4 import GROUP_SIZES, quantise
from tests.kernels.int4_cases import (
    UNIT,
    Packed,
    assert_intact,
    assert_within,
    linear_bound,
    moe_bound,
    poison_empty,
    random_packed,
)

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
ROUNDING = UNIT[torch.bfloat16] * (2 if IS_INTERPRETED else 1)
pytestmark = (
    []
    if IS_INTERPRETED
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA or TRITON_INTERPRET=1"),
    ]
)

if IS_INTERPRETED or torch.cuda.is_available():
    from kernels.int4 import triton as int4_triton
    from kernels.int4 import triton_moe
    from kernels.int4.triton import int4_linear_triton, quantise_triton
    from kernels.int4.triton_moe import int4_moe_triton, route
    from kernels.int4.triton_tile import choose_tile


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    behind = poison_empty(monkeypatch)
    yield
    assert_intact(behind)


def on_device(tensors: Packed) -> Packed:
    return tensors[0].to(DEVICE), tensors[1].to(DEVICE)


def weight_rounding(tokens: float) -> float:
    return 0.0 if IS_INTERPRETED or choose_tile(tokens).scale_sums else UNIT[torch.bfloat16]


def assert_same_bytes(weight: torch.Tensor, group_size: int) -> None:
    packed, scale = quantise_triton(weight.to(DEVICE), group_size)
    expected_packed, expected_scale = quantise(weight, group_size)
    assert torch.equal(packed.cpu(), expected_packed)
    assert torch.equal(scale.cpu(), expected_scale)


@given(
    st.integers(0, 5),
    st.integers(1, 4),
    st.sampled_from(GROUP_SIZES),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1e-44, 1e-38, 1e-6, 1.0, 1e4, 1e38]),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=20)
def test_bytes_are_the_references(
    num_out: int, num_groups: int, group_size: int, dtype: torch.dtype, size: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, num_out, num_groups * group_size, generator=generator)
    if IS_INTERPRETED and dtype == torch.bfloat16:
        size = max(size, 1e-30)  # the interpreter misreads subnormal bfloat16
    weight = (weight * min(size, 0.1 * torch.finfo(dtype).max)).to(dtype)
    assert_same_bytes(weight, group_size)
    assert_same_bytes(weight.transpose(0, 1), group_size)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_bytes_at_tile_edges_and_extremes(group_size: int) -> None:
    generator = torch.Generator().manual_seed(group_size)
    for num_groups in (4096 // group_size + edge for edge in (-1, 0, 1)):
        weight = torch.randn(1, num_groups * group_size, generator=generator)
        weight[0, :group_size] = 0.0
        weight[0, group_size] = torch.finfo(torch.float32).max
        weight[0, 2 * group_size : 3 * group_size] = torch.arange(group_size) % 15 - 7.5  # ties, and an uneven scale
        weight[0, 3 * group_size : 4 * group_size] *= 2.0**-135
        assert_same_bytes(weight, group_size)
    halves = torch.zeros(1, group_size)
    halves[0, :12] = torch.tensor([7.0, -6.5, -5.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 5.5, 6.5, -7.0])
    assert_same_bytes(halves, group_size)


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [3, 40])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter divides in numpy
def test_values_that_are_not_finite_are_refused(value: float, place: int) -> None:
    weight = torch.ones(3, 64, device=DEVICE)
    weight[2, place] = value
    with pytest.raises(ValueError, match="weight: got NaN or infinite"):
        quantise_triton(weight, 64)
    weight[2, place] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # NaN, all bits set
    with pytest.raises(ValueError, match="weight: got NaN or infinite"):
        quantise_triton(weight, 64)


def check_linear(num_rows: int, num_out: int, num_in: int, group_size: int, *, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(num_rows * 1000 + num_out)
    weight = random_packed(num_out, num_in, group_size=group_size)
    x = torch.randn(num_rows, num_in, generator=generator).bfloat16()
    bias = torch.randn(num_out, generator=generator).bfloat16() if has_bias else None
    y = int4_linear_triton(x.to(DEVICE), on_device(weight), group_size, None if bias is None else bias.to(DEVICE))
    assert y.dtype == torch.bfloat16
    exact_x = (x.double(), torch.zeros(x.shape, dtype=torch.float64))
    bound = linear_bound(exact_x, weight, rounding=ROUNDING, weight_rounding=weight_rounding(num_rows), bias=bias)
    assert_within(y, bound)


@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257])
@pytest.mark.parametrize("group_size", [32, 128])
def test_linear_at_token_edges(num_rows: int, group_size: int) -> None:
    check_linear(num_rows, 65, 256, group_size, has_bias=num_rows % 2 == 1)


@pytest.mark.parametrize("num_out", [1, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("num_rows", [3, 70])
def test_linear_at_feature_edges(num_rows: int, num_out: int) -> None:
    check_linear(num_rows, num_out, 128, 64, has_bias=False)


@pytest.mark.parametrize("num_groups", [1, 3, 9, 17])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("min_programs", [1, 128])
def test_linear_at_group_edges(
    num_groups: int, group_size: int, min_programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that end beyond the last group, in one program or split between several."""
    monkeypatch.setattr(int4_triton, "_MIN_PROGRAMS", min_programs)
    check_linear(2, 20, num_groups * group_size, group_size, has_bias=True)
    check_linear(66, 20, num_groups * group_size, group_size, has_bias=True)


@given(st.integers(1, 80), st.integers(1, 140), st.integers(1, 9), st.sampled_from(GROUP_SIZES), st.booleans())
@settings(deadline=None, max_examples=15)
def test_linear_at_any_shape(num_rows: int, num_out: int, num_groups: int, group_size: int, has_bias: bool) -> None:
    check_linear(num_rows, num_out, num_groups * group_size, group_size, has_bias=has_bias)


def test_linear_takes_strided_rows_and_none() -> None:
    weight = on_device(random_packed(24, 64, group_size=32))
    wide = torch.randn(10, 100, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    strided = wide[::2, 20:84]
    expected = int4_linear_triton(strided.contiguous(), weight, 32, None)
    assert torch.equal(int4_linear_triton(strided, weight, 32, None), expected)
    assert int4_linear_triton(strided[:0], weight, 32, None).shape == (0, 24)


def test_a_row_is_independent_of_the_other_rows() -> None:
    weight = on_device(random_packed(70, 256, group_size=64))
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(2)).bfloat16().to(DEVICE)
    whole = int4_linear_triton(x, weight, 64, None)
    for rows in ([5], [15, 0, 7], list(range(9))):
        assert torch.equal(int4_linear_triton(x[rows], weight, 64, None), whole[rows])


def random_ids(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(-1)[:, :top_k].contiguous()


@pytest.mark.parametrize("has_map", [False, True])
@pytest.mark.parametrize("max_one_program", [0, 4096])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (1, 3), (7, 2), (300, 3)])
def test_routing_lists_every_local_assignment_once(
    num_tokens: int, top_k: int, max_one_program: int, has_map: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_moe, "_MAX_ONE_PROGRAM", max_one_program)
    monkeypatch.setattr(triton_moe, "_ROUTE_ELEMENTS", 256)  # several chunks of either loop
    ids = random_ids(num_tokens, 7, top_k).int()
    expert_map = torch.tensor([-1, 2, 0, -1, 4, 1, 3]) if has_map else None
    num_experts = 5  # without a map, ids 5 and 6 are nobody's
    local = (ids.long() if expert_map is None else expert_map[ids.long()]).flatten()
    routing = route(ids.to(DEVICE), None if expert_map is None else expert_map.to(DEVICE), num_experts, 16)
    order, blocks = routing.order.tolist(), routing.blocks[: routing.num_blocks.item()].tolist()
    found = []
    for expert, first, end in blocks:
        run = order[first : min(end, first + 16)]
        assert run and all(local[assignment] == expert for assignment in run)
        found += run
    expected = [a for e in range(num_experts) for a in (local == e).nonzero().flatten().tolist()]
    assert found == expected


def check_moe(
    num_tokens: int, hidden: int, width: int, group_size: int, expert_map: torch.Tensor | None, num_experts: int
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    num_global = num_experts if expert_map is None else len(expert_map)
    case = {
        "x": torch.randn(num_tokens, hidden, generator=generator).bfloat16(),
        "w13": random_packed(num_experts, 2 * width, hidden, group_size=group_size, seed=1),
        "w2": random_packed(num_experts, hidden, width, group_size=group_size, seed=2),
        "topk_weights": torch.rand(num_tokens, 2, generator=generator),
        "topk_ids": random_ids(num_tokens, num_global, 2),
    }
    y = int4_moe_triton(
        case["x"].to(DEVICE),
        on_device(case["w13"]),
        on_device(case["w2"]),
        case["topk_weights"].to(DEVICE),
        case["topk_ids"].to(DEVICE),
        None if expert_map is None else expert_map.to(DEVICE),
        group_size,
    )
    assert y.dtype == torch.bfloat16
    rounding = weight_rounding(2 * num_tokens / num_global)
    assert_within(y, moe_bound(**case, expert_map=expert_map, rounding=ROUNDING, weight_rounding=rounding))


@pytest.mark.parametrize(
    ("num_tokens", "group_size"),
    # Each tile shape, with 3 experts and 2 choices.
    [(0, 32), (1, 32), (1, 64), (5, 128), (24, 32), (25, 128), (49, 64), (97, 32), (193, 128)],
)
def test_experts(num_tokens: int, group_size: int) -> None:
    check_moe(num_tokens, 2 * group_size, group_size, group_size, None, num_experts=3)


@pytest.mark.parametrize(("hidden", "width"), [(32, 32), (96, 160), (224, 96)])
@pytest.mark.parametrize("num_tokens", [6, 70])
def test_experts_at_feature_edges(hidden: int, width: int, num_tokens: int) -> None:
    check_moe(num_tokens, hidden, width, 32, torch.tensor([-1, 0, -1, 1]), num_experts=2)


@pytest.mark.parametrize("max_one_program", [0, 4096])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_experts_elsewhere_and_experts_without_tokens(
    max_one_program: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_moe, "_MAX_ONE_PROGRAM", max_one_program)
    check_moe(3, 64, 64, 64, torch.tensor([-1, 4, -1, -1, 0, -1, 2, 1, 3, -1], dtype=dtype), num_experts=5)
    check_moe(2, 64, 64, 64, torch.full((4,), -1, dtype=dtype), num_experts=1)


def test_experts_take_many_tokens_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_moe, "_MAX_TOKENS", 8)
    check_moe(21, 64, 32, 32, None, num_experts=2)


def test_a_token_is_independent_of_the_others() -> None:
    w13 = on_device(random_packed(4, 128, 64, group_size=32, seed=1))
    w2 = on_device(random_packed(4, 64, 64, group_size=32, seed=2))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20, 64, generator=generator).bfloat16().to(DEVICE)
    weights, ids = torch.rand(20, 2, generator=generator).to(DEVICE), random_ids(20, 4, 2).to(DEVICE)
    whole = int4_moe_triton(x, w13, w2, weights, ids, None, 32)
    for rows in ([19], [3, 0, 11]):
        assert torch.equal(int4_moe_triton(x[rows], w13, w2, weights[rows], ids[rows], None, 32), whole[rows])
