"""What the gateway costs: the same engine asked directly and over HTTP, in turns.

    python -m launch.bench_gateway                     # 32 streams on the embedded model, one shard
    python -m launch.bench_gateway streams=8 rounds=7 output_tokens=256 out=gateway.json

Direct is vLLM's AsyncLLM in the shard's own process, whose streams are read there token by token; HTTP is a client on
this machine, through gateway, controller and shard. Lengths vary around `output_tokens`, the same for both, since
streams that end together would begin together ever after, and wait for each other. Rounds of both alternate, so that
whatever else the machine does falls on both; `gateway_ratio` is the median over the rounds of the throughput over HTTP
divided by the mean of the direct rounds before and after it. The client's own work counts against the gateway where
cores are few.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray

from actors.gateway import start_gateway
from actors.gateway_app import GatewayOptions
from actors.service import start_service
from actors.shard import Shard
from actors.shard_requests import sampling_params
from launch.arguments import split_arguments
from launch.cluster import model_path, start_ray
from launch.compose import compose, model_directory
from launch.http_load import Ask, Target, random_asks
from launch.load_runs import closed_loop
from launch.load_statistics import quantile
from launch.serving_target import NO_TARGETS
from rollout.config import RunConfig
from rollout.errors import InvalidRequest, LongrollError
from rollout.gateway.keys import KeyFile, Role
from rollout.streaming import TokenStream
from rollout.types import Chunk, SamplingParams

MAX_RATIO_LOSS = 0.10
MAX_ADDED_TTFT_MS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is measured.

    Attributes:
        streams: Requests under way at once.
        requests: Of one round; None = four for each stream.
        prompt_tokens, output_tokens: Of a request; outputs have half to one and a half times as many.
        rounds: Over HTTP; there is one more of direct ones, as each HTTP round lies between two.
        out: JSON file for the figures.
    """

    streams: int = 32
    requests: int | None = None
    prompt_tokens: int = 64
    output_tokens: int = 128
    rounds: int = 5
    out: str | None = None

    def __post_init__(self) -> None:
        for name in ("streams", "prompt_tokens", "output_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise InvalidRequest(name, getattr(self, name), "an integer ≥ 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round: tokens in a second, and the median time to first token in milliseconds."""

    tokens_per_s: float
    ttft_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayCost:
    """The figures.

    Attributes:
        gateway_ratio: Throughput over HTTP over that of the direct engine.
        added_ttft_ms: Median time to first token over HTTP less that of the direct engine, median over the rounds.
        direct, http: The rounds in order.
    """

    gateway_ratio: float
    added_ttft_ms: float
    direct: tuple[Round, ...]
    http: tuple[Round, ...]

    @property
    def is_within_limits(self) -> bool:
        return self.gateway_ratio >= 1 - MAX_RATIO_LOSS and self.added_ttft_ms <= MAX_ADDED_TTFT_MS


def cost_of(direct: Sequence[Round], http: Sequence[Round]) -> GatewayCost:
    """The figures of rounds that alternated: direct, HTTP, direct, …, direct."""
    if len(direct) != len(http) + 1:
        raise InvalidRequest("rounds", f"{len(direct)} direct, {len(http)} HTTP", "one more direct than HTTP")
    around = list(pairwise(direct))
    ratios = [
        one.tokens_per_s / statistics.mean((before.tokens_per_s, after.tokens_per_s))
        for one, (before, after) in zip(http, around, strict=True)
    ]
    added = [
        one.ttft_ms - statistics.mean((before.ttft_ms, after.ttft_ms))
        for one, (before, after) in zip(http, around, strict=True)
    ]
    return GatewayCost(
        gateway_ratio=statistics.median(ratios),
        added_ttft_ms=statistics.median(added),
        direct=tuple(direct),
        http=tuple(http),
    )


class DirectShard(Shard):
    """A shard whose engine can be asked in its own process."""

    async def direct(self, asks: Sequence[Ask], streams: int) -> Round:
        """Stream all requests, so many at once, straight from AsyncLLM."""
        waiting, firsts, num_tokens = iter(list(enumerate(asks))), [], 0
        began = time.perf_counter()

        async def one_after_another() -> None:
            nonlocal num_tokens
            for number, ask in waiting:
                first, got = await self._one(f"direct-{began}-{number}", ask)
                firsts.append(first)
                num_tokens += got

        await asyncio.gather(*(one_after_another() for _ in range(streams)))
        return Round(tokens_per_s=num_tokens / (time.perf_counter() - began), ttft_ms=1e3 * quantile(firsts, 0.5))

    async def _one(self, request_id: str, ask: Ask) -> tuple[float, int]:
        from vllm.inputs import tokens_input

        sampling = SamplingParams(max_tokens=ask.max_tokens, ignore_eos=True)
        chunk = Chunk(
            trajectory_id=request_id,
            token_ids=ask.prompt_token_ids,
            num_prompt_tokens=len(ask.prompt_token_ids),
            max_tokens=ask.max_tokens,
            seed=ask.seed,
            sampling=sampling,
            stream=TokenStream(subscriber="direct", stream_id=request_id),
        )
        params = sampling_params(chunk, self._stop_token_ids, self._extra_args(chunk, request_id))
        prompt = tokens_input(list(ask.prompt_token_ids))  # as the shard gives its prompts
        began, first_s, num_tokens = time.perf_counter(), 0.0, 0
        async for output in self._engine.generate(prompt, params, request_id):
            first_s = first_s or time.perf_counter() - began
            num_tokens += len(output.outputs[0].token_ids)
        return first_s, num_tokens


def over_http(target: Target, asks: Sequence[Ask], streams: int) -> Round:
    """Stream all requests, so many at once, from the gateway. Raises LongrollError if one fails."""
    began = time.perf_counter()
    outcomes = asyncio.run(closed_loop(target, asks, streams))
    took_s = time.perf_counter() - began
    bad = [one for one in outcomes if not one.is_good]
    if bad:
        raise LongrollError(f"gateway: got {len(bad)} failures ({bad[0].error or bad[0].status}), expected none")
    firsts = [one.ttft_s for one in outcomes if one.ttft_s is not None]
    return Round(tokens_per_s=sum(one.num_tokens for one in outcomes) / took_s, ttft_ms=1e3 * quantile(firsts, 0.5))


def measure(shard: Any, target: Target, options: Options) -> GatewayCost:
    """Alternate rounds, after one of each that is not counted."""
    num_requests = options.requests or 4 * options.streams

    def asks(number: int) -> list[Ask]:
        draw, most = random.Random(number), options.output_tokens + options.output_tokens // 2
        some = random_asks(num_requests, options.prompt_tokens, options.output_tokens, str(number))
        return [replace(ask, max_tokens=draw.randint(most // 3, most)) for ask in some]

    def direct(number: int) -> Round:
        found: Round = ray.get(shard.direct.remote(asks(number), options.streams))
        print(f"direct {found.tokens_per_s:7.0f} tokens/s, first token after {found.ttft_ms:5.1f} ms", flush=True)
        return found

    def http(number: int) -> Round:
        found = over_http(target, asks(number), options.streams)
        print(f"HTTP   {found.tokens_per_s:7.0f} tokens/s, first token after {found.ttft_ms:5.1f} ms", flush=True)
        return found

    direct(1000), http(1001)
    directs, https = [direct(0)], []
    for number in range(options.rounds):
        https.append(http(2 * number + 1))
        directs.append(direct(2 * number + 2))
    return cost_of(directs, https)


def run(config: RunConfig, options: Options) -> int:
    """Start one shard and its gateway and measure. Returns 0 if the cost is within limits, else 1."""
    model_directory(config.model.path)
    name, config.model.path = config.model.path, model_path(config.model.path)
    start_ray(config)
    try:
        with tempfile.TemporaryDirectory() as folder:
            keys_file = Path(folder) / "keys.json"
            key = KeyFile(keys_file).add("bench", Role.CLIENT)
            parts = config.model, config.engine, config.scheduler, config.sync, config.cluster
            with start_service(*parts, shard_class=DirectShard) as service:
                told = GatewayOptions(
                    gateway=config.gateway,
                    model=config.model,
                    sync=config.sync,
                    model_name=name,
                    keys_file=str(keys_file),
                    namespace=service.namespace,
                )
                gateway = start_gateway(told)
                cost = measure(service.shards[0], Target(url=gateway.url, key=key, model=name), options)
                gateway.stop()
    finally:
        ray.shutdown()
    print(f"gateway_ratio {cost.gateway_ratio:.3f}, added median TTFT {cost.added_ttft_ms:.1f} ms")
    if options.out is not None:
        Path(options.out).write_text(json.dumps(asdict(cost), indent=2) + "\n")
    return 0 if cost.is_within_limits else 1


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, overrides = split_arguments(Options, arguments)
        without_targets = [f"{name}={value}" for name, value in NO_TARGETS.items()]  # nothing is to be refused
        return run(compose(["engine.num_shards=1", "gateway.port=0", *without_targets, *overrides]), options)
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
