"""Dense products whose weight stays as it was loaded, so that it can be overwritten while it serves.

On a CPU with AVX-512's bfloat16, that runs on ``rows.cpp``; anything else on torch's own product.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import linear

from kernels.native import vector_library

__all__ = ["dense_linear"]

_TILE_INPUTS = 32
"""Input features that a tile of bfloat16 holds."""


def dense_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x W^T + bias.

    On ``rows.cpp``: sums in float32, to which the bias is added before they are rounded; subnormal activations and
    weights count as zero; a row's bits do not depend on the other rows or on the number of threads.

    Args:
        x: [..., K].
        weight: [N, K], of the dtype of x.
        bias: [N], of the dtype of x.

    Returns:
        [..., N].

    Raises:
        RuntimeError: Shapes or dtypes do not fit.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    is_tiled = (
        all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)
        and weight.dim() == 2
        and weight.numel() > 0
        and x.shape[-1] == weight.shape[1]
        and weight.shape[1] % _TILE_INPUTS == 0
        and weight.is_contiguous()
        and (bias is None or (bias.is_contiguous() and bias.shape == weight.shape[:1]))
    )
    if not is_tiled or (rows := _rows()) is None:
        return linear(x, weight, bias)
    return rows(x, weight, bias)


@functools.cache
def _rows() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor] | None:
    """``dense_linear`` on ``rows.cpp``, which checks nothing; None where it does not run."""
    library = vector_library(Path(__file__).with_name("rows.cpp"))
    if library is None:
        return None
    call = library.dense_rows
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = [pointer, pointer, pointer, number, number, number, pointer]
    call.restype = None

    def rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        num_out, num_in = weight.shape
        x = x.contiguous()
        y = torch.empty(*x.shape[:-1], num_out, dtype=torch.bfloat16)
        at_bias = None if bias is None else bias.data_ptr()
        call(x.data_ptr(), weight.data_ptr(), at_bias, x.numel() // num_in, num_out, num_in, y.data_ptr())
        return y

    return rows
