"""Triton's kernels under its interpreter; see interpreted.py."""

import pytest
import torch

from tests.kernels import interpreted


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run in these files")
@pytest.mark.parametrize("name", interpreted.FILES)
def test_triton_kernels_under_the_interpreter(name: str) -> None:
    pytest.importorskip("triton")
    code, words = interpreted.result(name)
    assert code == 0, words
