"""Does the planner predict what engines of this machine take? ``python -m launch.plan_check [out=PATH] [within=0.15]``

Bandwidth and arithmetic of one core are measured; an engine of the embedded model is started and its decoding steps
are timed over batches and contexts. Three of them calibrate the planner's cost model (rollout/plan/host.py); the
others are predicted. Exit code 0 if their mean error lies within `within`. `steps=FILE` takes steps timed before.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console
from rich.table import Table

from actors.service import start_service
from launch.arguments import split_arguments
from launch.cluster import model_path, start_ray
from launch.compose import compose
from launch.simulate_bench import STEP_TOKENS, time_steps
from rollout.errors import InvalidRequest, LongrollError
from rollout.plan.host import Predicted, predict
from rollout.plan.shape import shape_of
from rollout.simulate.accelerators import Accelerator
from rollout.simulate.costs import Layout
from rollout.simulate.measured import MeasuredStep, read_steps

PROBE_BYTES = 64 * 2**20  # copied to find the bandwidth; larger than the caches of a core
PROBE_SIZE = 512  # of the square matrices whose product tells the arithmetic
PROBES = 15  # the fastest counts: others share the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is timed.

    Attributes:
        batches, contexts: Sequences decoded together, and the tokens each has before.
        turns: Each size is timed so many times after a first one that compiles; the fastest counts.
        within: Largest mean error that passes.
        steps: JSON file of steps to take instead of starting an engine; written if it is not there.
        out: JSON file for the result.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    contexts: tuple[int, ...] = (32, 512, 1024)
    turns: int = 3
    within: float = 0.15
    steps: str | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        if len(set(self.batches)) < 3 or len(set(self.contexts)) < 2 or min(*self.batches, *self.contexts) < 1:
            raise InvalidRequest(
                "batches, contexts", (self.batches, self.contexts), "three and two sizes ≥ 1, at least"
            )
        if self.turns < 1 or self.within <= 0:
            raise InvalidRequest("turns, within", (self.turns, self.within), "at least 1, and above 0")


def measured_device() -> Accelerator:
    """One core as an accelerator: bytes read per second, and float32 operations per second in matrix products."""
    torch.set_num_threads(1)
    source = torch.zeros(PROBE_BYTES // 4)
    target = torch.empty_like(source)
    left = torch.rand(PROBE_SIZE, PROBE_SIZE)
    copied = PROBE_BYTES * 2 / _fastest_s(lambda: target.copy_(source))  # read and written
    flops = 2 * PROBE_SIZE**3 / _fastest_s(lambda: left @ left)
    return Accelerator(name="cpu", memory_bytes=1e9, memory_bytes_per_s=copied, flops=flops, link_bytes_per_s=copied)


def _fastest_s(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(PROBES):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return min(taken)


def timed_steps(options: Options) -> list[MeasuredStep]:
    """Start one engine and time its steps; of every size the fastest."""
    config = compose(["experiment=tiny_grpo", "engine.num_shards=1"])
    config.model.path = model_path(config.model.path)
    config.engine.max_num_seqs = config.scheduler.max_running_per_shard = max(options.batches)
    config.model.max_model_len = max(options.contexts) + STEP_TOKENS
    config.engine.kv_cache_bytes = 2**30
    start_ray(config)
    best: dict[tuple[int, int], MeasuredStep] = {}
    try:
        parts = config.model, config.engine, config.scheduler, config.sync, config.cluster
        with start_service(*parts) as service:
            draw = random.Random(0)
            for turn in range(options.turns + 1):
                for batch in options.batches:
                    for context in options.contexts:
                        step = next(time_steps(service, draw, batch, context))
                        known = best.get((batch, context))
                        if turn and (known is None or step.step_s < known.step_s):
                            best[batch, context] = step
    finally:
        ray.shutdown()
    return list(best.values())


def table(found: Sequence[Predicted]) -> Table:
    """Every step: measured, computed, and what calibrated."""
    result = Table(title="decoding steps of the embedded model on one core", title_justify="left")
    for name in ("sequences", "context", "measured", "computed", "error"):
        result.add_column(name, justify="right")
    for one in found:
        result.add_row(
            f"{one.step.batch}",
            f"{one.step.context_tokens // one.step.batch:,}",
            f"{one.step.step_s * 1e3:.2f} ms",
            f"{one.computed_s * 1e3:.2f} ms",
            "calibrates" if one.is_calibration else f"{one.error:+.1%}",
        )
    return result


def run(options: Options) -> dict[str, Any]:
    """Measure or read, predict, print; returns the record."""
    device = measured_device()
    file = None if options.steps is None else Path(options.steps)
    steps = read_steps(file) if file is not None and file.is_file() else timed_steps(options)
    if file is not None:
        file.write_text(json.dumps([asdict(step) for step in steps], indent=1) + "\n")
    model = model_path(compose(["experiment=tiny_grpo"]).model.path)
    layout = Layout(weight_bits=32, kv_dtype="float32")
    efficiency, found = predict(steps, device, shape_of(model), layout)
    errors = [abs(one.error) for one in found if not one.is_calibration]
    Console(width=120).print(table(found))
    print(
        f"one core: {device.memory_bytes_per_s / 1e9:.1f} GB/s, {device.flops / 1e9:.0f} GFLOP/s; a step "
        f"{efficiency.step_s * 1e3:.2f} ms + {efficiency.row_s * 1e6:.0f} µs a sequence, KV at {efficiency.kv:.0%}; "
        f"{len(errors)} predicted steps are {statistics.fmean(errors):.1%} off on average, at most {max(errors):.1%}"
    )
    return {
        "mean_error": statistics.fmean(errors),
        "max_error": max(errors),
        "device": asdict(device),
        "efficiency": asdict(efficiency),
        "steps": [asdict(one) | {"error": one.error} for one in found],
        "options": asdict(options),
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, rest = split_arguments(Options, arguments)
        if rest:
            raise InvalidRequest("argument", rest[0], "one of this command's own options, see --help")
        record = run(options)
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    if options.out is not None:
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    return 0 if record["mean_error"] <= options.within else 1


if __name__ == "__main__":
    sys.exit(main())
