"""Correctness, then speed, of each kernel: ``python -m kernels.bench [--op NAME] [--json OUT]``.

Owns the table; knows of each operation only its bench function in ``BENCHES``. Runs with torch and
triton alone. Without CUDA it times the CPU reference at small shapes and says so.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch

from kernels.bench_int4 import bench_int4_linear, bench_int4_moe
from kernels.bench_kv import bench_kv_attention
from kernels.bench_tree import bench_tree_attention
from kernels.gumbel_sample import GUMBEL_MAX, gumbel_noise, gumbel_sample
from kernels.measure import NUM_ROTATING_INPUTS, Result, median_time_s, memcpy_bandwidth


def check_gumbel_sample(logits: torch.Tensor, arguments: dict[str, torch.Tensor]) -> float:
    """Compare one call with a float64 evaluation; return the largest error of a log-probability.

    A token may differ from the float64 argmax only at a near tie: the noise carries the error of two
    float32 logarithms (up to 4 units in the last place each, the unit 2**-19 at its largest values)
    and one rounding of the sum.

    Raises:
        AssertionError: A token is no near tie or a log-probability is off by more than 2**-16.
    """
    tokens, logprobs = gumbel_sample(logits, **arguments)
    x = (logits.float() * arguments["temperature"].reciprocal()[:, None]).double()
    noise = gumbel_noise(arguments["seeds"], arguments["positions"], logits.shape[1])
    perturbed = x + noise.double()
    gap = perturbed.amax(-1) - perturbed.gather(1, tokens[:, None]).squeeze(1)
    tolerance = 8 * 2.0**-19 + 2.0**-23 * (x.abs().amax().item() + GUMBEL_MAX)
    assert gap.max().item() <= tolerance, f"token: gap {gap.max().item()}, expected <= {tolerance}"
    expected = x.gather(1, tokens[:, None]).squeeze(1) - x.logsumexp(-1)
    error = (logprobs.double() - expected).abs().max().item()
    assert error <= 2.0**-16, f"logprob: error {error}, expected <= {2.0**-16}"
    return error


def bench_gumbel_sample(device: str, bandwidth: float) -> Iterator[Result]:
    """Measure ``gumbel_sample`` over batch sizes; the bytes are one read of the logits."""
    if device == "cuda":
        dtypes = (torch.float32, torch.bfloat16)
        shapes = list(itertools.product((1, 4, 16, 64, 256), (151_936,), dtypes))
    else:
        shapes = [(rows, 512, torch.float32) for rows in (1, 16, 64)]
    for num_rows, vocab_size, dtype in shapes:
        generator = torch.Generator(device).manual_seed(0)
        arguments = {
            "seeds": torch.randint(0, 2**62, (num_rows,), device=device, generator=generator),
            "positions": torch.randint(0, 2**20, (num_rows,), device=device, generator=generator),
            "temperature": torch.full((num_rows,), 0.8, device=device),
        }
        inputs = [
            (3 * torch.randn(num_rows, vocab_size, device=device, generator=generator)).to(dtype)
            for _ in range(NUM_ROTATING_INPUTS)
        ]
        error = max(check_gumbel_sample(logits, arguments) for logits in inputs)
        rotation = itertools.cycle(inputs)
        seconds = median_time_s(lambda: gumbel_sample(next(rotation), **arguments), device)  # noqa: B023
        rate = inputs[0].nbytes / seconds
        yield Result(
            op="gumbel_sample",
            shape=f"{num_rows}x{vocab_size} {str(dtype).removeprefix('torch.')}",
            device=device,
            time_us=seconds * 1e6,
            gb_per_s=rate * 1e-9,
            memcpy_share=rate / bandwidth if device == "cuda" else None,
            error=error,
        )


BENCHES: dict[str, Callable[[str, float], Iterator[Result]]] = {
    "gumbel_sample": bench_gumbel_sample,
    "int4_linear": bench_int4_linear,
    "int4_moe": bench_int4_moe,
    "kv_attention": bench_kv_attention,
    "tree_attention": bench_tree_attention,
}


def format_row(result: Result) -> str:
    """Return one line of the table."""
    share = "-" if result.memcpy_share is None else f"{result.memcpy_share:.0%}"
    ratio = "-" if result.ratio_to_bf16 is None else f"{result.ratio_to_bf16:.2f}x"
    return (
        f"{result.op:<16} {result.shape:<32} {result.device:<5} {result.time_us:>10.1f}"
        f" {result.gb_per_s:>8.1f} {share:>7} {ratio:>8} {result.error:>10.1e}"
    )


def main() -> None:
    """Run the benches, print the table and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--op", choices=sorted(BENCHES), help="one operation (default: all)")
    parser.add_argument("--json", metavar="OUT", help="also write the results to this file")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    bandwidth = memcpy_bandwidth(device) if device == "cuda" else math.nan
    device_name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    if device == "cuda":
        print(f"{device_name}: memcpy {bandwidth * 1e-9:.0f} GB/s (read and write)")
    else:
        print("cuda: not measured")
    header = ("op", "shape", "on", "us", "GB/s", "memcpy", "to bf16", "error")
    print("{:<16} {:<32} {:<5} {:>10} {:>8} {:>7} {:>8} {:>10}".format(*header))
    results = []
    for name in [options.op] if options.op else list(BENCHES):
        for result in BENCHES[name](device, bandwidth):
            print(format_row(result), flush=True)
            results.append(result)
    if options.json:
        memcpy_gb_per_s = bandwidth * 1e-9 if device == "cuda" else None
        record = {
            "device": device_name,
            "memcpy_gb_per_s": memcpy_gb_per_s,
            "torch": torch.__version__,
            "results": [asdict(result) for result in results],
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2)


if __name__ == "__main__":
    main()
