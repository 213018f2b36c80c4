"""Weight sync under load: how long decoding stalls, how much travels, how fast, and what faults do to it.

    python -m launch.bench_sync [experiment=tiny_grpo_int4] [steps=10] [faults=200] [out=PATH] [overrides …]

Four parts, each of which can be left out (parts=stall,recompute,bandwidth,faults):

- stall: real optimizer steps on real rollouts, each published while other generations run, with KV kept;
  `stall_steps_p99` is the longest pause between two steps of a shard during a publication, in median steps of
  the same shard without one (`quiet_steps` the same of the second before), and `bytes_ratio` what travelled after the
  first publication against the model in bfloat16;
- recompute: the same publications with running requests prefilled again (sync.recompute_kv), for comparison;
- bandwidth: all bytes of a random model of 150-300 M parameters from a sender into the checked shadows of two
  shards, against a memory copy of as many bytes in the same run, alternating (`bandwidth_ratio`);
- faults: publications that are damaged in every way a sender can damage one, while generations run; no forward
  may mix versions or run under one that was refused, and no trajectory may be lost.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray

from launch.arguments import split_arguments
from launch.cluster import model_path, start_ray
from launch.compose import compose
from launch.sync_bandwidth import bandwidth
from launch.sync_faults import faults
from launch.sync_stall import stall
from rollout.config import RunConfig
from rollout.errors import InvalidRequest, LongrollError

PARTS = ("stall", "recompute", "bandwidth", "faults")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is measured.

    Attributes:
        parts: Of the four.
        steps: Optimizer steps that are published.
        faults: Damaged publications.
        repeats: Full publications of the large model, each beside a memory copy.
        out: JSON file for the result.
    """

    parts: tuple[str, ...] = PARTS
    steps: int = 10
    faults: int = 200
    repeats: int = 5
    out: str | None = None


def run(config: RunConfig, options: Options) -> dict[str, Any]:
    """The parts that were asked for; each starts and stops its own engines."""
    record: dict[str, Any] = {"options": asdict(options)}
    if "stall" in options.parts:
        result = stall(config, options.steps, recompute_kv=False)
        record["stall"] = asdict(result)
        record |= {"stall_steps_p99": result.stall_steps_p99, "bytes_ratio": result.bytes_ratio}
    if "recompute" in options.parts:
        record["recompute"] = asdict(stall(config, options.steps, recompute_kv=True))
    if "bandwidth" in options.parts:
        moved = bandwidth(config, options.repeats)
        record["bandwidth"] = asdict(moved)
        record["bandwidth_ratio"] = moved.bandwidth_ratio
    if "faults" in options.parts:
        injected = faults(config, options.faults)
        record["faults"] = asdict(injected)
        record |= {"mixed_versions": injected.num_mixed, "trajectories_lost": injected.num_lost}
    return record


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, overrides = split_arguments(Options, arguments)
        unknown = [part for part in options.parts if part not in PARTS]
        if unknown:
            raise InvalidRequest("parts", unknown[0], f"some of {', '.join(PARTS)}")
        if not any(override.startswith("experiment=") for override in overrides):
            overrides = ["experiment=tiny_grpo_int4", *overrides]
        config = compose(overrides)
        config.model.path = model_path(config.model.path)
        start_ray(config)
        try:
            record = run(config, options)
        finally:
            ray.shutdown()
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(json.dumps({key: value for key, value in record.items() if not isinstance(value, dict)}, indent=2))
    for part in options.parts:
        print(part, json.dumps(record[part]))
    if options.out is not None:
        Path(options.out).write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
