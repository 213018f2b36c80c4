"""The policy loss of the GRPO family, as pure functions of tensors.

Owns advantages, loss weights, the clipped surrogate, truncated importance sampling and the KL
penalty. Knows nothing of models, ranks or micro-batches: every token carries its weight in the loss
of the whole mini-batch (what one optimizer step is taken on, over all ranks), so summing over any split
of it gives the same loss and gradient.

Two forms of the ratio, chosen by the caller (`ratio_base`):

- decoupled, with truncated importance sampling: the ratio is to the policy before the first update of
  the batch, and the gap between that policy and the sampled one is a weight min(exp(gap), cap);
- classical, without: the ratio is to the sampling log-probabilities, as PPO and GRPO are published.

Sources: GRPO, arXiv 2402.03300; PPO clipping, arXiv 1707.06347; clip-higher and token mean (DAPO),
arXiv 2503.14476; fixed length and no standard deviation (Dr. GRPO), arXiv 2503.20783; truncated
importance sampling, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
training"; the k3 estimator, Schulman 2020, "Approximating KL divergence".

Shape legend: B sequences, T target positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rollout.trainer_config import LossAggregation

STD_EPSILON = 1e-6
MAX_LOG_RATIO = 20.0  # beyond ±20 the ratio is held, without gradient: exp must not overflow (inf · 0 is not a number)


def group_advantages(rewards: Sequence[float], *, normalise_std: bool) -> list[float]:
    """Advantage of each member of a group: reward minus the group's mean.

    Args:
        rewards: Finite rewards of the members that were scored, at least two.
        normalise_std: Divide by the sample standard deviation (GRPO); False = Dr. GRPO.

    Raises:
        ValueError: With fewer than two rewards, where no baseline exists.
    """
    if len(rewards) < 2:
        raise ValueError(f"group rewards: got {len(rewards)}, expected at least 2")
    values = torch.tensor(rewards, dtype=torch.float64)
    centred = values - values.mean()
    if normalise_std:
        centred = centred / (values.std() + STD_EPSILON)
    return centred.tolist()


def token_weights(num_tokens: Sequence[int], aggregation: LossAggregation, max_tokens: int) -> list[float]:
    """Weight of each trained token of every sequence in the loss of one optimizer step.

    Args:
        num_tokens: Trained tokens of each sequence of the step's mini-batch, over all ranks; each ≥ 1.
        aggregation: Token mean, sequence mean, or fixed length.
        max_tokens: Divisor of the fixed-length mode: the longest output allowed.

    Returns:
        One weight a sequence; the loss is the sum over tokens of weight · token loss.
    """
    if not num_tokens:
        return []
    num_sequences = len(num_tokens)
    if aggregation is LossAggregation.TOKEN_MEAN:
        return [1.0 / sum(num_tokens)] * num_sequences
    if aggregation is LossAggregation.SEQUENCE_MEAN:
        return [1.0 / (num_sequences * n) for n in num_tokens]
    return [1.0 / (num_sequences * max_tokens)] * num_sequences


def selected_logprobs(logits_BTV: torch.Tensor, targets_BT: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature) of the targets, in float32.

    This is the distribution the engine samples from when neither top_k nor top_p cut it. With such a
    cut the engine reports log-probabilities of the renormalised remainder, which are larger; the
    difference then shows in the mismatch KL and is corrected by the importance weight only.

    Returns:
        float32 [B, T].
    """
    scaled = logits_BTV.float() / temperature
    chosen = scaled.gather(-1, targets_BT.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.logsumexp(scaled, dim=-1)


def ratio_base(start_logprobs: torch.Tensor, sampling_logprobs: torch.Tensor, *, use_tis: bool) -> torch.Tensor:
    """Log-probabilities of the policy that the ratio and its clipping refer to.

    Args:
        start_logprobs: float32 [B, T], of the training policy before the first update of the batch.
        sampling_logprobs: float32 [B, T], as the engine reported them.
        use_tis: Importance weights correct for sampling, so the ratio is to the former; else to the latter.
    """
    return start_logprobs.detach() if use_tis else sampling_logprobs


def importance_weights(train_logprobs: torch.Tensor, sampling_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """Truncated importance weight min(exp(train − sampling), cap), without gradient.

    `train_logprobs` are those of the policy before the first update of the batch.
    """
    return torch.exp(train_logprobs.detach() - sampling_logprobs).clamp(max=cap)


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Schulman's unbiased, non-negative estimate exp(d) − 1 − d of KL(p ‖ q), d = log q − log p.

    Samples must come from p. expm1 keeps precision where d is near rounding error.
    """
    return torch.expm1(log_ratio) - log_ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """The loss of one micro-batch, and sums over its trained tokens for the metrics.

    Attributes:
        loss: Scalar with gradient: this micro-batch's share of the loss of the optimizer step.
        ratio_sum: Sum of the policy ratios.
        clipped_sum: Tokens whose gradient the clip removed.
        kl_sum: Sum of the k3 estimates against the reference, 0 without one.
    """

    loss: torch.Tensor
    ratio_sum: torch.Tensor
    clipped_sum: torch.Tensor
    kl_sum: torch.Tensor


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    tis_weights: torch.Tensor | None = None,
    reference_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
) -> LossTerms:
    """Clipped surrogate loss summed with token weights.

    Args:
        logprobs: float32 [B, T], with gradient; must be finite at every position.
        old_logprobs: float32 [B, T], from `ratio_base` (detached here).
        advantages: float32 [B, 1] or [B, T].
        weights: float32 [B, T]; 0 marks a token that is not trained on.
        clip_low: The ratio is clipped to [1 − clip_low, 1 + clip_high].
        clip_high: See clip_low.
        tis_weights: float32 [B, T] from `importance_weights`, or None.
        reference_logprobs: float32 [B, T] of the reference model, or None.
        kl_coef: Weight of the k3 penalty; used only with a reference.
    """
    is_trained = weights > 0
    ratio = torch.exp((logprobs - old_logprobs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    token_loss = -torch.minimum(unclipped, clipped)
    if tis_weights is not None:
        token_loss = token_loss * tis_weights.detach()
    kl = torch.zeros_like(logprobs)
    if reference_logprobs is not None:
        kl = k3(reference_logprobs.detach() - logprobs)
        token_loss = token_loss + kl_coef * kl
    zero = torch.zeros_like(ratio)
    return LossTerms(
        loss=(torch.where(is_trained, token_loss, zero) * weights).sum(),
        ratio_sum=torch.where(is_trained, ratio, zero).detach().sum(),
        clipped_sum=(is_trained & (clipped < unclipped)).sum(),
        kl_sum=torch.where(is_trained, kl, zero).detach().sum(),
    )
