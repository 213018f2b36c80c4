"""What one training step reports: sums that add over micro-batches and ranks, and the final record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from rollout.batch import Selection
from rollout.loss import LossTerms
from rollout.mismatch import Knobs, Mismatch, MismatchReport


@dataclass(slots=True, kw_only=True)
class StepSums:
    """Sums over the trained tokens of one update, of one rank or of all. Owned by the rank that fills it.

    `abs_gap_max` is a maximum, everything else adds.
    """

    loss: float = 0.0
    router_aux_loss: float = 0.0
    num_tokens: float = 0.0
    ratio: float = 0.0
    clipped: float = 0.0
    reference_kl: float = 0.0
    tis_weight: float = 0.0
    tis_capped: float = 0.0
    neg_logprob: float = 0.0
    mismatch_k3: float = 0.0
    routing_replayed: float = 0.0
    routing_missing: float = 0.0
    abs_gap: float = 0.0
    abs_gap_max: float = 0.0

    def add(self, terms: LossTerms, mismatch: Mismatch) -> None:
        """Add a micro-batch."""
        self.loss += float(terms.loss.detach())
        self.ratio += float(terms.ratio_sum)
        self.clipped += float(terms.clipped_sum)
        self.reference_kl += float(terms.kl_sum)
        self.num_tokens += mismatch.num_tokens
        self.mismatch_k3 += mismatch.k3_sum
        self.abs_gap += mismatch.abs_sum
        self.abs_gap_max = max(self.abs_gap_max, mismatch.abs_max)

    @staticmethod
    def over_updates(updates: Sequence[StepSums]) -> StepSums:
        """One record of a step's updates: losses are means over updates, the rest is as over micro-batches.

        Each update's loss is normalised over its own mini-batch, so the losses of several do not add.
        """
        columns = torch.stack([update.to_tensor() for update in updates])
        total = StepSums.from_tensor(torch.cat([columns[:, :-1].sum(dim=0), columns[:, -1:].amax(dim=0)]))
        total.loss /= len(updates)
        total.router_aux_loss /= len(updates)
        return total

    def to_tensor(self) -> torch.Tensor:
        """float64, in field order; the last entry is the maximum."""
        return torch.tensor([getattr(self, f.name) for f in fields(self)], dtype=torch.float64)

    @staticmethod
    def from_tensor(values: torch.Tensor) -> StepSums:
        return StepSums(**dict(zip((f.name for f in fields(StepSums)), values.tolist(), strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftMetrics:
    """What a draft model's update came to.

    Attributes:
        loss: Of distillation, mean over the steps.
        agreement: Share of places where the draft's likeliest token is the policy's, mean over depths and steps.
    """

    loss: float
    agreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainMetrics:
    """One training step. Means are over trained tokens of the global batch, in all its updates.

    What compares sampling with training (mismatch, gaps, importance weights, entropy) is of the policy
    before the first update; ratio, clipping and the reference KL are of the policy each update starts from.

    Attributes:
        version: Weight version after the step.
        is_skipped: Nothing was left to train on; the weights are unchanged.
        loss: The policy loss, mean over updates.
        router_aux_loss: The weighted router loss that was added, mean over updates, 0 when off.
        grad_norm: Before clipping; the largest of the updates.
        lr: Step size used.
        mismatch_kl: KL(sampling ‖ training) in nats a token.
        abs_gap_mean: Mean |training − sampling log-probability|.
        abs_gap_max: Largest of them.
        ratio_mean: Mean policy ratio (1 with one update a batch and use_tis).
        clip_fraction: Share of tokens that the clip froze (0 with one update a batch and use_tis).
        reference_kl: KL to the reference, 0 without one.
        tis_weight_mean: Mean truncated importance weight, 1 when off.
        tis_capped_fraction: Share of tokens at the cap.
        mismatch: The gap by cause, measured on a slice; None in steps without.
        num_routing_replayed: Trajectories whose routing was replayed.
        num_routing_missing: Trajectories whose routing should have been replayed but was not captured or was lost.
        tis_cap: Cap of the importance weights in this step, None without them.
        entropy: Estimate in nats: mean of −log-probability of the sampled tokens.
        num_trained_trajectories: Trajectories in the batch.
        num_filtered_groups: Groups left out for equal rewards or fewer than two scored members.
        num_equal_groups: Those of them left out for equal rewards.
        num_failed_trajectories: Trajectories that failed, were aborted or could not be scored.
        num_tokens: Tokens trained on.
        duration_s: Wall clock of the step.
        draft: Of the draft model that travels; None without one, or where it was not trained.
    """

    version: int
    is_skipped: bool
    loss: float
    router_aux_loss: float
    grad_norm: float
    lr: float
    mismatch_kl: float
    abs_gap_mean: float
    abs_gap_max: float
    ratio_mean: float
    clip_fraction: float
    reference_kl: float
    tis_weight_mean: float
    tis_capped_fraction: float
    mismatch: MismatchReport | None
    num_routing_replayed: int
    num_routing_missing: int
    tis_cap: float | None
    entropy: float
    num_trained_trajectories: int
    num_filtered_groups: int
    num_equal_groups: int
    num_failed_trajectories: int
    num_tokens: int
    duration_s: float
    draft: DraftMetrics | None


def summarise(
    selection: Selection,
    sums: StepSums,
    *,
    version: int,
    grad_norm: float,
    lr: float,
    duration_s: float,
    knobs: Knobs,
    mismatch: MismatchReport | None,
    draft: DraftMetrics | None,
) -> TrainMetrics:
    """Turn global sums into the record of a step."""
    n = max(sums.num_tokens, 1.0)
    return TrainMetrics(
        version=version,
        is_skipped=not selection.samples,
        loss=sums.loss,
        router_aux_loss=sums.router_aux_loss,
        grad_norm=grad_norm,
        lr=lr,
        mismatch_kl=sums.mismatch_k3 / n,
        abs_gap_mean=sums.abs_gap / n,
        abs_gap_max=sums.abs_gap_max,
        ratio_mean=sums.ratio / n,
        clip_fraction=sums.clipped / n,
        reference_kl=sums.reference_kl / n,
        tis_weight_mean=sums.tis_weight / n,
        tis_capped_fraction=sums.tis_capped / n,
        mismatch=mismatch,
        num_routing_replayed=int(sums.routing_replayed),
        num_routing_missing=int(sums.routing_missing),
        tis_cap=knobs.tis_cap,
        entropy=sums.neg_logprob / n,
        num_trained_trajectories=len(selection.samples),
        num_filtered_groups=selection.num_filtered_groups,
        num_equal_groups=selection.num_equal_groups,
        num_failed_trajectories=selection.num_failed_trajectories,
        num_tokens=int(sums.num_tokens),
        duration_s=duration_s,
        draft=draft,
    )
