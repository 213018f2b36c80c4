"""What speculation gains where few sequences run, and what it costs where drafts are worth nothing, on real engines.

    python -m launch.bench_speculation [experiment=tiny_grpo] [repeats=3] [starts=1] [parts=tail,worst] [out=PATH]
        [picture=PATH] …

Everything in one run and in turns, with the prefix caches emptied in between. Two services of two shards share the
cores: one drafts with a Clover-2 model and with siblings, governed, the other was started without speculation. Plain
vLLM takes part in the tail, once without speculation and once with its prompt look-up.

- tail: the longest 1, 2 and 4 of `tail_pool` of the model's own answers, alone on one expert-parallel group, through a
  controller with a journal, in chunks as shipped. `tail_speedup` is the least of the three throughputs with drafts over
  those without; `tail_over_vllm_N` and `tail_over_ngram_N` are over plain vLLM's for N sequences.
- answers: groups of the model's own answers, `slots` at a time.
- rollout: the heavy-tailed lengths of launch.bench_rollout under policy divided on all shards; `rollout_speedup` is the
  makespan without drafts over that with.
- worst: 1 to 64 sequences on one group, straight to the engines, with a draft model whose numbers are shuffled. The
  weights are published anew to both services before each repeat, so that the governor has to find out again that it
  does not pay. What it loses (`governed_ratio_N`) is measured within one engine, whose steps are governed and on hold
  by turns of eight: nobody drafts on hold, but all is kept that drafts need. What it takes to keep it, and all else
  that an engine which can draft has, is between two services (`hold_ratio`, of all batches). `worst_case_ratio` is the
  product, at the least batch. `services_ratio_N` compares governed drafts and the other service directly.
- corrupted: long answers, and the draft that has been good (`settled_ratio`) is published shuffled. `alarm_tokens` is
  how many tokens the longest trajectories had generated when the alarm came, to be compared with a chunk;
  `corrupted_ratio` the throughput from then on over that without drafts, measured as the worst case is.

Speed-ups are medians of the repeats' ratios; ratios that must not fall below 1 are of all turns' times together, but
for those in which ways differ by more than a quarter, with standard errors (`…_error`). Two processes of the very same
engine differ by 2 % on a CPU, which no number of turns takes away: starts=6 starts all engines six times, and errors
between services are then those of the starts. All ways must give the same tokens; differences at near ties
are counted and shown. engine.speculation.… sets limits of trees and the draft (default: the model's own, /draft);
engine.num_shards=2 engine.num_groups=1 makes each service one expert-parallel pair.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from actors.service import start_service
from launch.arguments import split_arguments
from launch.bench_rollout import BLOCK_TOKENS, ENGINES, LENGTHS, PROMPT_TOKENS
from launch.cluster import model_path, start_ray
from launch.compose import compose
from launch.hidden_lengths import with_lengths
from launch.speculation_figures import record_of, table
from launch.speculation_loads import Loads, Options, make_loads
from launch.speculation_picture import draw
from launch.speculation_turns import DRAFTING, NGRAM, NONE, SOURCES, STOCK, Engines, Results, SpeculationBench
from launch.speculation_useless import USELESS
from launch.stock_engines import start_stock_engines
from rollout.config import RunConfig
from rollout.errors import LongrollError
from rollout.simulate.lengths import LengthModel
from rollout.speculation_config import SpeculationConfig


def prepare(config: RunConfig, options: Options) -> None:
    """Make room for the loads, and let the engines draft with all that any part needs."""
    config.engine.max_num_seqs = options.most_sequences
    config.scheduler.max_running_per_shard = options.most_sequences
    config.engine.block_size = config.engine.block_size or BLOCK_TOKENS
    config.model.max_model_len = max(config.model.max_model_len, options.most_tokens + PROMPT_TOKENS)
    asked = config.engine.speculation
    draft = asked.draft_model or str(Path(config.model.path) / "draft")
    config.engine.speculation = replace(
        asked, enabled=True, sources=(*SOURCES, USELESS), draft_model=model_path(draft), draft_travels=True
    )


@contextmanager
def engines_of(config: RunConfig, options: Options, loads: Loads, start: int) -> Iterator[Engines]:
    """Both services and plain vLLM's engines, as long as the context lasts; which comes first depends on the start."""
    plain = copy.deepcopy(config)
    plain.engine.speculation = SpeculationConfig()
    plain.cluster.namespace += "-plain"
    shard_class = with_lengths(loads.lengths)
    with ExitStack() as stack:
        configs, services = {DRAFTING: config, NONE: plain}, {}
        for name in (NONE, DRAFTING) if start % 2 else (DRAFTING, NONE):
            one = configs[name]
            parts = one.model, one.engine, one.scheduler, one.sync, one.cluster
            services[name] = stack.enter_context(start_service(*parts, shard_class=shard_class))
        ours = services[DRAFTING]
        stock: dict[str, list[Any]] = {}
        if options.stock and "tail" in options.parts:
            ngram = {
                "method": "ngram",
                "num_speculative_tokens": options.ngram_tokens,
                "prompt_lookup_max": options.ngram_match,
                "prompt_lookup_min": 1,
            }
            number = plain.engine.num_shards
            for name, extra in ((STOCK, {}), (NGRAM, {"speculative_config": ngram})):
                stock[name] = start_stock_engines(number, plain.model, plain.engine, extra)
                for engine in stock[name]:
                    stack.callback(ray.kill, engine)
        yield Engines(ours=ours, plain=services[NONE], stock=stock)


def run(config: RunConfig, options: Options, model: LengthModel) -> Results:
    """Start everything and measure, as often as it is to be started."""
    prepare(config, options)
    loads = make_loads(config, options, model)
    results = Results()
    for start in range(options.starts):
        print(
            f"starting two services of {config.engine.num_all_shards} shards, {start + 1} of {options.starts}",
            flush=True,
        )
        with engines_of(config, options, loads, start) as engines:
            SpeculationBench(engines, config, options, loads, start).run(results)
    return results


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
        both = copy.deepcopy(config)
        both.engine.num_groups *= 2
        start_ray(both)
        try:
            results = run(config, options, model)
        finally:
            ray.shutdown()
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    record = record_of(options, results)
    print(table(record))
    print(json.dumps({key: value for key, value in record.items() if isinstance(value, (int, float))}, indent=2))
    if options.out is not None:
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    if options.picture is not None:
        draw(results, record, Path(options.picture))
    return 0


if __name__ == "__main__":
    sys.exit(main())
