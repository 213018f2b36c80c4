"""Runs the tests of Triton's kernels under its interpreter, without CUDA.

It must be chosen before Triton is first imported, so each file runs in a process of its own. All take three minutes
together, most of which one core of two is free for: they run beside the tests that come first.
"""

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

FILES = ("test_gumbel_sample_triton", "test_int4_triton", "test_kv_attention_triton", "test_tree_attention_triton")
TIMEOUT_S = 900

_pool = ThreadPoolExecutor(1)
_runs: dict[str, "Future[tuple[int, str]]"] = {}
_processes: list["subprocess.Popen[str]"] = []


def start(name: str) -> None:
    """Run a file, after those that were started before it."""
    if name not in _runs:
        _runs[name] = _pool.submit(_run, name)


def result(name: str) -> tuple[int, str]:
    """Exit code and words of a file, once it has ended."""
    start(name)
    return _runs[name].result()


def stop() -> None:
    """Nobody looks at what has not ended yet."""
    _pool.shutdown(wait=False, cancel_futures=True)
    for process in _processes:
        process.kill()


def _run(name: str) -> tuple[int, str]:
    folder = Path(__file__).parent
    process = subprocess.Popen(
        ["nice", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", str(folder / f"{name}.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=folder.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    _processes.append(process)
    try:
        words, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    return process.returncode, words
