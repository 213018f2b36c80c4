"""Correctness, then speed, of INT4 weights against bfloat16 ones at the shapes of Qwen3-235B-A22B.

Owns the two bench functions; the measuring is ``measure.py``'s and the table ``bench.py``'s. A shard of 32
holds 4 of 128 experts and takes the tokens of all shards; its attention layers are whole. Errors are the
largest difference from the float32 definition over the largest result.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch.nn.functional import linear, silu

from kernels.int4 import dequantise, int4_linear, int4_moe, kernel_form, quantise
from kernels.int4.reference import int4_linear_reference, int4_moe_reference
from kernels.measure import NUM_ROTATING_INPUTS, Result, graph_time_s, median_time_s

_GROUP_SIZE = 128
_MAX_ERROR = 2.0**-5
"""Rounding to bfloat16 (2**-8 each) strikes the weights, the activation, an expert's result and the sum; the
largest result is at least as large as a typical one, so twice the four together is generous."""
_DECODE_TOKENS = 256
"""Up to so many tokens a call is timed inside a CUDA graph, as decode steps run."""

Packed = tuple[torch.Tensor, torch.Tensor]
Timer = Callable[[Callable[[], object], str], float]
T = TypeVar("T")


def bench_int4_linear(device: str, bandwidth: float) -> Iterator[Result]:
    """Measure ``int4_linear`` against a bfloat16 matmul: the fused q, k, v and the output projection."""
    if device == "cuda":
        matrices, rows = [(9216, 4096), (4096, 8192)], [1, 4, 16, 64, 256, 4096]
    else:
        matrices, rows = [(512, 512)], [1, 16, 64]
    for (num_out, num_in), num_rows in itertools.product(matrices, rows):
        weights = [_random_packed((num_out, num_in), device, seed) for seed in range(NUM_ROTATING_INPUTS)]
        x = torch.randn(num_rows, num_in, device=device, generator=_generator(device)).bfloat16()
        forms = [kernel_form(*weight) for weight in weights]
        error = _check(int4_linear(x, forms[0], _GROUP_SIZE), int4_linear_reference(x, *weights[0]))
        dense = [dequantise(*weight, torch.bfloat16) for weight in weights]
        timer = graph_time_s if num_rows <= _DECODE_TOKENS else median_time_s
        seconds = _rotate(timer, device, forms, lambda form: int4_linear(x, form, _GROUP_SIZE))  # noqa: B023
        dense_seconds = _rotate(timer, device, dense, lambda weight: linear(x, weight))  # noqa: B023
        num_bytes = weights[0][0].nbytes + weights[0][1].nbytes + x.nbytes + 2 * num_rows * num_out
        yield _result(
            "int4_linear",
            f"{num_rows} x {num_in} x {num_out}",
            device,
            bandwidth,
            num_bytes,
            seconds,
            dense_seconds,
            error,
        )


def bench_int4_moe(device: str, bandwidth: float) -> Iterator[Result]:
    """Measure ``int4_moe`` at equal loads of the experts.

    The bfloat16 side is the two grouped matmuls and the SwiGLU between them alone, on tokens that are
    already sorted: routing and the weighted sum, which ``int4_moe`` includes, are given to it.
    """
    if device == "cuda":
        (hidden, width, num_global, num_local, top_k), loads = (4096, 1536, 128, 4, 8), [1, 2, 4, 8, 16, 2048]
    else:
        (hidden, width, num_global, num_local, top_k), loads = (256, 128, 8, 4, 2), [1, 16]
    expert_map = torch.full((num_global,), -1, device=device)
    expert_map[:num_local] = torch.arange(num_local, device=device)
    shapes = ((num_local, 2 * width, hidden), (num_local, hidden, width))
    pairs = [
        (_random_packed(shapes[0], device, 2 * seed), _random_packed(shapes[1], device, 2 * seed + 1))
        for seed in range(NUM_ROTATING_INPUTS)
    ]
    forms = [(kernel_form(*w13), kernel_form(*w2)) for w13, w2 in pairs]
    dense = [tuple(dequantise(*weight, torch.bfloat16).transpose(1, 2) for weight in pair) for pair in pairs]
    for load in loads:
        num_tokens = load * num_global // top_k
        x = torch.randn(num_tokens, hidden, device=device, generator=_generator(device)).bfloat16()
        # Token t takes experts t k .. t k + k - 1, modulo their number: each has the same load.
        ids = torch.arange(num_tokens * top_k, device=device).view(num_tokens, top_k) % num_global
        routing = (torch.full(ids.shape, 1 / top_k, device=device), ids, expert_map)

        def run(form: tuple[Packed, Packed]) -> torch.Tensor:
            return int4_moe(x, *form, *routing, _GROUP_SIZE)  # noqa: B023

        rows = x[: num_local * load].contiguous()
        ends = torch.arange(load, (num_local + 1) * load, load, dtype=torch.int32, device=device)[:num_local]

        def run_dense(weight: tuple[torch.Tensor, ...]) -> torch.Tensor:
            gate, up = torch._grouped_mm(rows, weight[0], offs=ends).chunk(2, dim=-1)  # noqa: B023
            return torch._grouped_mm(silu(gate) * up, weight[1], offs=ends)  # noqa: B023

        error = _check(run(forms[0]), int4_moe_reference(x, *pairs[0], *routing))
        timer = graph_time_s if num_tokens <= _DECODE_TOKENS else median_time_s
        seconds, dense_seconds = _rotate(timer, device, forms, run), _rotate(timer, device, dense, run_dense)
        num_bytes = sum(t.nbytes for weight in pairs[0] for t in weight) + 2 * x.nbytes
        shape = f"{num_local} x {load} x {hidden} x {width}"
        yield _result("int4_moe", shape, device, bandwidth, num_bytes, seconds, dense_seconds, error)


def _generator(device: str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _random_packed(shape: tuple[int, ...], device: str, seed: int) -> Packed:
    weight = torch.randn(shape, device=device, generator=_generator(device, seed))
    return quantise(weight.mul_(shape[-1] ** -0.5), _GROUP_SIZE)


def _check(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error over the largest result.

    Raises:
        AssertionError: It is more than _MAX_ERROR, or not a number.
    """
    error = ((actual.float() - expected).abs().max() / expected.abs().max()).item()
    assert error <= _MAX_ERROR, f"error {error}, expected <= {_MAX_ERROR}"
    return error


def _rotate(timer: Timer, device: str, inputs: list[T], run: Callable[[T], object]) -> float:
    rotation = itertools.cycle(inputs)
    return timer(lambda: run(next(rotation)), device)


def _result(
    op: str,
    shape: str,
    device: str,
    bandwidth: float,
    num_bytes: int,
    seconds: float,
    dense_seconds: float,
    error: float,
) -> Result:
    rate = num_bytes / seconds
    return Result(
        op=op,
        shape=shape,
        device=device,
        time_us=seconds * 1e6,
        gb_per_s=rate * 1e-9,
        memcpy_share=rate / bandwidth if device == "cuda" else None,
        error=error,
        ratio_to_bf16=dense_seconds / seconds,
    )
