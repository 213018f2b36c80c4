"""From the groups of a step to its record. Computes figures only."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.evaluation import is_exact
from launch.history import StepRecord
from rollout.errors import LongrollError
from rollout.fleet import ServiceStats, SyncReport
from rollout.train_metrics import TrainMetrics
from rollout.types import Group, Status, Trajectory


@dataclass(slots=True, kw_only=True)
class StepTimes:
    """Wall time of the parts of one step in seconds."""

    rollout_s: float = 0.0
    train_s: float = 0.0
    sync_s: float = 0.0
    save_s: float = 0.0


def trajectories_digest(trajectories: Sequence[Trajectory]) -> str:
    """BLAKE2b-64 over ids, prompts and generated tokens; the order of the trajectories does not matter."""
    hasher = hashlib.blake2b(digest_size=8)
    for t in sorted(trajectories, key=lambda t: (t.group_id, t.sample_index)):
        hasher.update(f"{t.trajectory_id}:{t.prompt_token_ids}:{t.token_ids}\n".encode())
    return hasher.hexdigest()


def step_record(
    step: int,
    groups: list[Group],
    metrics: TrainMetrics,
    report: SyncReport,
    times: StepTimes,
    stats: ServiceStats,
) -> StepRecord:
    """Describe a finished step.

    Args:
        step: Number of the step, from 1.
        groups: What was trained on.
        metrics: What the trainer says.
        report: What the sync says; the version before it is the one that was sampled.
        times: Wall time of the parts.
        stats: The service at the end of the step's rollouts.

    Raises:
        LongrollError: If no trajectory was scored: there is no reward to report, and nothing was learnt.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    scored = [t for t in trajectories if t.reward is not None]
    if not scored:
        reasons = sorted({t.error or t.status.value for t in trajectories})
        why = "; ".join(reasons[:3])
        raise LongrollError(f"step {step}: none of {len(trajectories)} trajectories was scored: {why}")
    rewards = [t.reward for t in scored if t.reward is not None]
    lengths = sorted(len(t.token_ids) for t in trajectories)
    mean = sum(rewards) / len(rewards)
    sampled = report.version - 1
    oldest = min((s.version for t in trajectories for s in t.weight_versions), default=sampled)
    return StepRecord(
        step=step,
        version=sampled,
        reward_mean=mean,
        reward_std=math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards)),
        exact_rate=sum(bool(is_exact(t.metadata, t.reward)) for t in scored) / len(scored),
        length_mean=sum(lengths) / len(lengths),
        length_p95=float(lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]),
        length_max=lengths[-1],
        truncated_rate=sum(t.status is Status.TRUNCATED for t in trajectories) / len(trajectories),
        num_trajectories=len(trajectories),
        num_failed=sum(t.status is Status.FAILED for t in trajectories),
        num_tokens=sum(lengths),
        staleness_max=sampled - oldest,
        rollout_s=times.rollout_s,
        train_s=times.train_s,
        sync_s=times.sync_s,
        save_s=times.save_s,
        stall_s=report.stall_s,
        kv_usage_max=max((s.kv_usage_max for s in stats.shards), default=0.0),
        num_chunks=stats.num_chunks,
        num_migrations=stats.num_migrations,
        num_cuts=stats.num_cuts,
        num_retries=stats.num_retries,
        num_tokens_restored=stats.num_tokens_restored,
        num_regenerated=stats.num_regenerated,
        failures=stats.num_failed | {f"group_{kind}": count for kind, count in stats.num_group_deaths.items()},
        num_group_restarts=stats.supervision.num_group_restarts,
        trajectories_digest=trajectories_digest(trajectories),
        **_trained(metrics),
    )


def _trained(metrics: TrainMetrics) -> dict[str, Any]:
    """Fields of a record about the policy update; those of a mismatch by cause only where it was measured."""
    fields = dict(
        num_groups_filtered=metrics.num_filtered_groups,
        mismatch_kl=metrics.mismatch_kl,
        loss=metrics.loss,
        grad_norm=metrics.grad_norm,
        clip_fraction=metrics.clip_fraction,
        entropy=metrics.entropy,
        lr=metrics.lr,
        reference_kl=metrics.reference_kl,
        tis_weight_mean=metrics.tis_weight_mean,
        tis_capped_fraction=metrics.tis_capped_fraction,
        is_skipped=metrics.is_skipped,
        num_routing_replayed=metrics.num_routing_replayed,
        num_routing_missing=metrics.num_routing_missing,
        tis_cap=metrics.tis_cap,
    )
    if metrics.draft is not None:
        fields |= dict(draft_loss=metrics.draft.loss, draft_agreement=metrics.draft.agreement)
    report = metrics.mismatch
    if report is None:
        return fields
    return fields | dict(
        mismatch_kl_slice=report.all,
        mismatch_kl_weights=report.weights,
        mismatch_kl_kv=report.kv,
        mismatch_kl_routing=report.routing,
        mismatch_kl_staleness=report.staleness,
        routing_kl_without_replay=report.routing_without_replay,
        routing_flip_rate=report.routing_flip_rate,
    )
