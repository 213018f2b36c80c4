"""The parts of the speculation bench: each load through every way of serving it, in turns. A part of
launch.bench_speculation.

The ways are a service that drafts, the same service on engines that were started without drafting, and plain vLLM.
Owns the order of everything, what drafts with, and when weights are published; knows nothing of ratios. All ways of a
service must give the same tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import ray
import torch

from actors.service import Service
from launch.rollout_load import Load
from launch.rollout_run import Run, clear_caches, policy_of, serve, serve_plain, serve_stock
from launch.rollout_turns import OURS as POLICY
from launch.rollout_turns import Bench, Repeat, Serve, rotated, scheduler_of
from launch.speculation_loads import NOTICING, SETTLING, Loads, Options, corrupted_loads, tail_loads
from launch.speculation_pairs import Pair, pairs_of
from launch.speculation_useless import USELESS, publication
from rollout.config import RunConfig, SchedulerConfig
from rollout.governor.statistics import SpeculationRecord
from rollout.speculation_config import DraftPolicy

DRAFTING, NONE, ON_HOLD, STOCK, NGRAM = "speculation", "none", "on hold", "vllm", "vllm ngram"
SOURCES = ("clover2", "sibling")
"""That draft, except where a part is about one alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """What serves.

    Attributes:
        ours: A service whose engines draft.
        plain: The same without.
        stock: Engines of plain vLLM by way: as many as one expert-parallel group has.
    """

    ours: Service
    plain: Service
    stock: Mapping[str, Sequence[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A load through every way, and what drafting came to in each way that drafts, by W&B key.

    Attributes:
        start: Number of the engines' start.
    """

    repeat: Repeat
    drafts: dict[str, dict[str, float]]
    start: int = 0


@dataclass(slots=True, kw_only=True)
class Results:
    """Turns of every part, by repeat; dictionaries by the number of sequences. Owned by whoever asked for them.

    Attributes:
        tails, answers, heavy, worst: Of these loads.
        within: Useless drafts within one engine.
        vllm_ngram: Tokens of the tails by vLLM's prompt look-up: all, and those that were accepted drafts; zeros if it
            took no part.
        settled: Of the draft before it was corrupted.
        alarm_tokens: That the longest trajectories had generated when the corrupted draft was noticed, by start of the
            engines; None where it was not.
        corrupted, corrupted_within: Afterwards; the latter within one engine.
    """

    tails: dict[int, list[Turn]] = field(default_factory=dict)
    answers: list[Turn] = field(default_factory=list)
    heavy: list[Turn] = field(default_factory=list)
    worst: dict[int, list[Turn]] = field(default_factory=dict)
    within: dict[int, list[Pair]] = field(default_factory=dict)
    vllm_ngram: tuple[int, int] = (0, 0)
    settled: list[Turn] = field(default_factory=list)
    alarm_tokens: list[int | None] = field(default_factory=list)
    corrupted: list[Turn] = field(default_factory=list)
    corrupted_within: list[Pair] = field(default_factory=list)


class SpeculationBench:
    """Measures part by part.

    Args:
        engines: See `Engines`.
        config: Of both services; its speculation is that of ours.
        options: See `Options`.
        loads: See `Loads`.
        start: Number of the engines' start.
    """

    def __init__(self, engines: Engines, config: RunConfig, options: Options, loads: Loads, start: int = 0) -> None:
        self._start = start
        self._ours, self._plain, self._stock = engines.ours, engines.plain, engines.stock
        self._config, self._options, self._loads = config, options, loads
        everybody = replace(engines.ours, shards=[*engines.ours.shards, *engines.plain.shards])
        stock = [engine for some in engines.stock.values() for engine in some]
        self._bench = Bench(everybody, config, options.rollouts(), stock)
        self._drafts: dict[str, dict[str, float]] = {}  # of the turn under way

    def run(self, results: Results) -> None:
        """All parts that were asked for, added to the results."""
        parts: dict[str, Callable[[Results], None]] = {
            "tail": self._tails,
            "answers": self._answers,
            "rollout": self._rollouts,
            "worst": self._worst,
            "corrupted": self._corrupted,
        }
        print("warming up", flush=True)
        ways = {DRAFTING: self._directly(self._ours, SOURCES), NONE: self._directly(self._plain), **self._stock_ways()}
        self._turn(self._loads.warm_up, ways, 0, "warm-up")
        for name, measure in parts.items():
            if name in self._options.parts:
                measure(results)

    def _tails(self, results: Results) -> None:
        whole = SchedulerConfig().chunk_tokens or 0  # of no tail more than one: they are shorter
        before = self._vllm_ngram()
        with self._through_controllers("tail", max(self._options.tails), is_group=True, chunk_tokens=whole) as ways:
            ways |= self._stock_ways()
            for number, pool in enumerate(self._loads.pools):
                print(f"{len(pool.request.prompts)} answers, of which the longest make tails", flush=True)
                answers = serve_group(self._group_of(self._plain), pool, "pool").groups
                for count, loads in tail_loads(pool, answers, self._options).items():
                    for place, load in enumerate(loads):
                        print(f"{count} long answers, repeat {number + 1}", flush=True)
                        run_id = f"tail-{count}-{number}-{place}"
                        results.tails.setdefault(count, []).append(self._turn(load, ways, number + place, run_id))
        all_before, accepted_before = before
        all_after, accepted_after = self._vllm_ngram()
        tokens, accepted = results.vllm_ngram
        results.vllm_ngram = tokens + all_after - all_before, accepted + accepted_after - accepted_before

    def _answers(self, results: Results) -> None:
        with self._through_controllers("answers", self._options.slots, is_group=True) as ways:
            for number, load in enumerate(self._loads.answers):
                print(f"answers, {self._options.slots} at a time, repeat {number + 1}", flush=True)
                results.answers.append(self._turn(load, ways, number, f"answers-{number}"))

    def _rollouts(self, results: Results) -> None:
        with self._through_controllers("rollout", self._options.slots, is_group=False) as ways:
            for number, load in enumerate(self._loads.heavy):
                for visit, earlier in enumerate(self._loads.earlier[number], start=1):
                    print(f"visit {visit} of the prompts of repeat {number + 1}", flush=True)
                    self._turn(earlier, ways, number, f"visit-{number}-{visit}")
                print(f"heavy-tailed lengths, repeat {number + 1}", flush=True)
                results.heavy.append(self._turn(load, ways, number, f"heavy-{number}"))

    def _worst(self, results: Results) -> None:
        ways = {
            DRAFTING: self._directly(self._ours, (USELESS,)),
            ON_HOLD: self._directly(self._ours, (USELESS,), DraftPolicy.NEVER),
            NONE: self._directly(self._plain),
        }
        for count, repeats in self._loads.worst.items():
            turns = results.worst.setdefault(count, [])
            for number, loads in enumerate(repeats):
                print(f"useless drafts for {count} sequences, repeat {number + 1}", flush=True)
                self._publish(is_corrupted=False)  # what is known of drafts counts for less: it must be found out again
                for place, load in enumerate(loads):
                    run_id = f"worst-{count}-{number}-{place}"
                    turns.append(self._turn(load, ways, number + place, run_id))
        self._within(results)

    def _within(self, results: Results) -> None:
        """Useless drafts within one engine, by turns of a few steps."""
        for count, repeats in self._loads.long.items():
            pairs = results.within.setdefault(count, [])
            for number, loads in enumerate(repeats):
                print(f"useless drafts for {count} sequences by turns of steps, repeat {number + 1}", flush=True)
                self._publish(is_corrupted=False)
                for place, load in enumerate(loads):
                    pairs += self._compared(load, (USELESS,), f"within-{count}-{number}-{place}")

    def _compared(self, load: Load, sources: Sequence[str], run_id: str) -> list[Pair]:
        """One group of our service while these sources draft and are on hold by turns of a few steps."""
        group = self._group_of(self._ours)
        way = self._directly(self._ours, sources, DraftPolicy.COMPARED)
        clear_caches(group, [])
        ray.get(group.shards[0].take_steps.remote())
        way(load, run_id)
        return pairs_of(ray.get(group.shards[0].take_steps.remote()), len(load.request.prompts), self._start)

    def _corrupted(self, results: Results) -> None:
        sources = ("clover2",)
        ways = {DRAFTING: self._directly(self._ours, sources), NONE: self._directly(self._plain)}
        pool = self._loads.corrupted
        print(f"{len(pool.request.prompts)} answers, of which the longest are drafted for", flush=True)
        answers = serve_group(self._group_of(self._plain), pool, "corrupted-pool").groups
        loads = cycle(corrupted_loads(pool, answers, self._options))
        self._publish(is_corrupted=False)
        for number, load in enumerate(islice(loads, SETTLING)):
            print(f"the draft as it is, {number + 1}", flush=True)
            results.settled.append(self._turn(load, ways, number, f"settled-{number}"))
        self._publish(is_corrupted=True)
        num_tokens = 0
        for number, load in enumerate(islice(loads, NOTICING)):
            print(f"the draft corrupted, after {num_tokens} tokens", flush=True)
            turn = self._turn(load, ways, 0, f"noticing-{number}")
            num_tokens += max(load.lengths.values())
            if turn.drafts[DRAFTING].get("spec/alarms"):
                results.alarm_tokens.append(num_tokens)
                break
        else:
            results.alarm_tokens.append(None)
        on_hold = {ON_HOLD: self._directly(self._ours, sources, DraftPolicy.NEVER)}
        for number, load in enumerate(islice(loads, self._options.corrupted_rounds)):
            print(f"after {num_tokens} tokens, {number + 1}", flush=True)
            results.corrupted.append(self._turn(load, ways | on_hold, number, f"corrupted-{number}"))
            results.corrupted_within += self._compared(load, sources, f"corrupted-within-{number}")

    def _turn(self, load: Load, ways: Mapping[str, Serve], number: int, run_id: str) -> Turn:
        self._drafts = {}
        repeat = self._bench.turn(load, rotated(ways, number), run_id)
        return Turn(repeat=repeat, drafts=self._drafts, start=self._start)

    @contextmanager
    def _through_controllers(
        self, name: str, slots: int, *, is_group: bool, chunk_tokens: int | None = None
    ) -> Iterator[dict[str, Serve]]:
        """Both services behind a controller of their own, with all their shards or one group of them."""
        options = replace(
            self._options.rollouts(), slots=slots, chunk_tokens=chunk_tokens or self._options.chunk_tokens
        )
        scheduler = scheduler_of(self._config.scheduler, options, POLICY)
        ways: dict[str, Serve] = {}
        with tempfile.TemporaryDirectory(prefix="longroll-bench-") as directory, ExitStack() as stack:
            for way, service in ((DRAFTING, self._ours), (NONE, self._plain)):
                some = self._group_of(service) if is_group else service
                folder = Path(directory) / way
                folder.mkdir()
                client = stack.enter_context(policy_of(some, name, scheduler, self._config.journal, folder))
                ways[way] = partial(serve, client, num_slots=slots * len(some.shards))
            ways[DRAFTING] = self._drafting(SOURCES, ways[DRAFTING])
            yield ways

    def _directly(
        self, service: Service, sources: Sequence[str] = (), policy: DraftPolicy = DraftPolicy.GOVERNED
    ) -> Serve:
        """One group of a service without a controller, everything at once."""
        way = partial(serve_group, self._group_of(service))
        return self._drafting(sources, way, policy) if sources else way

    def _group_of(self, service: Service) -> Service:
        """The first expert-parallel group of a service, as a service."""
        number = self._config.engine.num_shards
        return replace(service, shards=service.shards[:number], infos=service.infos[:number])

    def _stock_ways(self) -> dict[str, Serve]:
        return {name: partial(serve_engines, engines) for name, engines in self._stock.items()}

    def _vllm_ngram(self) -> tuple[int, int]:
        """See `StockEngine.num_tokens`, of those that look up prompts, since they started."""
        counts: list[tuple[int, int]] = ray.get([e.num_tokens.remote() for e in self._stock.get(NGRAM, ())])
        return sum(tokens for tokens, _ in counts), sum(accepted for _, accepted in counts)

    def _drafting(self, sources: Sequence[str], way: Serve, policy: DraftPolicy = DraftPolicy.GOVERNED) -> Serve:
        """The way while our service drafts with these sources, or could."""
        name = ON_HOLD if policy == DraftPolicy.NEVER else DRAFTING

        def drafting(load: Load, run_id: str) -> Run:
            ray.get([shard.turn_speculation.remote(list(sources), policy) for shard in self._ours.shards])
            self._take_drafts()
            run = way(load, run_id)
            self._drafts[name] = self._take_drafts()
            return run

        return drafting

    def _take_drafts(self) -> dict[str, float]:
        """What drafting came to since the last call, in all shards together; empty without a governor."""
        taken: list[SpeculationRecord | None] = ray.get(
            [shard.take_speculation.remote() for shard in self._ours.shards]
        )
        records = [record for record in taken if record is not None]
        for other in records[1:]:
            records[0].merge(other)
        return records[0].metrics() if records else {}

    def _publish(self, *, is_corrupted: bool) -> None:
        """Publish the weights of the model directory once more, under the next version: to both, as a trainer would."""
        tensors = self._corrupted_weights if is_corrupted else self._weights
        for service in (self._ours, self._plain):
            client = service.client
            client.publish(client.stats().live_version + 1, {name: tensors[name] for name in service.plans})

    @cached_property
    def _weights(self) -> dict[str, torch.Tensor]:
        return self._tensors(is_corrupted=False)

    @cached_property
    def _corrupted_weights(self) -> dict[str, torch.Tensor]:
        return self._tensors(is_corrupted=True)

    def _tensors(self, *, is_corrupted: bool) -> dict[str, torch.Tensor]:
        draft = self._config.engine.speculation.draft_model
        assert draft is not None, "a draft model drafts"
        return publication(self._ours.plans, self._config.model.path, draft, is_corrupted=is_corrupted)


def serve_group(service: Service, load: Load, run_id: str) -> Run:
    """Straight to the engines; as many slots as there are sequences."""
    return serve_plain(service, load, len(load.request.prompts) * load.request.n_samples_per_prompt)


def serve_engines(engines: Sequence[Any], load: Load, run_id: str) -> Run:
    """Through plain vLLM; as many slots as there are sequences."""
    return serve_stock(engines, load, len(load.request.prompts) * load.request.n_samples_per_prompt)
