"""What the tests of compiled CPU kernels share."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch

HAS_VECTORS = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
needs_vectors = pytest.mark.skipif(not HAS_VECTORS, reason="this CPU has no AVX-512 with bfloat16")


def digest(y: torch.Tensor) -> str:
    """Of the bits of a bfloat16 tensor."""
    return hashlib.sha256(y.view(torch.int16).numpy().tobytes()).hexdigest()


def digests_on_threads(program: str) -> set[str]:
    """What a program prints on one, two and three threads, the number being its first argument."""
    printed = set()
    for threads in ("1", "2", "3"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", program, threads]
        printed.add(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    return printed
