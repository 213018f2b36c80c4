"""Does the simulator predict what engines of this machine take? ``python -m launch.simulate_bench [options …]``

    python -m launch.simulate_bench [groups=16] [slots=4] [costs=steps.json] [out=PATH] [experiment=tiny_grpo] [more …]

Engines are started once. Steps of several batches, contexts and prefills are timed on them and fitted
(rollout.simulate.measured); then a heavy-tailed load, that of launch.bench_rollout, goes through the service under each
policy, and through the simulator with the fitted costs, times the pace of the machine just before and after. Printed
are both makespans and `error`, predicted over measured less 1; exit code 0 if every one lies within `within`. `costs`
keeps the steps for launch.simulate costs=….
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray

from actors.service import Service, start_service
from launch.arguments import split_arguments
from launch.bench_rollout import BLOCK_TOKENS, LENGTHS, PROMPT_TOKENS
from launch.cluster import model_path, start_ray
from launch.compose import compose
from launch.hidden_lengths import with_lengths
from launch.rollout_load import Load, uniform_load
from launch.rollout_run import Run, clear_caches, policy_of, serve
from launch.rollout_turns import Loads, make_loads, scheduler_of
from launch.rollout_turns import Options as BenchOptions
from rollout.config import RunConfig
from rollout.errors import InvalidRequest, LongrollError
from rollout.simulate.lengths import GroupWork, LengthModel
from rollout.simulate.measured import FitError, MeasuredCosts, MeasuredStep
from rollout.simulate.scenario import POLICIES, Scenario, check_policies
from rollout.simulate.simulation import Simulation
from rollout.types import Chunk, ChunkResult, SamplingParams

CONTEXTS = (32, 512, 1024, 2048)  # prompts that are prefilled and then decoded
STEP_TOKENS = 64  # decoded after each
TURNS = 2  # each size is timed so many times, the sizes taking turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is compared.

    Attributes:
        policies: Which.
        groups, n, slots, ahead, chunk_tokens, max_tokens: As in launch.bench_rollout.
        repeats: Loads that each policy serves; the median is compared.
        first_seed: Of the first load.
        within: Largest error that passes.
        costs: JSON file for the measured steps.
        out: JSON file for the result.
    """

    policies: tuple[str, ...] = POLICIES
    groups: int = 16
    n: int = 8
    slots: int = 4
    ahead: int = 1
    chunk_tokens: int = 128
    max_tokens: int = 2048
    repeats: int = 1
    first_seed: int = 1
    within: float = 0.15
    costs: str | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        check_policies(self.policies)
        if self.within <= 0:
            raise InvalidRequest("within", self.within, "a number > 0")
        _ = self.bench  # refuses what the bench refuses, before anything is started

    @property
    def bench(self) -> BenchOptions:
        """The same for the parts of the bench."""
        return BenchOptions(
            groups=self.groups,
            n=self.n,
            slots=self.slots,
            ahead=self.ahead,
            chunk_tokens=self.chunk_tokens,
            max_tokens=self.max_tokens,
            repeats=self.repeats,
            first_seed=self.first_seed,
            uniform_tokens=0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One policy: seconds that its loads took, and that they were predicted to take."""

    policy: str
    measured_s: tuple[float, ...]
    predicted_s: tuple[float, ...]

    @property
    def error(self) -> float:
        """Median over the loads of predicted over measured, less 1."""
        return statistics.median(p / m for p, m in zip(self.predicted_s, self.measured_s, strict=True)) - 1


def measure_steps(service: Service, slots: int, max_model_len: int) -> list[MeasuredStep]:
    """Time steps of every size on all shards at once, as in the bench; the mean over shards of each."""
    draw = random.Random(0)
    contexts = [tokens for tokens in CONTEXTS if tokens + STEP_TOKENS <= max_model_len]
    sizes = [(batch, tokens) for batch in range(1, slots + 1) for tokens in contexts]
    steps: list[MeasuredStep] = []
    for turn in range(TURNS + 1):
        for batch, tokens in sizes:
            found = time_steps(service, draw, batch, tokens)
            steps += found if turn else []  # the first steps of a size compile
    return steps


def time_steps(service: Service, draw: random.Random, batch: int, prompt_tokens: int) -> Iterator[MeasuredStep]:
    """Prefill and decode `batch` prompts on each shard; a step of each kind."""
    vocabulary = service.infos[0].vocab_size
    asked = []
    for shard in service.shards:
        for i in range(batch):
            prompt = tuple(draw.randrange(vocabulary) for _ in range(prompt_tokens))  # in no cache
            asked.append(shard.generate.remote(_chunk(f"step/{i}", prompt)))
    results: list[ChunkResult] = ray.get(asked)
    # While others are prefilled, those that decode wait: the last to begin saw decoding steps only. Not the very last
    # alone: where the process that reads tokens is held up, a first token is seen with those that follow it.
    decode_s = sorted((r.duration_s - r.ttft_s) / (STEP_TOKENS - 1) for r in results)
    last_s = statistics.median(decode_s[: -(-len(decode_s) // 4)])
    return iter(
        [
            MeasuredStep(batch=batch, context_tokens=batch * (prompt_tokens + STEP_TOKENS // 2), step_s=last_s),
            MeasuredStep(
                batch=0,
                context_tokens=0,
                prefill_tokens=batch * prompt_tokens,
                step_s=statistics.fmean(sorted(r.ttft_s for r in results)[-len(service.shards) :]),
            ),
        ]
    )


def measure_pace(service: Service, slots: int, costs: MeasuredCosts) -> float:
    """How many times as long as fitted steps take just now; the median of some decoding steps of each end of the sizes.

    Machines that are shared change by tens of per cent within minutes, which is not what the simulator is to predict.
    """
    draw = random.Random(0)
    found = [next(time_steps(service, draw, batch, CONTEXTS[0])) for _ in range(TURNS) for batch in (1, slots)]
    return statistics.median(step.step_s / costs.step_s(step) for step in found)


def _chunk(name: str, prompt: tuple[int, ...]) -> Chunk:
    return Chunk(
        trajectory_id=name,
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        max_tokens=STEP_TOKENS,
        seed=1,
        sampling=SamplingParams(max_tokens=STEP_TOKENS, ignore_eos=True),
    )


def turnaround_s(run: Run) -> float:
    """Seconds from the end of a chunk on its engine until the next one is there, where none has to wait."""
    gaps = []
    for trajectory in (t for group in run.groups for t in group.trajectories):
        record = trajectory.metadata
        outside_s = record["total_s"] - record["queue_s"] - record["generate_s"]
        gaps.append(outside_s / len(record["shards"]))
    return max(0.0, statistics.median(gaps))


def work_of(load: Load) -> list[GroupWork]:
    """What the simulator is told of a load."""
    asked = load.request
    return [
        GroupWork(
            group_id=group_id,
            prompt_tokens=len(prompt.token_ids),
            output_tokens=tuple(load.lengths[f"{group_id}/{i}"] for i in range(asked.n_samples_per_prompt)),
        )
        for group_id, prompt in zip(asked.group_ids, asked.prompts, strict=True)
    ]


def scenario_of(service: Service, config: RunConfig, options: Options, load: Load, turnaround: float) -> Scenario:
    """The service as the simulator sees it."""
    return Scenario(
        gpus=len(service.infos),
        shards_per_group=config.engine.num_shards,
        prompts=options.groups,
        n_samples_per_prompt=options.n,
        prompt_tokens=max(len(prompt.token_ids) for prompt in load.request.prompts),
        output_tokens=options.max_tokens,
        chunk_tokens=options.chunk_tokens,
        max_running=options.slots,
        ahead=options.ahead,
        kv_tokens=service.infos[0].kv_tokens,
        block_tokens=service.infos[0].block_tokens,
        max_batched_tokens=config.engine.max_num_batched_tokens,
        turnaround_s=turnaround,
    )


def compare_policies(
    service: Service, config: RunConfig, options: Options, loads: Loads, costs: MeasuredCosts
) -> tuple[list[Comparison], float]:
    """Serve and simulate every load under every policy; also returns the turnaround that was measured."""
    num_slots, kv_tokens = options.slots * len(service.shards), service.infos[0].kv_tokens
    measured: dict[str, list[float]] = {policy: [] for policy in options.policies}
    predicted: dict[str, list[float]] = {policy: [] for policy in options.policies}
    turnaround = 0.0
    with tempfile.TemporaryDirectory(prefix="longroll-simulate-") as directory:
        for policy in options.policies:
            scheduler = scheduler_of(config.scheduler, options.bench, policy)
            with policy_of(service, policy, scheduler, config.journal, Path(directory)) as client:
                calm = _calm(loads, options)
                serve(client, loads.warm_up, "warm-up", num_slots)
                turnaround = turnaround_s(serve(client, calm, "calm", num_slots))
                for number, load in enumerate(loads.heavy):
                    before = measure_pace(service, options.slots, costs)
                    clear_caches(service, ())
                    taken = serve(client, load, f"heavy-{number}", num_slots).timeline.makespan_s
                    scenario = scenario_of(service, config, options, load, turnaround)
                    pace = (before + measure_pace(service, options.slots, costs)) / 2
                    run = Simulation(scenario, policy, costs.scaled(pace), kv_tokens, work_of(load)).run()
                    measured[policy].append(taken)
                    predicted[policy].append(run.outcome.makespan_s)
                    told = f"took {taken:>6.2f} s, predicted {run.outcome.makespan_s:>6.2f} s at pace {pace:.2f}"
                    print(f"  {policy:<8} {told}", flush=True)
    found = [
        Comparison(policy=policy, measured_s=tuple(measured[policy]), predicted_s=tuple(predicted[policy]))
        for policy in options.policies
    ]
    return found, turnaround


def _calm(loads: Loads, options: Options) -> Load:
    """As many trajectories as there are slots on one shard, so that none waits."""
    prompts = loads.warm_up.request.prompts[:1]
    return uniform_load(prompts, options.slots, run_seed=7, num_tokens=4 * options.chunk_tokens)


def table(found: Sequence[Comparison], fit: FitError, turnaround: float) -> str:
    """One line a policy."""
    rows = [
        f"fit of {fit.num_steps} steps: {fit.mean_relative:.1%} off on average, p95 {fit.p95_relative:.1%}; "
        f"{turnaround * 1e3:.1f} ms between chunks",
        f"{'policy':<10} {'measured':>9} {'predicted':>9}   error",
    ]
    for one in found:
        measured, predicted = statistics.median(one.measured_s), statistics.median(one.predicted_s)
        rows.append(f"{one.policy:<10} {measured:>7.2f} s {predicted:>7.2f} s   {one.error:+.1%}")
    return "\n".join(rows)


def run(config: RunConfig, options: Options, model: LengthModel) -> dict[str, Any]:
    """Start the engines, measure, simulate; returns the record."""
    config.engine.max_num_seqs = options.slots
    config.scheduler.max_running_per_shard = options.slots
    config.engine.block_size = config.engine.block_size or BLOCK_TOKENS
    config.model.max_model_len = max(config.model.max_model_len, options.max_tokens + PROMPT_TOKENS)
    loads = make_loads(config, options.bench, model)
    print(f"starting {config.engine.num_all_shards} shards of {options.slots} slots", flush=True)
    parts = config.model, config.engine, config.scheduler, config.sync, config.cluster
    with start_service(*parts, shard_class=with_lengths(loads.lengths)) as service:
        print("timing steps", flush=True)
        steps = measure_steps(service, options.slots, config.model.max_model_len)
        if options.costs is not None:
            Path(options.costs).write_text(json.dumps([asdict(step) for step in steps], indent=1) + "\n")
        costs = MeasuredCosts(steps)
        found, turnaround = compare_policies(service, config, options, loads, costs)
    print(table(found, costs.error, turnaround))
    return {
        "error": {one.policy: one.error for one in found},
        "max_error": max(abs(one.error) for one in found),
        "turnaround_s": turnaround,
        "fit_error": asdict(costs.error),
        "policies": [asdict(one) for one in found],
        "options": asdict(options),
        "steps": [asdict(step) for step in steps],
    }


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
        config = compose(overrides)
        config.model.path = model_path(config.model.path)
        start_ray(config)
        try:
            record = run(config, options, model)
        finally:
            ray.shutdown()
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(json.dumps({name: record[name] for name in ("error", "max_error", "turnaround_s")}, indent=2))
    if options.out is not None:
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    return 0 if record["max_error"] <= options.within else 1


if __name__ == "__main__":
    sys.exit(main())
