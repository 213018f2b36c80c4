"""INT4 weights on the CPU: the bytes, the products, experts, independence of the batch, and refusals.

The Triton kernels are compared with the same definition in ``test_int4_triton.py``.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.int4 import GROUP_SIZES, dequantise, int4_linear, int4_moe, kernel_form, quantise
from kernels.int4.cpu import activate
from kernels.int4.reference import int4_linear_reference, int4_moe_reference, quantise_reference
from tests.kernels.int4_cases import UNIT, assert_within, linear_bound, moe_bound, poison_empty, random_packed

DTYPES = (torch.bfloat16, torch.float32)


def zero(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.double(), torch.zeros(x.shape, dtype=torch.float64)


def assert_same_bytes(weight: torch.Tensor, group_size: int) -> None:
    packed, scale = quantise(weight, group_size)
    expected_packed, expected_scale = quantise_reference(weight, group_size)
    assert packed.dtype == torch.uint8 and scale.dtype == torch.bfloat16
    assert torch.equal(packed, expected_packed)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_bytes_by_hand(group_size: int) -> None:
    codes = [(5 * j) % 15 - 7 for j in range(2 * group_size)]  # -7 .. 7, all of them in either group
    scale = torch.tensor([[0.5, 0.03125]])
    weight = torch.tensor([codes]) * scale.repeat_interleave(group_size, 1)
    packed, stored = quantise(weight, group_size)
    half = group_size // 2
    expected = [((codes[g + j + half] + 8) << 4) | (codes[g + j] + 8) for g in (0, group_size) for j in range(half)]
    assert packed.tolist() == [expected]
    assert torch.equal(stored.float(), scale)
    assert torch.equal(dequantise(packed, stored), weight)


def test_ties_go_to_the_even_code() -> None:
    weight = torch.zeros(1, 32)
    weight[0, 0] = 7.0
    halves = [-6.5, -5.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 5.5, 6.5]
    weight[0, 1 : 1 + len(halves)] = torch.tensor(halves)
    packed, scale = quantise(weight, 32)
    assert scale.item() == 1.0
    assert dequantise(packed, scale)[0, 1 : 1 + len(halves)].tolist() == [-6, -6, -2, -2, 0, 0, 2, 2, 6, 6]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_extreme_groups(group_size: int) -> None:
    weight = torch.zeros(6, 2 * group_size)
    weight[0, 1] = torch.finfo(torch.float32).max
    weight[1] = 1e-3
    weight[1, group_size // 2] = -1e30
    weight[2, :2] = torch.tensor([1.26e-39, -1.26e-39])  # absmax / 7 is halfway between two bfloat16 subnormals
    weight[3, :2] = torch.tensor([1e-40, -2e-45])  # absmax / 7 rounds to 0
    weight[4] = -0.0
    weight[5, -1] = 2.0**-126
    assert_same_bytes(weight, group_size)
    packed, scale = quantise(weight, group_size)
    assert (packed[3:5] == 0x88).all() and (scale[3:5] == 1).all()
    assert (packed[0, group_size // 2 :] == 0x88).all() and scale[0, 1] == 1
    assert torch.equal(dequantise(packed, scale)[4], torch.zeros(2 * group_size))


def test_subnormal_scales_keep_codes_in_range() -> None:
    smallest = 2.0**-133  # bfloat16's smallest; absmax / 7 rounds down to it
    weight = torch.full((1, 32), -1.49 * 7 * smallest)
    weight[0, ::2] *= -1
    packed, scale = quantise(weight, 32)
    assert scale.item() == smallest
    assert set(packed.flatten().tolist()) == {0xFF, 0x00}
    assert_same_bytes(weight, 32)


@given(
    st.integers(0, 5),
    st.integers(1, 4),
    st.sampled_from(GROUP_SIZES),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1e-44, 1e-38, 1e-6, 1.0, 1e4, 1e38]),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=100)
def test_bytes_are_the_references_at_any_shape(
    num_out: int, num_groups: int, group_size: int, dtype: torch.dtype, size: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, num_out, num_groups * group_size, generator=generator)
    weight = (weight * min(size, 0.1 * torch.finfo(dtype).max)).to(dtype)
    assert_same_bytes(weight, group_size)
    assert_same_bytes(weight.transpose(0, 1), group_size)


def test_bytes_are_the_references_across_pieces() -> None:
    weight = torch.randn(3, 2**17 + 64, generator=torch.Generator().manual_seed(0))
    weight[1, 2**17 : 2**17 + 32] = 1e-40  # one piece of several takes the path of subnormal scales
    assert_same_bytes(weight, 32)


@given(st.integers(1, 4), st.sampled_from(GROUP_SIZES), st.floats(-30, 30), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_round_trip_is_near_and_then_exact(num_groups: int, group_size: int, exponent: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, num_groups * group_size, generator=generator) * 2.0**exponent
    packed, scale = quantise(weight, group_size)
    values = dequantise(packed, scale)
    # Half a step; the division is rounded, at a quotient of at most 7.03, by less than 2**-21.
    step = scale.float().repeat_interleave(group_size, 1)
    assert ((weight - values).abs() <= step * (0.5 + 2.0**-21)).all()
    again_packed, again_scale = quantise(values, group_size)
    assert torch.equal(again_packed, packed)
    assert torch.equal(again_scale, scale)


def test_dequantise_rounds_to_the_dtype_asked_for() -> None:
    packed, scale = random_packed(3, 5, 128, group_size=64)
    exact = dequantise(packed, scale)
    assert exact.shape == (3, 5, 128) and exact.dtype == torch.float32
    assert torch.equal(dequantise(packed, scale, torch.bfloat16), exact.bfloat16())


def test_forms_are_as_large_as_documented_and_stack() -> None:
    packed, scale = random_packed(3, 48, 128, group_size=32)
    first, second = kernel_form(packed, scale)
    assert first.nbytes == 3 * 48 * 128 // 2
    assert second.nbytes == 3 * 4 * 48 * 128 // 32
    for expert in range(3):
        alone = kernel_form(packed[expert], scale[expert])
        assert torch.equal(first[expert], alone[0])
        assert torch.equal(second[expert], alone[1])
    canonical = kernel_form(packed, scale, torch.float32)
    assert canonical[0].data_ptr() == packed.data_ptr() and canonical[1].data_ptr() == scale.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("num_out", [16, 32, 48, 64, 80, 144])
def test_linear(num_out: int, group_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_out)
    weight = random_packed(num_out, 3 * group_size, group_size=group_size)
    form = kernel_form(*weight, dtype)
    bias = torch.randn(num_out, generator=generator).to(dtype)
    for num_rows in (1, 2, 3, 4, 5, 17, 33):
        x = torch.randn(num_rows, 3 * group_size, generator=generator).to(dtype)
        rounding = UNIT[dtype]
        y = int4_linear(x, form, group_size)
        assert y.dtype == dtype
        assert_within(y, linear_bound(zero(x), weight, rounding=rounding))
        assert_within(
            int4_linear(x, form, group_size, bias), linear_bound(zero(x), weight, rounding=rounding, bias=bias)
        )
        reference = int4_linear_reference(x, *weight, bias)
        assert_within(reference, linear_bound(zero(x), weight, rounding=UNIT[torch.float32], bias=bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_takes_strided_rows_and_none(dtype: torch.dtype) -> None:
    form = kernel_form(*random_packed(32, 64, group_size=32), dtype)
    wide = torch.randn(10, 100, generator=torch.Generator().manual_seed(1)).to(dtype)
    strided = wide[::2, 20:84]
    assert torch.equal(int4_linear(strided, form, 32), int4_linear(strided.contiguous(), form, 32))
    assert int4_linear(strided[:0], form, 32).shape == (0, 32)


@pytest.mark.parametrize(("num_out", "num_in", "group_size"), [(16, 32, 32), (144, 384, 128), (80, 1536, 64)])
def test_a_row_in_bfloat16_is_independent_of_the_batch(num_out: int, num_in: int, group_size: int) -> None:
    form = kernel_form(*random_packed(num_out, num_in, group_size=group_size))
    x = torch.randn(130, num_in, generator=torch.Generator().manual_seed(2)).bfloat16()
    whole = int4_linear(x, form, group_size)
    for num_rows in range(1, 130):
        assert torch.equal(int4_linear(x[:num_rows], form, group_size), whole[:num_rows])
    order = torch.randperm(130, generator=torch.Generator().manual_seed(3))
    assert torch.equal(int4_linear(x[order], form, group_size), whole[order])
    assert torch.equal(int4_linear(x[77:78], form, group_size)[0], whole[77])


def random_experts(
    num_tokens: int, *, num_experts: int, top_k: int, hidden: int, width: int, group_size: int, dtype: torch.dtype
) -> dict:
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1)[:, :top_k]
    return {
        "x": torch.randn(num_tokens, hidden, generator=generator).to(dtype),
        "w13": random_packed(num_experts, 2 * width, hidden, group_size=group_size, seed=1),
        "w2": random_packed(num_experts, hidden, width, group_size=group_size, seed=2),
        "topk_weights": torch.rand(num_tokens, top_k, generator=generator),
        "topk_ids": ids,
    }


def run_moe(case: dict, expert_map: torch.Tensor | None, group_size: int) -> torch.Tensor:
    dtype = case["x"].dtype
    forms = (kernel_form(*case["w13"], dtype), kernel_form(*case["w2"], dtype))
    return int4_moe(case["x"], *forms, case["topk_weights"], case["topk_ids"], expert_map, group_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 19, 65])
def test_experts(num_tokens: int, group_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_experts(
        num_tokens, num_experts=5, top_k=3, hidden=2 * group_size, width=group_size, group_size=group_size, dtype=dtype
    )
    poison_empty(monkeypatch)
    y = run_moe(case, None, group_size)
    assert y.dtype == dtype
    assert_within(y, moe_bound(**case, expert_map=None, rounding=UNIT[dtype]))
    reference = int4_moe_reference(**case)
    assert_within(reference, moe_bound(**case, expert_map=None, rounding=UNIT[torch.float32]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_experts_elsewhere_add_nothing_and_shards_add_up(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    case = random_experts(23, num_experts=6, top_k=2, hidden=64, width=32, group_size=32, dtype=dtype)
    case["topk_ids"] = case["topk_ids"].to(index_dtype)
    whole, bound = moe_bound(**case, expert_map=None, rounding=UNIT[dtype])
    parts = torch.zeros(23, 64, dtype=torch.float64)
    for local in ([4, 1], [0], [5, 2, 3]):
        expert_map = torch.full((6,), -1, dtype=index_dtype)
        expert_map[local] = torch.arange(len(local), dtype=index_dtype)
        shard = {**case, "w13": tuple(t[local] for t in case["w13"]), "w2": tuple(t[local] for t in case["w2"])}
        y = run_moe(shard, expert_map, 32)
        assert_within(y, moe_bound(**shard, expert_map=expert_map, rounding=UNIT[dtype]))
        is_served = (expert_map[case["topk_ids"].long()] >= 0).any(1)
        assert (y[~is_served] == 0).all()
        parts += y.double()
    # Either side may be off by the bound of its rounding; parts are rounded at their own size.
    assert ((parts - whole).abs() <= bound + UNIT[dtype] * 3 * (whole.abs() + bound).amax()).all()


def test_no_token_for_any_local_expert() -> None:
    case = random_experts(4, num_experts=2, top_k=1, hidden=32, width=32, group_size=32, dtype=torch.bfloat16)
    case["topk_ids"] = torch.full((4, 1), 3)
    assert (run_moe(case, torch.tensor([0, 1, -1, -1]), 32) == 0).all()


def test_all_tokens_for_one_expert() -> None:
    case = random_experts(40, num_experts=4, top_k=1, hidden=64, width=32, group_size=32, dtype=torch.bfloat16)
    case["topk_ids"].fill_(2)
    assert_within(run_moe(case, None, 32), moe_bound(**case, expert_map=None, rounding=UNIT[torch.bfloat16]))


def test_a_token_in_bfloat16_is_independent_of_the_others() -> None:
    case = random_experts(30, num_experts=5, top_k=3, hidden=96, width=64, group_size=32, dtype=torch.bfloat16)
    whole = run_moe(case, None, 32)
    for rows in ([3], [29, 0, 11], list(range(17))):
        part = {name: case[name][rows] for name in ("x", "topk_weights", "topk_ids")}
        assert torch.equal(run_moe({**case, **part}, None, 32), whole[rows])


def test_an_activation_is_independent_of_its_place() -> None:
    """Where several threads share the work, elements at the ends of a share take another exponential."""
    num_threads = torch.get_num_threads()
    hidden = torch.randn(257, 2 * 2080, generator=torch.Generator().manual_seed(4))
    torch.set_num_threads(2)
    try:
        activated = activate(hidden)
        assert torch.equal(activated[100:101], activate(hidden[100:101]))
        assert torch.equal(activated, torch.cat([activate(row) for row in hidden.split(1)]))
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize(
    ("weight", "group_size", "what"),
    [
        (torch.zeros(4, 64), 16, "group_size"),
        (torch.zeros(4, 96), 64, "group_size"),
        (torch.zeros(64), 64, "weight"),
        (torch.zeros(4, 64, dtype=torch.float64), 64, "weight"),
        (torch.zeros(4, 64, dtype=torch.int8), 64, "weight"),
        (torch.full((4, 64), torch.nan), 64, "weight"),
        (torch.tensor([[0.0] * 63 + [-torch.inf]]), 64, "weight"),
        (torch.tensor([[0.0] * 63 + [torch.nan]]).half(), 32, "weight"),
    ],
)
def test_illegal_weights_are_refused(weight: torch.Tensor, group_size: int, what: str) -> None:
    with pytest.raises(ValueError, match=rf"{what}: got .* expected"):
        quantise(weight, group_size)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"packed": torch.zeros(16, 32, dtype=torch.int8)}, "packed"),
        ({"scale": torch.zeros(16, 2)}, "scale"),
        ({"scale": torch.zeros(15, 2, dtype=torch.bfloat16)}, "packed, scale"),
        ({"scale": torch.zeros(16, 4, dtype=torch.bfloat16)}, "scale"),
        ({"scale": torch.zeros(16, 0, dtype=torch.bfloat16)}, "scale"),
        ({"packed": torch.zeros(32, 16, dtype=torch.uint8).t()}, "packed, scale"),
        ({"packed": torch.zeros(8, 32, dtype=torch.uint8), "scale": torch.zeros(8, 2).bfloat16()}, "packed"),
        ({"dtype": torch.float16}, "dtype"),
    ],
)
def test_illegal_forms_are_refused(change: dict, what: str) -> None:
    packed, scale = random_packed(16, 64, group_size=32)
    arguments = {"packed": packed, "scale": scale, **change}
    with pytest.raises(ValueError, match=rf"{what}: got .* expected"):
        kernel_form(**arguments)


def test_four_dimensions_have_no_form() -> None:
    with pytest.raises(ValueError, match=r"packed: got shape .* expected"):
        kernel_form(*random_packed(1, 1, 16, 64, group_size=32))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"x": torch.zeros(64).bfloat16()}, "x"),
        ({"x": torch.zeros(2, 32).bfloat16()}, "x"),
        ({"x": torch.zeros(64, 2).bfloat16().t()}, "x"),
        ({"x": torch.zeros(2, 64).half()}, "x"),
        ({"x": torch.zeros(2, 64)}, "form"),  # made for bfloat16
        ({"group_size": 64}, "form"),
        ({"group_size": 48}, "group_size"),
        ({"bias": torch.zeros(15).bfloat16()}, "bias"),
        ({"bias": torch.zeros(16)}, "bias"),
        ({"form": kernel_form(*random_packed(2, 16, 64, group_size=32))}, "form"),
        ({"form": random_packed(16, 64, group_size=32)}, "form"),  # canonical: made for float32
    ],
)
def test_illegal_linear_arguments_are_refused(change: dict, what: str) -> None:
    arguments = {
        "x": torch.zeros(2, 64).bfloat16(),
        "form": kernel_form(*random_packed(16, 64, group_size=32)),
        "group_size": 32,
        **change,
    }
    with pytest.raises(ValueError, match=rf"{what}: got .* expected"):
        int4_linear(**arguments)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"x": torch.zeros(3, 96).bfloat16()}, "x"),
        ({"x": torch.zeros(64, 3).bfloat16().t()}, "x"),
        ({"x": torch.zeros(3, 64)}, "w13_form"),
        ({"w2_form": kernel_form(*random_packed(2, 64, 64, group_size=32))}, "w2_form"),
        ({"w2_form": kernel_form(*random_packed(3, 64, 32, group_size=32))}, "w2_form"),
        ({"w13_form": kernel_form(*random_packed(64, 64, group_size=32))}, "w13_form"),
        ({"topk_ids": torch.zeros(2, 2, dtype=torch.int64)}, "topk_ids"),
        ({"topk_ids": torch.zeros(3, 0, dtype=torch.int64)}, "topk_ids"),
        ({"topk_ids": torch.zeros(3, 2, dtype=torch.int16)}, "topk_ids"),
        ({"topk_weights": torch.zeros(3, 1)}, "topk_weights"),
        ({"topk_weights": torch.zeros(3, 2).bfloat16()}, "topk_weights"),
        ({"expert_map": torch.zeros(4)}, "expert_map"),
        ({"expert_map": torch.zeros(2, 2, dtype=torch.int64)}, "expert_map"),
        ({"group_size": 64}, "w13_form"),
    ],
)
def test_illegal_expert_arguments_are_refused(change: dict, what: str) -> None:
    arguments = {
        "x": torch.zeros(3, 64).bfloat16(),
        "w13_form": kernel_form(*random_packed(2, 64, 64, group_size=32)),
        "w2_form": kernel_form(*random_packed(2, 64, 32, group_size=32)),
        "topk_weights": torch.zeros(3, 2),
        "topk_ids": torch.zeros(3, 2, dtype=torch.int64),
        "expert_map": None,
        "group_size": 32,
        **change,
    }
    with pytest.raises(ValueError, match=rf"{what}: got .* expected"):
        int4_moe(**arguments)
