"""How long decoding pauses while weights are published, and how much travels. A part of launch.bench_sync."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import ray

from actors.service import Service, served_plans, start_service
from actors.trainer_group import TrainerGroup
from actors.vllm_plugin.steps import Step
from launch.background_load import BackgroundLoad
from launch.monitor import Monitor
from launch.train import ask_for, rollout
from launch.workload import Workload
from rollout.config import RunConfig
from rollout.cursor import Cursor
from rollout.errors import LongrollError
from rollout.fleet import SyncReport

BF16_BYTES = 2
QUIET_S = 1.0  # of undisturbed decoding before a publication, for the median step
LOAD_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """Publications under load; lists by publication, the first of them sends everything.

    Attributes:
        stall_steps: Longest pause of any shard, in median steps of that shard just before.
        quiet_steps: The same of the second before, without a publication: what the machine does by itself.
        step_ms: Median step of the slowest shard.
        bytes_travelled: Payload bytes.
        bytes_bf16: Of the whole model.
        bytes_encoded: Of the whole model as it is served.
        digests_checked: Publications after which all shards gave the digest that the sender's bytes have.
        num_votes_compared, num_mixed: Forwards of which several shards told the version, and those that differed.
    """

    recompute_kv: bool
    stall_steps: list[float]
    quiet_steps: list[float]
    step_ms: list[float]
    stage_s: list[float]
    flip_s: list[float]
    bytes_travelled: list[int]
    bytes_bf16: int
    bytes_encoded: int
    digests_checked: int
    num_votes_compared: int
    num_mixed: int
    num_lost: int

    @property
    def stall_steps_p99(self) -> float:
        return float(np.percentile(self.stall_steps, 99))

    @property
    def bytes_ratio(self) -> float:
        """Mean of the publications that sent changes, against the model in bfloat16."""
        return statistics.fmean(self.bytes_travelled[1:]) / self.bytes_bf16


def take_steps(service: Service) -> list[list[Step]]:
    """Steps of every shard since the last call."""
    return ray.get([shard.take_steps.remote() for shard in service.shards])


def gaps_s(steps: list[Step], recompute_kv: bool) -> list[tuple[float, float]]:
    """(end, length) of the pauses between steps that delivered tokens, in seconds.

    A step that found new weights over old KV delivers nothing where KV is computed again.
    """
    delivered = [
        step for i, step in enumerate(steps) if not (recompute_kv and i > 0 and step.version != steps[i - 1].version)
    ]
    return [(b.ended_at, b.ended_at - a.ended_at) for a, b in pairwise(delivered)]


def mixed_votes(steps: list[list[Step]]) -> tuple[int, int]:
    """Votes that several shards of one group took part in, and those after which they ran different versions."""
    seen: dict[int, set[int]] = {}
    count: dict[int, int] = {}
    for shard in steps:
        for step in shard:
            seen.setdefault(step.vote, set()).add(step.version)
            count[step.vote] = count.get(step.vote, 0) + 1
    compared = [vote for vote, number in count.items() if number > 1]
    return len(compared), sum(len(seen[vote]) > 1 for vote in compared)


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One publication under load: its report, the longest pauses during and before it, and every shard's steps."""

    report: SyncReport
    stall_steps: float
    quiet_steps: float
    step_ms: float
    steps: list[list[Step]]


def one_publication(service: Service, trainers: TrainerGroup, recompute_kv: bool) -> Publication:
    """Publish under load."""
    take_steps(service)
    time.sleep(QUIET_S)
    began = time.monotonic()
    report = trainers.publish()
    ended = time.monotonic()
    time.sleep(QUIET_S)
    steps = take_steps(service)
    stalls, before, medians = [], [], []
    for shard in steps:
        gaps = gaps_s(shard, recompute_kv)
        quiet = [length for at, length in gaps if at < began]
        during = [length for at, length in gaps if began <= at and at - length <= ended]
        if not quiet or not during:
            raise LongrollError(f"stall: got {len(quiet)} quiet steps and {len(during)} others, expected some of both")
        medians.append(statistics.median(quiet))
        stalls.append(max(during) / medians[-1])
        before.append(max(quiet) / medians[-1])
    return Publication(
        report=report, stall_steps=max(stalls), quiet_steps=max(before), step_ms=1e3 * max(medians), steps=steps
    )


def stall(config: RunConfig, num_steps: int, *, recompute_kv: bool) -> Stall:
    """Train `num_steps` real steps and publish each under load; the versions come from real optimizer steps."""
    config = copy.deepcopy(config)
    config.sync.recompute_kv = recompute_kv
    config.trainer.num_steps = num_steps
    workload = Workload(config.workload, config.model, config.trainer.seed)
    quiet = copy.deepcopy(config.monitor)
    quiet.wandb_mode, quiet.progress = "disabled", "off"
    results: list[Publication] = []
    with (
        tempfile.TemporaryDirectory() as directory,
        start_service(config.model, config.engine, config.scheduler, config.sync, config.cluster) as service,
    ):
        monitor = Monitor(quiet, Path(directory), {}, num_steps)
        trainers = TrainerGroup.start(
            config.model,
            config.trainer,
            config.sampling,
            config.sync,
            config.cluster,
            directory,
            service.controller,
            config.engine,
        )
        try:
            with BackgroundLoad(service, workload, LOAD_TOKENS) as load:
                for step in range(1, num_steps + 2):
                    asked = ask_for(config, step, Cursor(step=step - 1, version=step - 1, data_cursor=step * 100))
                    groups = rollout(config, service.client, workload, asked, None, monitor)
                    trainers.train_step(groups)
                    results.append(one_publication(service, trainers, recompute_kv))
                    _say(results[-1], recompute_kv)
        finally:
            trainers.stop()
    if load.returned.error is not None:
        raise LongrollError(f"background generations: {load.returned.error}")
    votes = [mixed_votes(r.steps) for r in results]
    numel = sum(plan.numel for plan in served_plans(config.model, config.engine).values())
    return Stall(
        recompute_kv=recompute_kv,
        stall_steps=[r.stall_steps for r in results],
        quiet_steps=[r.quiet_steps for r in results],
        step_ms=[r.step_ms for r in results],
        stage_s=[r.report.stage_s for r in results],
        flip_s=[r.report.flip_s for r in results],
        bytes_travelled=[r.report.num_bytes for r in results],
        bytes_bf16=numel * BF16_BYTES,
        bytes_encoded=results[0].report.num_bytes_full,
        digests_checked=len(results),
        num_votes_compared=sum(compared for compared, _ in votes),
        num_mixed=sum(mixed for _, mixed in votes),
        num_lost=load.returned.num_lost,
    )


def _say(published: Publication, recompute_kv: bool) -> None:
    report = published.report
    kv = "KV again" if recompute_kv else "KV kept"
    print(
        f"version {report.version:>3}  {kv}  {report.num_bytes / 1e6:>8.3f} MB of {report.num_bytes_full / 1e6:.3f}  "
        f"staged {report.stage_s * 1e3:>6.0f} ms  flip {report.flip_s * 1e3:>5.0f} ms  "
        f"stall {published.stall_steps:>5.2f} steps of {published.step_ms:.1f} ms  "
        f"(before it {published.quiet_steps:.2f})",
        flush=True,
    )
