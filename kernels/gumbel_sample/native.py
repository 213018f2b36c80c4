"""Calls ``sample.cpp``, keyed sampling on a CPU with AVX-512."""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch

from kernels.native import vector_library

Sample = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, int],
    tuple[torch.Tensor, torch.Tensor] | None,
]


@functools.cache
def native_sample() -> Sample | None:
    """The function that samples, on torch's threads.

    It takes logits, seeds, positions, temperature, threshold and lane as the reference does, of the dtypes and shapes
    that it wants and logits in float32, and returns tokens and log-probabilities; None if a seed, a position or a
    temperature is out of its range.

    Returns:
        The function, or None on a CPU without AVX-512 and its bfloat16 or without a compiler that knows them.
    """
    library = vector_library(Path(__file__).with_name("sample.cpp"))
    if library is None:
        return None
    call = library.gumbel_sample
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = [pointer, number, number, number, *[pointer] * 4, number, pointer, pointer]
    call.restype = ctypes.c_int

    def sample(
        logits: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        temperature: torch.Tensor,
        threshold: torch.Tensor | None,
        lane: int,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        rows, vocab_size = logits.shape
        seeds, positions, temperature = seeds.contiguous(), positions.contiguous(), temperature.contiguous()
        threshold = None if threshold is None else threshold.contiguous()
        tokens, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
        is_done = call(
            logits.data_ptr(),
            rows,
            vocab_size,
            logits.stride(0),
            seeds.data_ptr(),
            positions.data_ptr(),
            temperature.data_ptr(),
            None if threshold is None else threshold.data_ptr(),
            lane,
            tokens.data_ptr(),
            logprobs.data_ptr(),
        )
        return (tokens, logprobs) if is_done else None

    return sample
