"""Where the time to the first token goes, from the client's request to the operators of its step.

    python -m launch.first_token [profile=true] [prompt_tokens=64] [repeats=20] [traces=runs/first_token] [out=PATH]
        [overrides …]

Starts the service of the overrides (experiment=tiny_grpo unless told otherwise) with its gateway and, idle otherwise,
sends prompts that no prefix is cached of, in turns over HTTP and straight to a shard. The difference of the medians is
what gateway, controller and their messages take. With profile=true PyTorch's profiler then records the workers while
single requests are made; the traces stay in `traces` (open them in Perfetto), and the table divides the engine's share
by the kinds of operators in the step that computes the prompt. Recording slows a step down, so that the step's parts
are scaled to the share of the engine's time that they had in the trace.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray

from actors.gateway import start_gateway
from actors.gateway_app import GatewayOptions
from actors.service import Service, start_service
from launch.arguments import split_arguments
from launch.cluster import model_path, run_directory, start_ray
from launch.compose import compose
from launch.hardware import hardware_line
from launch.http_load import Ask, Target, random_asks
from launch.load_runs import closed_loop
from launch.serve import first_key, names_of
from launch.trace_table import prompt_steps, read_trace, table
from rollout.config import RunConfig
from rollout.errors import LongrollError
from rollout.types import Chunk, SamplingParams

GATEWAY, OUTSIDE = "gateway, controller and messages", "engine outside its step"
NUM_RECORDED = 3  # requests in a trace, of which the last is looked at: the first finds the profiler cold
TRACES = "*.pt.trace.json*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is measured.

    Attributes:
        profile: Record the workers' operators as well.
        prompt_tokens: Of every request.
        repeats: Requests each way.
        traces: Directory of the traces, emptied of former ones.
        out: JSON file.
    """

    profile: bool = True
    prompt_tokens: int = 64
    repeats: int = 20
    traces: str = "runs/first_token"
    out: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A service with its gateway."""

    service: Service
    target: Target


@contextmanager
def running(config: RunConfig) -> Iterator[Running]:
    """Start service and gateway; stop both."""
    names = names_of(config)
    key = first_key(names.keys_file)
    assert key is not None, "the run directory is new"
    config.model.path = model_path(config.model.path)
    start_ray(config)
    try:
        with start_service(config.model, config.engine, config.scheduler, config.sync, config.cluster) as service:
            gateway = start_gateway(
                GatewayOptions(
                    gateway=config.gateway,
                    model=config.model,
                    sync=config.sync,
                    model_name=names.model,
                    keys_file=str(names.keys_file),
                    namespace=service.namespace,
                )
            )
            try:
                yield Running(service=service, target=Target(url=gateway.url, key=key, model=names.model))
            finally:
                gateway.stop()
    finally:
        ray.shutdown()


def over_http(target: Target, ask: Ask) -> float:
    """Seconds to the first token, as a client sees it. Raises LongrollError if none came."""
    (outcome,) = asyncio.run(closed_loop(target, [ask], 1))
    if outcome.ttft_s is None:
        raise LongrollError(f"gateway: got {outcome.error or outcome.status}, expected a first token")
    return outcome.ttft_s


def straight(shard: Any, ask: Ask) -> float:
    """Seconds for one token from a shard, as a process on its host sees it."""
    sampling = SamplingParams(max_tokens=1, temperature=1.0, ignore_eos=True)
    chunk = Chunk(
        trajectory_id=f"first:{ask.seed}",
        token_ids=ask.prompt_token_ids,
        num_prompt_tokens=len(ask.prompt_token_ids),
        max_tokens=1,
        seed=ask.seed,
        sampling=sampling,
    )
    began = time.perf_counter()
    ray.get(shard.generate.remote(chunk))
    return time.perf_counter() - began


def measure(run: Running, options: Options) -> tuple[float, float]:
    """Medians over HTTP and straight, in seconds, in turns."""
    asks = iter(random_asks(2 * (options.repeats + 3), options.prompt_tokens, 1, seed="path"))
    http, direct = [], []
    for _ in range(options.repeats + 3):
        http.append(over_http(run.target, next(asks)))
        direct.append(straight(run.service.shards[0], next(asks)))
    return statistics.median(http[3:]), statistics.median(direct[3:])


def record(run: Running, options: Options, folder: Path) -> tuple[dict[str, float], float]:
    """Parts of the step that computes a prompt, and how long the engine took for it, both while it was recorded."""
    asks = random_asks(NUM_RECORDED, options.prompt_tokens, 1, seed="recorded")
    for path in folder.glob(TRACES):
        path.unlink()
    ray.get([shard.profile.remote(True) for shard in run.service.shards])
    took = [straight(run.service.shards[0], ask) for ask in asks]
    ray.get([shard.profile.remote(False) for shard in run.service.shards])
    for path in sorted(folder.glob(TRACES)):
        events = read_trace(path)
        if steps := prompt_steps(events):
            return table(events, steps[-1].start_us, steps[-1].end_us), took[-1]
    raise LongrollError(f"profiler: got no trace of a prompt's step in {folder}, expected one")


def parts_ms(http_s: float, direct_s: float, step_ms: Mapping[str, float], recorded_s: float) -> dict[str, float]:
    """Milliseconds of each part; they add up to the time to first token.

    Args:
        http_s, direct_s: Medians, not recorded.
        step_ms: Parts of a recorded step; empty without a profile.
        recorded_s: The engine's time for the request of that step.
    """
    parts = {GATEWAY: 1e3 * (http_s - direct_s)}
    scale = direct_s / recorded_s if recorded_s else 1.0
    inside = {name: scale * milliseconds for name, milliseconds in step_ms.items()}
    return parts | inside | {OUTSIDE: 1e3 * direct_s - sum(inside.values())}


def lines(ttft_ms: float, parts: Mapping[str, float]) -> str:
    """The table, as text."""
    rows = [f"{name:<40} {value:8.2f} ms {value / ttft_ms:6.1%}" for name, value in parts.items()]
    return "\n".join([*rows, f"{'time to first token':<40} {ttft_ms:8.2f} ms"])


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, overrides = split_arguments(Options, arguments)
        folder = run_directory(options.traces)
        (folder / "keys.json").unlink(missing_ok=True)
        if not any(override.startswith("experiment=") for override in overrides):
            overrides = ["experiment=tiny_grpo", *overrides]
        config = compose([*overrides, f"run_dir={folder}", "gateway.port=0"])
        if options.profile:
            config.engine.vllm["profiler_config"] = {
                "profiler": "torch",
                "torch_profiler_dir": str(folder),
                "torch_profiler_with_stack": False,
                "ignore_frontend": True,
            }
        with running(config) as run:
            http_s, direct_s = measure(run, options)
            step_ms, recorded_s = record(run, options, folder) if options.profile else ({}, 0.0)
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    parts = parts_ms(http_s, direct_s, step_ms, recorded_s)
    print(lines(1e3 * http_s, parts))
    result = {"ttft_ms": 1e3 * http_s, "engine_ms": 1e3 * direct_s, "recorded_engine_ms": 1e3 * recorded_s}
    result |= {"parts_ms": parts, "recorded_step_ms": step_ms, "traces": str(folder)}  # type: ignore[dict-item]
    if options.out is not None:
        whole = result | {"hardware": hardware_line(), "options": asdict(options)}
        Path(options.out).write_text(json.dumps(whole, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
