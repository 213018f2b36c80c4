"""Dynamic benchmark of the gateway: arrivals at random, in bursts, and far beyond what it can do.

    python -m launch.bench_serving [lengths=64:64] [duration_s=300] [overload_s=60] [share=0.7] [overload=3]
        [url=http://127.0.0.1:8000 pid=PID] [out=PATH] [picture=PATH] [overrides …]

Without `url` it starts the service of the overrides (experiment=tiny_grpo unless told otherwise) and stops it
afterwards; with `url` the API key is taken from LONGROLL_API_KEY, and memory is sampled from the process `pid` (see
launch.device_memory). Four phases, each with requests whose prompts have nothing in common:

- capacity: closed loops of growing concurrency; the capacity is the highest rate at which 95 % of the requests were
  within the targets and none was refused;
- steady: a Poisson process of `share` × capacity for `duration_s`;
- bursts: the same rate for `bursts_s`, with gaps three times as irregular (coefficient of variation 3);
- overload: a Poisson process of `overload` × capacity for `overload_s`. What cannot be served in time must be refused
  with 429 and Retry-After, and what is admitted must be within the targets.

How many are let in follows from scheduler.admission's targets, which the service learns to keep; it begins to learn in
the capacity phase. If the targets here are others than the defaults, give the same to the service.

`qps_variation` is the standard deviation over the mean of the requests completed in a window of `window_s`;
`offered_variation` is what the arrivals varied by themselves.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.arguments import split_arguments
from launch.bench_parallel import parse_lengths
from launch.device_memory import MemorySampler, MemoryUse, memory_use
from launch.hardware import hardware_line
from launch.http_load import Outcome, Target, ask_stream, random_asks
from launch.load_picture import draw_serving
from launch.load_runs import arrivals, closed_loop, open_loop
from launch.load_statistics import Summary, Targets, summarise
from launch.serving_target import Served, serving
from rollout.errors import LongrollError

ENOUGH = 0.95  # of the requests within targets
BURSTS_CV = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The load.

    Attributes:
        url, pid: Of a running gateway, and of the process that started it; None, 0 = start one, no memory figures.
        lengths: prompt:output, in tokens.
        concurrency: Of the closed loops that find the capacity.
        capacity_s: Of each of them.
        share, overload: Of the capacity, in the phases steady and bursts, and overload.
        duration_s, bursts_s, overload_s: Of the phases; 0 leaves a phase out.
        window_s: Of the variation.
        ttft_ms, tpot_ms: Targets of a request.
        seed: Of prompts and arrivals.
        out, picture: JSON and PNG files.
    """

    url: str | None = None
    pid: int = 0
    lengths: str = "64:64"
    concurrency: tuple[int, ...] = (4, 8, 16, 32, 64)
    capacity_s: float = 15.0
    share: float = 0.7
    overload: float = 3.0
    duration_s: float = 300.0
    bursts_s: float = 60.0
    overload_s: float = 60.0
    window_s: float = 30.0
    ttft_ms: float = 200.0
    tpot_ms: float = 50.0
    seed: int = 0
    out: str | None = None
    picture: str | None = None

    @property
    def targets(self) -> Targets:
        return Targets(ttft_s=self.ttft_ms / 1e3, tpot_s=self.tpot_ms / 1e3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase: the rate that was offered, what came of it, the memory it took, and every request for the picture."""

    name: str
    rate: float
    summary: Summary
    memory: MemoryUse | None
    outcomes: tuple[Outcome, ...]


async def find_capacity(target: Target, options: Options) -> tuple[float, dict[int, Summary]]:
    """Requests in a second, and the closed loops it was found by."""
    prompt_tokens, output_tokens = parse_lengths(options.lengths)
    loops: dict[int, Summary] = {}
    for concurrency in options.concurrency:
        asks = ask_stream(prompt_tokens, output_tokens, f"capacity/{concurrency}/{options.seed}")
        outcomes = await closed_loop(target, asks, concurrency, until_s=options.capacity_s)
        summary = loops[concurrency] = summarise(outcomes, options.targets)
        print(line(f"{concurrency} streams", summary), flush=True)
        if summary.num_refused or summary.share_within < ENOUGH:
            break
    return capacity_of(loops), loops


def capacity_of(loops: dict[int, Summary]) -> float:
    """The highest rate with enough requests within targets and none refused; without such a loop, the highest."""
    fit = [one for one in loops.values() if one.share_within >= ENOUGH and not one.num_refused]
    return max(one.requests_per_s for one in fit or loops.values())


async def run_phase(served: Served, options: Options, name: str, rate: float, duration_s: float, cv: float) -> Phase:
    """Offer requests for a while, sampling memory if the process is known."""
    times = arrivals(rate, duration_s, cv, options.seed)
    asks = random_asks(len(times), *parse_lengths(options.lengths), seed=f"{name}/{options.seed}")
    memory = None
    if served.pid:
        with MemorySampler(served.pid) as sampler:
            outcomes = await open_loop(served.target, asks, times)
        memory = memory_use(sampler.samples)
    else:
        outcomes = await open_loop(served.target, asks, times)
    summary = summarise(outcomes, options.targets, window_s=options.window_s, steady_s=duration_s)
    print(line(f"{name}, {rate:.1f}/s", summary), flush=True)
    return Phase(name=name, rate=rate, summary=summary, memory=memory, outcomes=tuple(outcomes))


async def measure(served: Served, options: Options) -> tuple[float, dict[int, Summary], list[Phase]]:
    """All phases; the capacity first."""
    capacity, loops = await find_capacity(served.target, options)
    plan = (
        ("steady", options.share * capacity, options.duration_s, 1.0),
        ("bursts", options.share * capacity, options.bursts_s, BURSTS_CV),
        ("overload", options.overload * capacity, options.overload_s, 1.0),
    )
    phases = [await run_phase(served, options, *phase) for phase in plan if phase[2] > 0]
    return capacity, loops, phases


def line(name: str, s: Summary) -> str:
    varied = (
        "" if s.qps_variation is None else f"  QPS ± {s.qps_variation:.1%} (offered ± {s.offered_variation or 0:.1%})"
    )
    return (
        f"{name:<20} {s.requests_per_s:6.2f}/s {s.tokens_per_s:6.0f} tokens/s  within {s.share_within:6.1%}  "
        f"TTFT p95 {s.ttft_ms.p95:4.0f} ms  TPOT p95 {s.tpot_ms.p95:4.1f} ms  {s.num_refused} refused, "
        f"{s.num_errors} errors{varied}"
    )


def record_of(
    options: Options, capacity: float, loops: dict[int, Summary], phases: Sequence[Phase], is_alive: bool
) -> dict[str, Any]:
    """As written to `out`."""
    return {
        "capacity_per_s": capacity,
        "is_alive": is_alive,
        "hardware": hardware_line(),
        "options": asdict(options),
        "loops": {str(concurrency): asdict(summary) for concurrency, summary in loops.items()},
        "phases": {
            one.name: {
                "rate": one.rate,
                "summary": asdict(one.summary),
                "memory": None if one.memory is None else asdict(one.memory),
                "ends_s": [round(outcome.end_s, 3) for outcome in one.outcomes if outcome.is_good],
                "refused_s": [round(outcome.end_s, 3) for outcome in one.outcomes if outcome.is_refused],
            }
            for one in phases
        },
    }


async def is_alive(target: Target, options: Options) -> bool:
    """Whether one more request is answered."""
    (outcome,) = await closed_loop(target, random_asks(1, *parse_lengths(options.lengths), seed="alive"), 1)
    return outcome.is_good


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, overrides = split_arguments(Options, arguments)
        parse_lengths(options.lengths)
        with serving(options.url, overrides, options.pid) as served:
            capacity, loops, phases = asyncio.run(measure(served, options))
            alive = asyncio.run(is_alive(served.target, options))
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    record = record_of(options, capacity, loops, phases, alive)
    print(f"capacity {capacity:.2f} requests/s; {'alive' if alive else 'NOT ALIVE'} at the end")
    if options.out is not None:
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    if options.picture is not None:
        draw_serving(record, Path(options.picture))
    return 0


if __name__ == "__main__":
    sys.exit(main())
