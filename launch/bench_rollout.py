"""Scheduling policies and the cost of the service, on real engines.

    python -m launch.bench_rollout [experiment=tiny_grpo] [groups=16] [repeats=3] [out=PATH] [picture=PATH] [options …]

Everything in one run and in turns, with the prefix caches emptied in between. "vllm" is plain vLLM as synchronous
trainers use it: `LLM.generate`, groups dealt in turn to as many engines as there are shards, with as many slots each;
they share nothing, not even experts. All other ways use the service's shards:

- heavy-tailed lengths, drawn as for the simulator and known to the shards alone (see launch.hidden_lengths), through
  vllm and the policies static, partial and divided: the same prompts and ends for each, several waves of trajectories
  on the engines' slots. `makespan_speedup` is the makespan of vllm over that of divided, `speedup_over_static` that of
  static over it; `tail_ratio` the time in which the last 10 % of the trajectories finish, divided over vllm;
- equal lengths through policy divided, its journal and its cuts; straight to the same engines without a controller,
  everything at once (plain), before and after; and through vllm. `uniform_ratio` is divided's throughput over the mean
  of plain's two: what journal and cuts cost, whichever way the machine's pace drifts; `uniform_over_vllm` over vllm's:
  what expert parallelism costs as well.

By default the service's shards share nothing either; engine.num_shards=2 engine.num_groups=1 makes them an
expert-parallel pair. So makespan_speedup comes from scheduling and from what `uniform_over_vllm` shows, and nothing
else; speedup_over_static, on the same engines, from scheduling alone.

Each figure is the median of the repeats' ratios. All ways must give the same tokens; differences at near ties are
counted and shown. The parameters of the lengths (p80_share, sigma, rho, …) are those of rollout.simulate.lengths. The
prompts have been seen once before, as from the second epoch of a training run on; visits=1 shows them for the first
time. The journals are made under TMPDIR, as journal.synchronous says.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from actors.service import start_service
from launch.arguments import split_arguments
from launch.cluster import model_path, start_ray
from launch.compose import compose
from launch.hidden_lengths import with_lengths
from launch.rollout_load import write_trace
from launch.rollout_picture import draw
from launch.rollout_turns import OURS, PLAIN, PLAIN_AGAIN, STOCK, Options, Repeat, make_loads, measure, quantiles
from launch.stock_engines import start_stock_engines
from rollout.config import RunConfig
from rollout.errors import LongrollError
from rollout.simulate.lengths import LengthModel

LENGTHS = ("p80_share=0.1", "sigma=1.5", "rho=0.8")
"""A heavier tail than a fleet has: with two shards, a slot's work is then about as long as the longest trajectory."""
ENGINES = ("engine.num_shards=1", "engine.num_groups=2")
PROMPT_TOKENS = 512  # room for one, at least
BLOCK_TOKENS = 32
"""Of KV, unless engine.block_size is given: a continuation computes the last, partial block again, and vLLM's default
on a CPU is as long as a chunk."""


def record_of(options: Options, heavy: Sequence[Repeat], uniform: Sequence[Repeat]) -> dict[str, Any]:
    """Everything, with the medians of the repeats' ratios first."""
    them = STOCK if options.stock else "static"
    figures = {
        "makespan_speedup": [r.ratio("makespan_s", them, OURS) for r in heavy],
        "tail_ratio": [r.ratio("tail_s", OURS, them) for r in heavy],
        "group_tail_ratio": [r.ratio("group_tail_s", OURS, them) for r in heavy],
        "speedup_over_static": [r.ratio("makespan_s", "static", OURS) for r in heavy],
        "tail_over_static": [r.ratio("tail_s", OURS, "static") for r in heavy],
        "speedup_over_partial": [r.ratio("makespan_s", "partial", OURS) for r in heavy],
        "uniform_ratio": [_over_both(r) for r in uniform],
    }
    if options.stock:
        figures["uniform_over_vllm"] = [r.ratio("tokens_per_s", OURS, STOCK) for r in uniform]
    figures = {name: ratios for name, ratios in figures.items() if ratios and math.inf not in ratios}
    record: dict[str, Any] = {name: statistics.median(ratios) for name, ratios in figures.items()}
    record["num_near_ties"] = sum(len(r.differences) for r in (*heavy, *uniform))
    record["repeats"] = figures
    record["options"] = asdict(options)
    record["heavy"] = [_repeat_record(r) for r in heavy]
    record["uniform"] = [_repeat_record(r) for r in uniform]
    return record


def _over_both(repeat: Repeat) -> float:
    """Throughput of divided over the mean of the plain turns before and after it."""
    plain = (repeat.timelines[name].tokens_per_s for name in (PLAIN, PLAIN_AGAIN))
    return repeat.timelines[OURS].tokens_per_s / statistics.fmean(plain)


def _repeat_record(repeat: Repeat) -> dict[str, Any]:
    return {
        "length_quantiles": quantiles(repeat.lengths),
        "near_ties": [str(one) for one in repeat.differences],
        "runs": {
            name: {
                "makespan_s": one.makespan_s,
                "tail_s": one.tail_s,
                "group_tail_s": one.group_tail_s,
                "first_group_s": one.group_ends_s[0],
                "utilisation": one.utilisation,
                "tokens_per_s": one.tokens_per_s,
                "num_tokens": one.num_tokens,
                "num_cached_tokens": one.num_cached_tokens,
                "bars": [asdict(bar) for bar in one.bars],
            }
            for name, one in repeat.timelines.items()
        },
    }


def table(record: Mapping[str, Any]) -> str:
    """One line a figure: median, lowest and highest."""
    rows = [f"{'figure':<22} {'median':>7}   lowest … highest of {record['options']['repeats']}"]
    for name, ratios in record["repeats"].items():
        rows.append(f"{name:<22} {record[name]:>7.3f}   {min(ratios):.3f} … {max(ratios):.3f}")
    return "\n".join([*rows, f"near ties between ways: {record['num_near_ties']}"])


def run(config: RunConfig, options: Options, model: LengthModel) -> tuple[dict[str, Any], list[Repeat]]:
    """Start the engines with `slots` places each and measure."""
    config.engine.max_num_seqs = options.slots
    config.scheduler.max_running_per_shard = options.slots
    config.engine.block_size = config.engine.block_size or BLOCK_TOKENS
    config.model.max_model_len = max(config.model.max_model_len, options.max_tokens + PROMPT_TOKENS)
    print(f"starting {config.engine.num_all_shards} shards of {options.slots} slots", flush=True)
    loads = make_loads(config, options, model)
    if options.trace is not None:
        write_trace(loads.heavy[0], Path(options.trace))
    parts = config.model, config.engine, config.scheduler, config.sync, config.cluster
    with start_service(*parts, shard_class=with_lengths(loads.lengths)) as service:
        number = config.engine.num_all_shards if options.stock else 0
        stock = start_stock_engines(number, config.model, config.engine, {})
        heavy, uniform = measure(service, config, options, loads, stock)
    return record_of(options, heavy, uniform), heavy


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, rest = split_arguments(Options, arguments)
        model, overrides = split_arguments(LengthModel, [*LENGTHS, *rest])
        if not any(override.startswith("experiment=") for override in overrides):
            overrides = ["experiment=tiny_grpo", *overrides]
        config = compose([*ENGINES, *overrides])
        config.model.path = model_path(config.model.path)
        start_ray(config)
        try:
            record, heavy = run(config, options, model)
        finally:
            ray.shutdown()
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(table(record))
    print(json.dumps({key: value for key, value in record.items() if isinstance(value, (int, float))}, indent=2))
    if options.out is not None:
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    if options.picture is not None:
        them = STOCK if options.stock else "static"
        median = min(heavy, key=lambda r: abs(r.ratio("makespan_s", them, OURS) - record["makespan_speedup"]))
        draw(
            median.timelines, Path(options.picture), f"divided over {them}: {record['makespan_speedup']:.2f} × as fast"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
