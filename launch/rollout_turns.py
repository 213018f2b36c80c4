"""The loads of the rollout bench, and the ways of serving them taking turns. A part of launch.bench_rollout.

Owns the order of everything and the check that all ways give the same tokens.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.service import Service
from launch.near_ties import Difference, compare, near_tie
from launch.rollout_load import Load, heavy_loads, uniform_load
from launch.rollout_run import Run, Timeline, clear_caches, policy_of, serve, serve_plain, serve_stock
from launch.workload import Workload
from rollout.client import RolloutClient
from rollout.config import RunConfig, SchedulerConfig
from rollout.errors import InvalidRequest, LongrollError
from rollout.simulate.lengths import LengthModel

POLICIES = ("static", "partial", "divided")
OURS, STOCK = "divided", "vllm"
PLAIN, PLAIN_AGAIN = "plain", "plain 2"
WARM_UP_TOKENS = 16
Serve = Callable[[Load, str], Run]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is measured.

    Attributes:
        groups, n: Groups of a load and members of each.
        slots: Sequences that one shard decodes together.
        ahead: Chunks that wait in the engine beyond these, so that a slot need not wait for the controller.
        chunk_tokens: At which policy divided cuts.
        max_tokens: Where generations are cut off.
        visits: Of each prompt, of which the last is measured; the earlier ones tell about its length.
        uniform_tokens: Length of every trajectory of the uniform load; 0 leaves that part out.
        repeats: Of everything, each with other prompts and seeds.
        stock: Whether plain vLLM takes part, on as many engines of its own.
        first_seed: Of the first repeat.
        out: JSON file for the result.
        trace: JSONL file for the lengths of the first repeat, which launch.simulate can replay.
        picture: PNG file for the timelines of the repeat with the median speed-up.
    """

    groups: int = 16
    n: int = 8
    slots: int = 4
    ahead: int = 1
    chunk_tokens: int = 128
    max_tokens: int = 2048
    visits: int = 2
    uniform_tokens: int = 256
    repeats: int = 3
    stock: bool = True
    first_seed: int = 1
    out: str | None = None
    trace: str | None = None
    picture: str | None = None

    def __post_init__(self) -> None:
        for name in ("groups", "n", "slots", "chunk_tokens", "max_tokens", "visits", "repeats"):
            if getattr(self, name) < 1:
                raise InvalidRequest(name, getattr(self, name), "an integer ≥ 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """One load through every way of serving it, with the differences of their tokens from those of the first."""

    timelines: dict[str, Timeline]
    lengths: list[int]
    differences: tuple[Difference, ...]

    def ratio(self, figure: str, over: str, under: str) -> float:
        """One way's figure over another's."""
        top, bottom = (float(getattr(self.timelines[name], figure)) for name in (over, under))
        return top / bottom if bottom else math.inf  # fewer than ten groups have no tail


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """All loads of a bench. A heavy-tailed one shares its prompts with their earlier visits, none with another load."""

    warm_up: Load
    earlier: list[list[Load]]
    heavy: list[Load]
    uniform: list[Load]

    @property
    def lengths(self) -> dict[str, int]:
        """At which trajectories end, of all loads."""
        every = itertools.chain(self.heavy, *self.earlier)
        return {name: length for load in every for name, length in load.lengths.items()}


def make_loads(config: RunConfig, options: Options, model: LengthModel) -> Loads:
    """Loads of every repeat, numbered through the workload's prompts."""
    workload = Workload(config.workload, config.model, config.trainer.seed)
    groups, n = options.groups, options.n
    batches = (workload.batch(groups * i, groups) for i in itertools.count())
    seeds = range(options.first_seed, options.first_seed + options.repeats)
    drawn = [
        heavy_loads(next(batches), n, run_seed=seed, model=model, max_tokens=options.max_tokens, visits=options.visits)
        for seed in seeds
    ]
    return Loads(
        warm_up=uniform_load(next(batches), n, run_seed=0, num_tokens=WARM_UP_TOKENS),
        earlier=[visits[:-1] for visits in drawn],
        heavy=[visits[-1] for visits in drawn],
        uniform=[
            uniform_load(next(batches), n, run_seed=seed, num_tokens=options.uniform_tokens)
            for seed in seeds
            if options.uniform_tokens
        ],
    )


class Bench:
    """Serves loads in turns.

    Args:
        service: Its shards do the work.
        config: Of the model.
        options: See `Options`.
        stock: Engines of plain vLLM.
    """

    def __init__(self, service: Service, config: RunConfig, options: Options, stock: Sequence[Any]) -> None:
        self._service, self._stock = service, stock
        self._within = near_tie(config.engine.dtype or config.model.dtype, 1.0)
        self.num_slots = options.slots * len(service.shards)

    def turn(self, load: Load, ways: Mapping[str, Serve], run_id: str) -> Repeat:
        """The load through all ways, one after the other.

        Raises:
            LongrollError: Two ways gave different tokens without a near tie.
        """
        runs: dict[str, Run] = {}
        for name, way in ways.items():
            clear_caches(self._service, self._stock)
            runs[name] = way(load, run_id)
            print(f"  {name:<8} {describe(runs[name].timeline)}", flush=True)
        first = next(run for run in runs.values() if run.groups)
        differences = [one for run in runs.values() if run.groups for one in self._differences(first, run)]
        return Repeat(
            timelines={name: run.timeline for name, run in runs.items()},
            lengths=sorted(len(t.token_ids) for group in first.groups for t in group.trajectories),
            differences=tuple(differences),
        )

    def _differences(self, one: Run, other: Run) -> list[Difference]:
        found = []
        for group, same in zip(one.groups, other.groups, strict=True):
            for a, b in zip(group.trajectories, same.trajectories, strict=True):
                difference = compare(
                    (a.token_ids, a.logprobs),
                    (b.token_ids, b.logprobs),
                    seed=a.seed,
                    num_prompt_tokens=len(a.prompt_token_ids),
                    temperature=1.0,
                    vocab_size=self._service.infos[0].vocab_size,
                    within=self._within,
                )
                if difference is not None and not difference.is_near_tie:
                    raise LongrollError(f"bench: {a.trajectory_id} differs between policies at {difference}")
                found += [difference] if difference is not None else []
        return found


def describe(timeline: Timeline) -> str:
    return (
        f"makespan {timeline.makespan_s:>6.2f} s   tail {timeline.tail_s:>6.2f} s   "
        f"first group {timeline.group_ends_s[0]:>5.2f} s   slots used {timeline.utilisation:>4.0%}   "
        f"{timeline.tokens_per_s:>6,.0f} tokens/s   {sum(b.num_chunks for b in timeline.bars):>5} chunks"
    )


def quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """Lengths at shares of the trajectories, which are in order."""
    return {f"p{p}": lengths[min(len(lengths) - 1, p * len(lengths) // 100)] for p in (5, 25, 50, 75, 90, 95, 100)}


def measure(
    service: Service, config: RunConfig, options: Options, loads: Loads, stock_engines: Sequence[Any]
) -> tuple[list[Repeat], list[Repeat]]:
    """All repeats of the heavy-tailed load and of the uniform one."""
    bench = Bench(service, config, options, stock_engines)
    heavy: list[Repeat] = []
    uniform: list[Repeat] = []
    with tempfile.TemporaryDirectory(prefix="longroll-bench-") as directory, ExitStack() as stack:
        clients: dict[str, RolloutClient] = {}
        for policy in POLICIES:
            scheduler = scheduler_of(config.scheduler, options, policy)
            clients[policy] = stack.enter_context(
                policy_of(service, policy, scheduler, config.journal, Path(directory))
            )
        ways: dict[str, Serve] = {
            name: lambda load, run_id, client=client: serve(client, load, run_id, bench.num_slots)  # type: ignore[misc]
            for name, client in clients.items()
        }

        def plain(load: Load, run_id: str) -> Run:
            return serve_plain(service, load, bench.num_slots)

        stock: dict[str, Serve] = {}
        if stock_engines:
            stock[STOCK] = lambda load, run_id: serve_stock(stock_engines, load, bench.num_slots)
        print("warming up", flush=True)
        bench.turn(loads.warm_up, ways | {PLAIN: plain} | stock, "warm-up")
        for repeat, load in enumerate(loads.heavy):
            for visit, earlier in enumerate(loads.earlier[repeat], start=1):
                print(f"visit {visit} of the prompts of repeat {repeat + 1}", flush=True)
                bench.turn(earlier, {OURS: ways[OURS]}, f"visit-{repeat}-{visit}")
            print(f"heavy-tailed lengths, repeat {repeat + 1}", flush=True)
            heavy.append(bench.turn(load, rotated(ways | stock, repeat), f"heavy-{repeat}"))
            print(f"  lengths {quantiles(heavy[-1].lengths)}", flush=True)
        for repeat, load in enumerate(loads.uniform):
            print(f"{options.uniform_tokens} tokens each, repeat {repeat + 1}", flush=True)
            around = {PLAIN: plain, OURS: ways[OURS], PLAIN_AGAIN: plain}
            uniform.append(bench.turn(load, stock | around if repeat % 2 else around | stock, f"uniform-{repeat}"))
    return heavy, uniform


def scheduler_of(base: SchedulerConfig, options: Options, policy: str) -> SchedulerConfig:
    """The configuration of one policy's controller."""
    return replace(
        base,
        policy=policy,
        chunk_tokens=options.chunk_tokens if policy == OURS else None,
        max_running_per_shard=options.slots + options.ahead,
    )


def rotated(ways: Mapping[str, Serve], by: int) -> dict[str, Serve]:
    """The same ways, beginning with another one, and every other time round in reverse.

    So none always follows another: whoever follows a way on the same engines finds them warm.
    """
    rounds, by = divmod(by, len(ways))
    names = list(ways)
    names = names[by:] + names[:by]
    return {name: ways[name] for name in (names[::-1] if rounds % 2 else names)}
