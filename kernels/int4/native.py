"""Compiles and calls ``grouped.cpp``, the INT4 products of a CPU with AMX.

Owns the compiled library: one for each process, built in a second at the first call and kept by nothing
else, so that it fits the CPU and the source. Where it cannot be built or run, ``grouped_products`` says so
by returning None and torch's own kernel, which reads the same form, serves.
"""

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

log = logging.getLogger(__name__)

Products = Callable[[torch.Tensor, Sequence[int], torch.Tensor, torch.Tensor, int], torch.Tensor]

_SOURCE = Path(__file__).with_name("grouped.cpp")
_INSTRUCTIONS = ("avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512bf16", "fma", "amx-tile", "amx-bf16")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", *(f"-m{name}" for name in _INSTRUCTIONS))
_COMPILE_TIMEOUT_S = 120


@functools.cache
def grouped_products() -> Products | None:
    """The function that multiplies rows, sorted by expert, with their experts' matrices.

    It takes x [rows, K] bfloat16, contiguous; bounds, E + 1 row numbers that rise from 0 to rows: rows
    bounds[e] up to bounds[e + 1] meet expert e; the two tensors of E matrices [N, K] in torch's form, and
    their group size. It returns [rows, N] bfloat16, accumulated in float32; subnormal activations count as
    zero. It runs on torch's threads.

    Returns:
        The function, or None on a CPU without AMX or a machine without a compiler that knows it.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.cpu._init_amx():
        return None
    try:
        library = _compiled()
    except (OSError, subprocess.SubprocessError) as error:
        stderr = getattr(error, "stderr", None) or ""
        log.warning(
            "INT4 products run on torch's slower kernel: %s does not build: %s %s", _SOURCE, error, stderr[-500:]
        )
        return None
    if not library.is_supported():
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


def _compiled() -> ctypes.CDLL:
    """Build the library in a folder of its own, load it, and remove the folder.

    Linked without OpenMP's runtime: its symbols are found in the one torch has loaded, whose threads are
    then the ones that are counted and bound.

    Raises:
        OSError: No compiler, or the library does not load.
        subprocess.SubprocessError: The compiler fails or takes too long; ``stderr`` has its words.
    """
    compiler = next((name for name in (os.environ.get("CXX"), "c++", "g++") if name and shutil.which(name)), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: set CXX, or install g++")
    with tempfile.TemporaryDirectory(prefix="longroll-") as folder:
        made, library = f"{folder}/grouped.o", f"{folder}/grouped.so"
        for command in ((*_FLAGS, "-fopenmp", "-c", str(_SOURCE), "-o", made), ("-shared", made, "-o", library)):
            subprocess.run([compiler, *command], check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
        return ctypes.CDLL(library)
