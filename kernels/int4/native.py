"""Calls ``grouped.cpp``, the INT4 products of a CPU with AVX-512 and its bfloat16."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kernels.native import vector_library

Products = Callable[[torch.Tensor, Sequence[int], torch.Tensor, torch.Tensor, int], torch.Tensor]


@functools.cache
def grouped_products() -> Products | None:
    """The function that multiplies rows, sorted by expert, with their experts' matrices.

    It takes x [rows, K] bfloat16, contiguous; bounds, E + 1 row numbers that rise from 0 to rows: rows
    bounds[e] up to bounds[e + 1] meet expert e; the two tensors of E matrices [N, K] in torch's form, and
    their group size. It returns [rows, N] bfloat16, accumulated in float32; subnormal activations count as
    zero. It runs on torch's threads.

    Returns:
        The function, or None on a CPU without these, or a machine without a compiler that knows them.
    """
    library = vector_library(Path(__file__).with_name("grouped.cpp"))
    if library is None:
        return None
    call = library.grouped_int4
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = [pointer, pointer, number, pointer, pointer, number, number, number, pointer]
    call.restype = None

    def products(
        x: torch.Tensor, bounds: Sequence[int], packed: torch.Tensor, scales: torch.Tensor, group_size: int
    ) -> torch.Tensor:
        num_experts, num_out, half = packed.shape
        y = torch.empty(len(x), num_out, dtype=torch.bfloat16)
        places = (number * len(bounds))(*bounds)
        call(
            x.data_ptr(),
            places,
            num_experts,
            packed.data_ptr(),
            scales.data_ptr(),
            num_out,
            2 * half,
            group_size,
            y.data_ptr(),
        )
        return y

    return products
