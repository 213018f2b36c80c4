"""The compiled INT4 products: used where they can be, the same on any number of threads, and done without."""

import logging
import math
from collections.abc import Iterator

import pytest
import torch

from kernels.int4 import int4_linear, kernel_form
from kernels.int4.native import grouped_products
from kernels.native import vector_library
from tests.kernels.int4_cases import UNIT, assert_within, linear_bound, random_packed
from tests.kernels.native_cases import digests_on_threads, needs_vectors

ON_THREADS = """
import sys, torch
from kernels.int4.native import grouped_products
from tests.kernels.int4_cases import random_packed
from tests.kernels.native_cases import digest
from kernels.int4 import kernel_form
torch.set_num_threads(int(sys.argv[1]))
form = kernel_form(*random_packed(5, 208, 256, group_size=64))
x = torch.randn(61, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
y = grouped_products()(x, [0, 0, 17, 18, 50, 61], *form, 64)
print(digest(y))
"""


@pytest.fixture
def forgotten() -> Iterator[None]:
    """The library is built anew within the test and after it."""
    for cached in (vector_library, grouped_products):
        cached.cache_clear()
    yield
    for cached in (vector_library, grouped_products):
        cached.cache_clear()


@needs_vectors
def test_it_is_built_where_it_can_run() -> None:
    assert grouped_products() is not None


@needs_vectors
def test_the_number_of_threads_changes_nothing() -> None:
    assert len(digests_on_threads(ON_THREADS)) == 1


@needs_vectors
def test_a_row_that_is_not_finite_stays_alone() -> None:
    form = kernel_form(*random_packed(64, 128, group_size=32))
    x = torch.randn(20, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole = int4_linear(x, form, 32)
    x[3, 5], x[17, 0] = math.nan, math.inf
    y = int4_linear(x, form, 32)
    assert not y[3].isfinite().any() and not y[17].isfinite().all()
    others = [row for row in range(20) if row not in (3, 17)]
    assert torch.equal(y[others], whole[others])


@needs_vectors
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_torch_serves(
    compiler: str, forgotten: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    if compiler == "no-such-compiler":
        monkeypatch.setattr("kernels.native.shutil.which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert grouped_products() is None
        assert grouped_products() is None
    assert caplog.text.count("torch's slower kernels") == 1
    weight = random_packed(80, 64, group_size=32)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = (x.double(), torch.zeros(x.shape, dtype=torch.float64))
    y = int4_linear(x, kernel_form(*weight), 32)
    assert_within(y, linear_bound(exact, weight, rounding=UNIT[torch.bfloat16]))
