"""One load through one way of serving it, and when what of it was finished. A part of launch.bench_rollout.

The service's ways use the same engines: a controller for each policy stands before the same shards, and "plain" hands
everything to the shards at once, without a controller. "vllm" is plain vLLM, on engines of its own. Owns what is timed;
knows nothing of ratios.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from actors.service import Service
from launch.rollout_load import Load
from launch.stock_engines import Answered, Asked
from rollout.client import RolloutClient
from rollout.config import InFlight, JournalConfig, SchedulerConfig
from rollout.errors import LongrollError
from rollout.scheduler.intake import make_group
from rollout.types import Chunk, ChunkResult, Group, SamplingParams, Status, Trajectory

TAIL = 0.9  # the tail is what is left when so much has finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A trajectory in time, in seconds since the load was handed over.

    Attributes:
        trajectory_id, group_id: Whose.
        start_s: Its first chunk was handed to an engine.
        end_s: It was finished, and durable.
        engine_s: In engines, out of that.
        shard: That ran its last chunk.
        num_chunks: It was cut into.
    """

    trajectory_id: str
    group_id: str
    start_s: float
    end_s: float
    engine_s: float
    shard: int
    num_chunks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What a run took.

    Attributes:
        bars: One a trajectory, in the order in which they finished.
        num_slots: Sequences that all engines together decode at a time.
        num_tokens: Generated.
        num_cached_tokens: Found in prefix caches.
        wall_s: Until the last of it had been received.
    """

    bars: tuple[Bar, ...]
    num_slots: int
    num_tokens: int
    num_cached_tokens: int
    wall_s: float

    @property
    def makespan_s(self) -> float:
        return self.bars[-1].end_s

    @property
    def tail_s(self) -> float:
        """From the end of 90 % of the trajectories to that of the last."""
        return self.makespan_s - share_done(self.ends_s)

    @property
    def group_tail_s(self) -> float:
        """The same of groups."""
        return self.makespan_s - share_done(self.group_ends_s)

    @property
    def ends_s(self) -> list[float]:
        return [bar.end_s for bar in self.bars]

    @property
    def group_ends_s(self) -> list[float]:
        """When each group was complete, in order."""
        ends: dict[str, float] = {}
        for bar in self.bars:
            ends[bar.group_id] = max(ends.get(bar.group_id, 0.0), bar.end_s)
        return sorted(ends.values())

    @property
    def utilisation(self) -> float:
        """Share of the engines' slots that were decoding."""
        return sum(bar.engine_s for bar in self.bars) / (self.num_slots * self.makespan_s)

    @property
    def tokens_per_s(self) -> float:
        """All of them over the time until the last was received."""
        return self.num_tokens / self.wall_s


def share_done(ends_s: Sequence[float]) -> float:
    """When 90 % had ended; `ends_s` is in order."""
    return ends_s[max(0, math.ceil(TAIL * len(ends_s)) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A load that was served, its groups in order; plain vLLM draws tokens of its own and gives none."""

    timeline: Timeline
    groups: tuple[Group, ...]


@contextmanager
def policy_of(
    service: Service, name: str, scheduler: SchedulerConfig, journal: JournalConfig, directory: Path
) -> Iterator[RolloutClient]:
    """A further controller, with a policy and a new journal of its own, before the service's shards."""
    assert service.parts is not None, "a service that was started has its parts"
    journal = replace(journal, dsn=f"sqlite:///{directory / f'{name}.sqlite'}")
    other = replace(
        service,
        namespace=f"{service.namespace}-{name}",
        controller=None,
        parts=replace(service.parts, scheduler=scheduler, journal=journal),
    )
    other.start_controller()
    try:
        yield RolloutClient(other.controller)
    finally:
        ray.get(other.controller.shutdown.remote())
        ray.kill(other.controller)


def clear_caches(service: Service, stock: Sequence[Any]) -> None:
    """Empty the idle engines' prefix caches, so that no run profits from the one before."""
    ray.get([engine.clear.remote() for engine in stock])
    ray.get([shard.pause.remote(InFlight.WAIT) for shard in service.shards])
    ray.get([shard.resume.remote() for shard in service.shards])


def serve(client: RolloutClient, load: Load, run_id: str, num_slots: int) -> Run:
    """A load through a controller, as one request.

    Raises:
        LongrollError: A trajectory failed.
    """
    asked = load.request
    began = time.monotonic()
    handle = client.submit(
        asked.prompts,
        asked.n_samples_per_prompt,
        asked.sampling,
        run_seed=asked.run_seed,
        group_ids=asked.group_ids,
        run_id=run_id,
    )
    submitted_s = time.monotonic() - began
    groups = tuple(handle.in_order(client.groups(handle)))
    wall_s = time.monotonic() - began
    bars = [_bar(t, submitted_s) for group in groups for t in group.trajectories]
    return Run(timeline=_timeline(bars, groups, num_slots, wall_s), groups=groups)


def serve_plain(service: Service, load: Load, num_slots: int) -> Run:
    """A load straight to the engines: groups dealt to the shards in turn, everything at once, each whole."""
    groups = tuple(make_group(load.request, place) for place in range(len(load.request.prompts)))
    began = time.monotonic()
    waiting: dict[ray.ObjectRef, Trajectory] = {}
    for place, group in enumerate(groups):
        shard = service.shards[place % len(service.shards)]
        for trajectory in group.trajectories:
            waiting[shard.generate.remote(_whole(trajectory, load.request.sampling))] = trajectory
    bars = []
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1)
        trajectory, result = waiting.pop(done[0]), ray.get(done[0])
        bars.append(_land(trajectory, result, time.monotonic() - began))
    return Run(timeline=_timeline(bars, groups, num_slots, time.monotonic() - began), groups=groups)


def serve_stock(engines: Sequence[Any], load: Load, num_slots: int) -> Run:
    """A load through plain vLLM: groups dealt to the engines in turn, one call of `LLM.generate` each."""
    request = load.request
    asked: list[list[Asked]] = [[] for _ in engines]
    names: list[list[tuple[str, str]]] = [[] for _ in engines]
    for place, (group_id, prompt) in enumerate(zip(request.group_ids, request.prompts, strict=True)):
        for index in range(request.n_samples_per_prompt):
            name = f"{group_id}/{index}"
            num_tokens = load.lengths.get(name, request.sampling.max_tokens)
            asked[place % len(engines)].append(Asked(prompt=prompt.token_ids, num_tokens=num_tokens))
            names[place % len(engines)].append((name, group_id))
    began = time.monotonic()
    answers: list[list[Answered]] = ray.get([e.generate.remote(some) for e, some in zip(engines, asked, strict=True)])
    wall_s = time.monotonic() - began
    bars = [
        Bar(
            trajectory_id=name,
            group_id=group_id,
            start_s=one.first_s,
            end_s=one.last_s,
            engine_s=one.last_s - one.first_s,
            shard=rank,
            num_chunks=1,
        )
        for rank, some in enumerate(answers)
        for (name, group_id), one in zip(names[rank], some, strict=True)
    ]
    everyone = [one for some in answers for one in some]
    timeline = Timeline(
        bars=tuple(sorted(bars, key=lambda bar: bar.end_s)),
        num_slots=num_slots,
        num_tokens=sum(one.num_tokens for one in everyone),
        num_cached_tokens=sum(one.num_cached_tokens for one in everyone),
        wall_s=wall_s,
    )
    return Run(timeline=timeline, groups=())


def _whole(trajectory: Trajectory, sampling: SamplingParams) -> Chunk:
    return Chunk(
        trajectory_id=f"plain:{trajectory.trajectory_id}",
        token_ids=trajectory.prompt_token_ids,
        num_prompt_tokens=len(trajectory.prompt_token_ids),
        max_tokens=sampling.max_tokens,
        seed=trajectory.seed,
        sampling=sampling,
    )


def _land(trajectory: Trajectory, result: ChunkResult, end_s: float) -> Bar:
    trajectory.append(result)
    trajectory.move_to(Status.TRUNCATED)
    trajectory.metadata |= {"shards": [result.shard], "num_cached_tokens": result.num_cached_tokens}
    return Bar(
        trajectory_id=trajectory.trajectory_id,
        group_id=trajectory.group_id,
        start_s=end_s - result.duration_s + result.ttft_s,
        end_s=end_s,
        engine_s=result.duration_s - result.ttft_s,
        shard=result.shard,
        num_chunks=1,
    )


def _bar(trajectory: Trajectory, submitted_s: float) -> Bar:
    """From the times that the controller noted in the record, which are since the submission."""
    if trajectory.status not in (Status.COMPLETED, Status.TRUNCATED):
        raise LongrollError(f"bench: {trajectory.trajectory_id} {trajectory.status.value}: {trajectory.error}")
    record = trajectory.metadata
    return Bar(
        trajectory_id=trajectory.trajectory_id,
        group_id=trajectory.group_id,
        start_s=submitted_s + record["queue_s"],
        end_s=submitted_s + record["total_s"],
        engine_s=record["generate_s"],
        shard=record["shards"][-1],
        num_chunks=len(record["shards"]),
    )


def _timeline(bars: Sequence[Bar], groups: Sequence[Group], num_slots: int, wall_s: float) -> Timeline:
    trajectories = [t for group in groups for t in group.trajectories]
    return Timeline(
        bars=tuple(sorted(bars, key=lambda bar: bar.end_s)),
        num_slots=num_slots,
        num_tokens=sum(len(t.token_ids) for t in trajectories),
        num_cached_tokens=sum(t.metadata["num_cached_tokens"] for t in trajectories),
        wall_s=wall_s,
    )
