"""What the benches share: one line of the table, the median time of a call and the bandwidth of a copy.

Knows of no operation. Without CUDA the times are those of the CPU implementations.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

NUM_ROTATING_INPUTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One line of the table. Bytes are those the operation must read and write at least once.

    Attributes:
        op: Operation.
        shape: Sizes and dtype, in words.
        device: "cuda" or "cpu".
        time_us: Median time of a call.
        gb_per_s: Bytes over time.
        memcpy_share: Their rate over that of a large copy; None where no copy was measured.
        error: Largest error against a more exact evaluation, in the unit the bench states.
        ratio_to_bf16: Time of the same operation on bfloat16 operands over time_us, measured in the same
            run; None where there is no such operation.
    """

    op: str
    shape: str
    device: str
    time_us: float
    gb_per_s: float
    memcpy_share: float | None
    error: float
    ratio_to_bf16: float | None = None


def median_time_s(run: Callable[[], object], device: str) -> float:
    """Return the median time of one call, in seconds."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=50, rep=300, return_mode="median") * 1e-3
    run()
    times_s: list[float] = []
    deadline = time.perf_counter() + 0.5
    while len(times_s) < 5 or time.perf_counter() < deadline:
        start = time.perf_counter()
        run()
        times_s.append(time.perf_counter() - start)
    return statistics.median(times_s)


def graph_time_s(run: Callable[[], object], device: str) -> float:
    """Return the median time of one call in a CUDA graph, in seconds: what a decode step pays, no launches.

    Nothing empties the caches between calls, so run must take turns with inputs larger than they are.
    """
    if device != "cuda":
        return median_time_s(run, device)
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(run, rep=50, return_mode="median") * 1e-3


def memcpy_bandwidth(device: str) -> float:
    """Return the measured bytes per second of a large copy, reads and writes counted."""
    num_bytes = 2**30 if device == "cuda" else 2**26
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / median_time_s(lambda: target.copy_(source), device)
