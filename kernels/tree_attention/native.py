"""Calls ``vector_rows.cpp``: attention of trees over the cache of vLLM's CPU attention for vector instructions."""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch

from kernels.native import vector_library

_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_LANES = 16

Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor],
    None,
]


def native_tree_attention(dtype: torch.dtype, *, block_size: int, head_dim: int) -> Attend | None:
    """The function that attends with the rows of t trees, on torch's threads; it checks no number.

    It takes query [T, H, D]; kv_cache [blocks, K, block_size, 2 D], in which a block and head is D rows of block_size
    keys and then block_size rows of D values; table [t, P] int32, the blocks of each tree's request; trees [t, 3]
    int64, of each the flat row and the position of its root, and its number of rows; parents int32 of all rows, one
    tree after the other, by row of the tree and 0 for a root; the factor of the scores; and output [T, H, D], of which
    the trees' rows are written. All are contiguous, queries, cache and output of the dtype given.

    Returns:
        The function, or None on a CPU without AVX-512 and its bfloat16, in other dtypes, or where vectors of 16 do not
        fit.
    """
    if dtype not in _DTYPES or block_size % _LANES or head_dim % _LANES:
        return None
    return _attend(dtype)


@functools.cache
def _attend(dtype: torch.dtype) -> Attend | None:
    library = vector_library(Path(__file__).with_name("vector_rows.cpp"))
    if library is None:
        return None
    call = getattr(library, f"attend_{_DTYPES[dtype]}")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = [*[number] * 6, ctypes.c_float, *[pointer] * 6]
    call.restype = None

    def attend(
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        table: torch.Tensor,
        trees: torch.Tensor,
        parents: torch.Tensor,
        scale: float,
        output: torch.Tensor,
    ) -> None:
        for one in (query, kv_cache, output):
            if one.dtype != dtype or not one.is_contiguous():
                raise ValueError(f"tree attention: got {one.dtype}, strides {one.stride()}, expected dense {dtype}")
        _, num_heads, head_dim = query.shape
        _, num_kv_heads, block_size, _ = kv_cache.shape
        call(
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            len(trees),
            table.shape[1],
            scale,
            query.data_ptr(),
            kv_cache.data_ptr(),
            table.data_ptr(),
            trees.data_ptr(),
            parents.data_ptr(),
            output.data_ptr(),
        )

    return attend
