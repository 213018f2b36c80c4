"""Dense products: their error, and that a row's bits are its own."""

import math

import pytest
import torch
from torch.nn.functional import linear

from kernels.dense import dense_linear
from tests.kernels.int4_cases import SUM_UNIT, UNIT, assert_intact, assert_within, poison_empty
from tests.kernels.native_cases import HAS_VECTORS, digests_on_threads, needs_vectors

ON_THREADS = """
import sys, torch
from kernels.dense import dense_linear
from tests.kernels.native_cases import digest
torch.set_num_threads(int(sys.argv[1]))
generator = torch.Generator().manual_seed(0)
weight, bias = torch.randn(208, 256, generator=generator).bfloat16(), torch.randn(208, generator=generator).bfloat16()
for rows in (3, 150):
    print(digest(dense_linear(torch.randn(rows, 256, generator=generator).bfloat16(), weight, bias)))
"""

ROWS = (1, 2, 15, 16, 17, 32, 33, 128, 129, 150)
"""Around the tiles' 16 rows, two of them, and the number from which W is re-ordered and not x."""
SHAPES = ((1, 32), (8, 96), (16, 1024), (17, 64), (32, 128), (50, 160), (96, 32))


def operands(num_out: int, num_in: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_out + num_in)
    x = torch.randn(num_rows, num_in, generator=generator).bfloat16()
    weight = torch.randn(num_out, num_in, generator=generator).bfloat16()
    return x, weight, torch.randn(num_out, generator=generator).bfloat16()


def bounded(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact result, and what K float32 sums and a bias can move it by before it is rounded once."""
    exact, size = linear(x.double(), weight.double()), linear(x.double().abs(), weight.double().abs())
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    sums = (x.shape[-1] + 1) * SUM_UNIT * size
    return exact, sums + UNIT[torch.bfloat16] * (exact.abs() + sums)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
def test_the_error_is_that_of_float32_sums_rounded_once(num_out: int, num_in: int, has_bias: bool) -> None:
    x, weight, bias = operands(num_out, num_in, max(ROWS))
    chosen = bias if has_bias else None
    y = dense_linear(x, weight, chosen)
    assert y.dtype == torch.bfloat16
    exact, error = bounded(x, weight, chosen)
    if chosen is not None and not HAS_VECTORS:
        # torch's product may be rounded before the bias is added
        error = error + UNIT[torch.bfloat16] * exact.abs()
    assert_within(y, (exact, error))


@needs_vectors
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
def test_a_row_has_the_same_bits_whatever_rows_and_outputs_there_are(num_out: int, num_in: int) -> None:
    x, weight, bias = operands(num_out, num_in, max(ROWS))
    whole = dense_linear(x, weight, bias)
    for count in ROWS:
        assert torch.equal(dense_linear(x[:count], weight, bias), whole[:count])
        assert torch.equal(dense_linear(x[-count:], weight, bias), whole[-count:])
    few = (num_out + 1) // 2
    assert torch.equal(dense_linear(x, weight[:few], bias[:few]), whole[:, :few])


@needs_vectors
def test_the_number_of_threads_changes_nothing() -> None:
    assert len(digests_on_threads(ON_THREADS)) == 1


@needs_vectors
@pytest.mark.parametrize("num_rows", [20, 140])
def test_a_row_that_is_not_finite_stays_alone(num_rows: int) -> None:
    x, weight, bias = operands(50, 64, num_rows)
    whole = dense_linear(x, weight, bias)
    x[3, 5], x[17, 0] = math.nan, math.inf
    y = dense_linear(x, weight, bias)
    assert y[3].isnan().all() and not y[17].isfinite().any()
    others = [row for row in range(num_rows) if row not in (3, 17)]
    assert torch.equal(y[others], whole[others])


@needs_vectors
def test_what_lies_behind_the_matrix_is_not_read_into_the_result() -> None:
    memory = torch.full((40, 64), math.nan).bfloat16()
    x, memory[:17], _ = operands(17, 64, 130)
    for count in (1, 130):
        assert dense_linear(x[:count], memory[:17]).isfinite().all()


@pytest.mark.parametrize("num_rows", [1, 17, 130])
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
def test_it_writes_the_whole_result_and_nothing_else(
    num_out: int, num_in: int, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = operands(num_out, num_in, num_rows)
    behind = poison_empty(monkeypatch)
    assert dense_linear(x, weight, bias).isfinite().all()
    assert_intact(behind)


def test_an_overwritten_weight_serves_at_once() -> None:
    x, weight, _ = operands(48, 64, 5)
    other = operands(48, 64, 6)[1].neg()
    before = dense_linear(x, weight)
    weight.copy_(other)
    assert torch.equal(dense_linear(x, weight), dense_linear(x, other.clone()))
    assert not torch.equal(dense_linear(x, weight), before)


@pytest.mark.parametrize(
    ("dtype", "num_in"), [(torch.float32, 64), (torch.bfloat16, 40)], ids=["float32", "not whole tiles"]
)
def test_what_the_kernel_does_not_take_is_torch_s(dtype: torch.dtype, num_in: int) -> None:
    x, weight, bias = (tensor.to(dtype) for tensor in operands(16, num_in, 3))
    assert torch.equal(dense_linear(x, weight, bias), linear(x, weight, bias))


def test_leading_dimensions_strides_and_no_rows() -> None:
    x, weight, bias = operands(16, 64, 12)
    flat = dense_linear(x, weight, bias)
    assert torch.equal(dense_linear(x.view(3, 4, 64), weight, bias), flat.view(3, 4, 16))
    apart = torch.zeros(12, 128).bfloat16()
    apart[:, ::2] = x
    assert torch.equal(dense_linear(apart[:, ::2], weight, bias), flat)
    assert dense_linear(x[:0], weight, bias).shape == (0, 16)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weight, _ = operands(16, 64, 3)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        dense_linear(x[:, :32], weight)
