"""How far the trainer's log-probabilities are from those the engine sampled with.

Owns the estimate and its sums, which add over micro-batches and ranks; knows nothing of either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rollout.loss import k3


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """Sums over trained tokens of d = train log-probability − sampling log-probability.

    Attributes:
        num_tokens: Tokens summed over.
        k3_sum: Sum of exp(d) − 1 − d.
        abs_sum: Sum of |d|.
        abs_max: Largest |d|, 0 without tokens.
    """

    num_tokens: int
    k3_sum: float
    abs_sum: float
    abs_max: float

    @property
    def kl(self) -> float:
        """KL(sampling ‖ training) in nats a token, by the k3 estimate; 0 without tokens."""
        return self.k3_sum / max(self.num_tokens, 1)

    @property
    def abs_mean(self) -> float:
        return self.abs_sum / max(self.num_tokens, 1)

    def __add__(self, other: Mismatch) -> Mismatch:
        return Mismatch(
            num_tokens=self.num_tokens + other.num_tokens,
            k3_sum=self.k3_sum + other.k3_sum,
            abs_sum=self.abs_sum + other.abs_sum,
            abs_max=max(self.abs_max, other.abs_max),
        )


NO_MISMATCH = Mismatch(num_tokens=0, k3_sum=0.0, abs_sum=0.0, abs_max=0.0)


def measure(train_logprobs: torch.Tensor, sampling_logprobs: torch.Tensor, is_trained: torch.Tensor) -> Mismatch:
    """Compare log-probabilities of the same tokens.

    Args:
        train_logprobs: float32, any shape.
        sampling_logprobs: float32, same shape: log-probabilities the tokens were drawn with.
        is_trained: bool, same shape: which positions count.
    """
    gap = (train_logprobs.detach() - sampling_logprobs)[is_trained].double()
    if gap.numel() == 0:
        return NO_MISMATCH
    return Mismatch(
        num_tokens=gap.numel(),
        k3_sum=float(k3(gap).sum()),
        abs_sum=float(gap.abs().sum()),
        abs_max=float(gap.abs().max()),
    )
