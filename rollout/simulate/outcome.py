"""What a simulated run is judged by. Owns the figures and how they are computed from what happened."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from rollout.simulate.timeline import Timeline

TAIL_FROM = 0.9  # the tail is what ends after this share of the trajectories


@dataclass(slots=True, kw_only=True)
class Record:
    """What happened in a run. Owned by the simulation.

    Attributes:
        step_ends_s: When each training step was complete.
        finished_s: When each trajectory ended, in order.
        latencies_s: From submission to end, in the same order.
        num_tokens: Of the trajectories that ended.
        num_assignments, num_cuts: Decisions of the dispatcher.
        num_migrations: Chunks that went on elsewhere than where the one before ran.
        num_failures, num_tokens_lost: Groups that died, and tokens that died with them.
        dispatch_s, dispatch_cpu_s: Seconds spent in the dispatcher, by the clock and of a core.
    """

    step_ends_s: list[float] = field(default_factory=list)
    finished_s: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_assignments: int = 0
    num_cuts: int = 0
    num_migrations: int = 0
    num_failures: int = 0
    num_tokens_lost: int = 0
    dispatch_s: float = 0.0
    dispatch_cpu_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Figures of one policy in one scenario.

    Attributes:
        policy, seed: What was run.
        makespan_s: Seconds of all training steps' rollouts together.
        num_trajectories: Delivered to training.
        num_tokens: Generated for trajectories that ended.
        tokens_per_s_per_gpu: num_tokens by makespan and accelerators.
        tail_ratio: Share of a step's time after nine tenths of its trajectories had ended, averaged over steps.
        mean_batch: Sequences running on a shard, averaged over shards and time.
        idle_share: Share of the shards' time without any.
        num_prefilled_tokens: Computed in prefills.
        num_reprefilled_tokens: Of them, beyond once for each prompt.
        num_preemptions, num_migrations, num_failures, num_tokens_lost, num_decisions: Counts.
        latency_p50_s, latency_p99_s: From submission to the end of a trajectory.
        max_kv_share: Highest share of a shard's KV in use.
        max_running: Most sequences admitted on a shard.
        decisions_per_s, decisions_per_cpu_s: Assignments and cuts by the seconds spent inside the dispatcher: by the
            clock, which a busy machine slows down, and of a core.
        wall_s, cpu_s: Seconds that simulating took, by the clock and of a core.
    """

    policy: str
    seed: int
    makespan_s: float
    num_trajectories: int
    num_tokens: int
    tokens_per_s_per_gpu: float
    tail_ratio: float
    mean_batch: float
    idle_share: float
    num_prefilled_tokens: int
    num_reprefilled_tokens: int
    num_preemptions: int
    num_migrations: int
    num_failures: int
    num_tokens_lost: int
    num_decisions: int
    latency_p50_s: float
    latency_p99_s: float
    max_kv_share: float
    max_running: int
    decisions_per_s: float
    decisions_per_cpu_s: float
    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """An outcome with what its picture is drawn from; `finished_s` ascends."""

    outcome: Outcome
    timeline: Timeline
    finished_s: np.ndarray


def tail_ratio(step_ends_s: list[float], finished_s: list[float], num_delivered: int) -> float:
    """Mean over steps of the share of the step's time that the last tenth of its delivered trajectories took.

    Args:
        step_ends_s: Ends of the steps, ascending.
        finished_s: Ends of trajectories, ascending.
        num_delivered: Trajectories that each step consumed.
    """
    shares, start = [], 0.0
    ends = np.asarray(finished_s)
    for i, end in enumerate(step_ends_s):
        mine = ends[i * num_delivered : (i + 1) * num_delivered]
        at = float(np.quantile(np.clip(mine, start, end), TAIL_FROM)) if len(mine) else end
        shares.append((end - at) / (end - start) if end > start else 0.0)
        start = end
    return float(np.mean(shares))
