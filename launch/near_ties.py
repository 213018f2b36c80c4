"""Where two generations of the same prompt and seed first differ, and whether that was a near tie.

A token is argmax(logits / T + Gumbel(seed, position)), so both candidates of a position carry the same noise wherever
they are generated. Two engines, or two batch shapes of one, round logits differently: where the scores of two
candidates lie closer than that rounding, either may win, and everything after it may differ. Owns the comparison only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.gumbel_sample import gumbel_noise

LARGEST_LOGIT = 16.0
ROUNDINGS = {"float32": 256, "bfloat16": 4, "float16": 4}
"""Units in the last place of such a logit by which two scores may err. In float32 every term of a sum over hundreds of
channels rounds, and another order rounds otherwise; narrower types add up in float32 and round once an operation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two generations differ at one token.

    Attributes:
        index: Of the token in the output.
        tokens: Of the first and of the second generation; None where it had ended.
        logprobs: Of these tokens, each as its own generation saw it, in nats.
        gap: Distance of the two scores, logits / T + noise; None where one had ended.
        is_near_tie: The gap is within what rounding explains.
    """

    index: int
    tokens: tuple[int | None, int | None]
    logprobs: tuple[float | None, float | None]
    gap: float | None
    is_near_tie: bool

    def __str__(self) -> str:
        sides = [
            "the end" if token is None else f"{token} (log-probability {logprob:.6f})"
            for token, logprob in zip(self.tokens, self.logprobs, strict=True)
        ]
        gap = "" if self.gap is None else f", scores {self.gap:.2e} apart"
        verdict = "a near tie" if self.is_near_tie else "not a near tie"
        return f"token {self.index}: {sides[0]} against {sides[1]}{gap}: {verdict}"


def near_tie(dtype: str, temperature: float) -> float:
    """Largest distance of two scores that rounding explains.

    Args:
        dtype: In which the engine computes: float32, bfloat16 or float16.
        temperature: Of the sampling; scores are logits divided by it.
    """
    unit = float(torch.finfo(getattr(torch, dtype)).eps) * LARGEST_LOGIT
    return ROUNDINGS[dtype] * unit / (temperature or 1.0)


def compare(
    first: tuple[Sequence[int], Sequence[float]],
    second: tuple[Sequence[int], Sequence[float]],
    *,
    seed: int,
    num_prompt_tokens: int,
    temperature: float,
    vocab_size: int,
    within: float,
    start: int = 0,
) -> Difference | None:
    """The first difference of two generations, or None.

    Args:
        first, second: Tokens and their log-probabilities under the distribution they were drawn from.
        seed: Gumbel key of both.
        num_prompt_tokens: Of the prompt; positions count from its first token.
        temperature: 0 is greedy, without noise.
        vocab_size: Token ids are below it.
        within: See `near_tie`.
        start: Index in the output of the first token given.
    """
    (ids_a, logprobs_a), (ids_b, logprobs_b) = first, second
    shared = min(len(ids_a), len(ids_b))
    at = next((i for i in range(shared) if ids_a[i] != ids_b[i]), None)
    if at is None:
        if len(ids_a) == len(ids_b):
            return None
        a, b = (ids[shared] if len(ids) > shared else None for ids in (ids_a, ids_b))
        p, q = (found[shared] if len(found) > shared else None for found in (logprobs_a, logprobs_b))
        return Difference(index=start + shared, tokens=(a, b), logprobs=(p, q), gap=None, is_near_tie=False)
    noise = [0.0, 0.0]
    if temperature > 0:
        position = num_prompt_tokens + start + at
        row = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), vocab_size)[0]
        noise = [float(row[ids_a[at]]), float(row[ids_b[at]])]
    gap = abs(logprobs_a[at] + noise[0] - logprobs_b[at] - noise[1])
    return Difference(
        index=start + at,
        tokens=(ids_a[at], ids_b[at]),
        logprobs=(logprobs_a[at], logprobs_b[at]),
        gap=gap,
        is_near_tie=gap <= within,
    )
