"""Compiles C++ kernels for CPUs with AMX, each into a library of this process.

A library is built in a second at the first call and kept by nothing else, so that it fits the CPU and the
source. Where it cannot be built or run, the caller hears None and uses torch's own operation.
"""

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

log = logging.getLogger(__name__)

_INSTRUCTIONS = ("avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512bf16", "fma", "amx-tile", "amx-bf16")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", *(f"-m{name}" for name in _INSTRUCTIONS))
_COMPILE_TIMEOUT_S = 120


@functools.cache
def amx_library(source: Path) -> ctypes.CDLL | None:
    """The functions of a C++ file, which run on torch's threads.

    Args:
        source: Defines ``extern "C" int is_supported()``: whether the CPU has the instructions it uses.

    Returns:
        The library, or None on a CPU without AMX or a machine without a compiler that knows it.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.cpu._init_amx():
        return None
    try:
        library = _compiled(source)
    except (OSError, subprocess.SubprocessError) as error:
        stderr = getattr(error, "stderr", None) or ""
        log.warning("torch's slower kernels are used: %s does not build: %s %s", source, error, stderr[-500:])
        return None
    return library if library.is_supported() else None


def _compiled(source: Path) -> ctypes.CDLL:
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
        made, library = f"{folder}/{source.stem}.o", f"{folder}/{source.stem}.so"
        for command in ((*_FLAGS, "-fopenmp", "-c", str(source), "-o", made), ("-shared", made, "-o", library)):
            subprocess.run([compiler, *command], check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
        return ctypes.CDLL(library)
