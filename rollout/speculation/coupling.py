"""Keyed sampling of one request, for the target and for drafters that share its noise.

Owns how the sampling options of a request become a token, and how likely a drafter's candidates are to be that
token. The arithmetic is `kernels.gumbel_sample`. Knows nothing of trees.

A drafter knows the noise of every (seed, position) before the target draws, so it ranks candidates by
draft logits / T + Gumbel(seed, position) instead of by probability: where its logits are near the target's, both
maxima fall on one token, however random the token is (drafter-invariant speculative decoding, arXiv 2408.07978;
Gumbel-max list sampling, arXiv 2506.05632). How likely candidate i is to be the target's maximum depends on how far
it lies from the drafter's own best against the size of the drafter's errors: if the errors of the logits / T were
independent Gumbel noise of scale s, the chance would be softmax(ranks / s), exactly. That is the estimate used here;
s is fitted to what was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.gumbel_sample import gumbel_noise, gumbel_sample, truncation_threshold
from rollout.errors import InvalidRequest

ERROR_SCALES = tuple(2.0 ** (step / 4) for step in range(-20, 17))
"""Scales tried by `fit_error_scale`, in units of logits / T: 1/32 to 16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyedSampling:
    """How one request draws: token = argmax(logits / T + Gumbel(seed, position)) over what top-k and top-p keep.

    Attributes:
        seed: Key of the noise, in [0, 2**63).
        temperature: T ≥ 0; 0 is greedy.
        top_k: Keep the k most likely tokens; None keeps all.
        top_p: Keep the smallest set of tokens whose mass reaches p, 0 < p ≤ 1; 1 keeps all.
    """

    seed: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise InvalidRequest("seed", self.seed, "an integer in [0, 2**63)")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidRequest("temperature", self.temperature, "a finite number ≥ 0")
        if self.top_k is not None and self.top_k < 1:
            raise InvalidRequest("top_k", self.top_k, "an integer ≥ 1, or None for off")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest("top_p", self.top_p, "a number in (0, 1]")

    def sample(self, logits: torch.Tensor, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The request's own token after each row.

        Args:
            logits: [R, V] of any floating type; taken as float32, as the engine does.
            positions: [R] absolute index of the token drawn after each row.

        Returns:
            (tokens [R] int64, logprobs [R] float32 under the distribution drawn from).
        """
        logits = logits.float()
        return gumbel_sample(
            logits,
            seeds=self._seeds(logits),
            positions=torch.tensor(positions, dtype=torch.int64, device=logits.device),
            temperature=self._temperature(logits),
            threshold=self._threshold(logits),
        )

    def ranks(self, logits: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """[R, V] float32: what the maximum of each row is taken over; arguments as `sample`."""
        logits = logits.float()
        if self.temperature == 0:
            return logits
        scaled = logits * (1.0 / self._temperature(logits))[:, None]
        threshold = self._threshold(logits)
        if threshold is not None:
            scaled = scaled.masked_fill(scaled < threshold[:, None], -math.inf)
        places = torch.tensor(positions, dtype=torch.int64, device=logits.device)
        return scaled + gumbel_noise(self._seeds(logits), places, logits.shape[1])

    def candidates(
        self, logits: torch.Tensor, positions: Sequence[int], *, width: int, error_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that the target most likely draws, by a drafter's logits.

        Args:
            logits: [R, V], the drafter's.
            positions: [R] absolute index of the token drawn after each row.
            width: Candidates for each row.
            error_scale: Size of the drafter's errors in logits / T (in logits where T = 0); above 0.

        Returns:
            (tokens [R, W] int64, logprobs [R, W] float32 of being the target's), likeliest first; W is width, or V
            where that is smaller.
        """
        ranks = self.ranks(logits, positions) / error_scale
        best, tokens = ranks.topk(min(width, ranks.shape[1]), dim=-1)
        return tokens, best - ranks.logsumexp(-1, keepdim=True)

    def _seeds(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.full((len(logits),), self.seed, dtype=torch.int64, device=logits.device)

    def _temperature(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.full((len(logits),), self.temperature, dtype=torch.float32, device=logits.device)

    def _threshold(self, logits: torch.Tensor) -> torch.Tensor | None:
        if self.temperature == 0 or (self.top_k is None and self.top_p == 1):
            return None
        rows, device = (len(logits),), logits.device
        return truncation_threshold(
            logits,
            temperature=self._temperature(logits),
            top_k=None if self.top_k is None else torch.full(rows, self.top_k, dtype=torch.int64, device=device),
            top_p=None if self.top_p == 1 else torch.full(rows, self.top_p, dtype=torch.float32, device=device),
        )


def fit_error_scale(ranks: torch.Tensor, tokens: torch.Tensor) -> float:
    """The scale of a drafter's errors that makes what the target drew likeliest.

    Args:
        ranks: [n, V] of the drafter, from `KeyedSampling.ranks`.
        tokens: [n] int64, what the target drew at the same rows.

    Returns:
        The best of ERROR_SCALES.

    Raises:
        InvalidRequest: There is no row to fit to.
    """
    if not len(tokens):
        raise InvalidRequest("rows to fit an error scale to", 0, "at least 1")
    chosen = ranks.gather(1, tokens[:, None]).squeeze(1)
    # A token that the drafter had cut away says nothing of the scale: it is impossible at every one.
    kept = chosen > -math.inf
    likelihoods = [float((chosen / scale - (ranks / scale).logsumexp(-1))[kept].sum()) for scale in ERROR_SCALES]
    return ERROR_SCALES[likelihoods.index(max(likelihoods))]
