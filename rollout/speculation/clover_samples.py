"""What a draft model learns from: sequences with the hidden states of the target that wrote them, in padded batches.

Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from rollout.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSample:
    """One trajectory of the target.

    Attributes:
        token_ids: int64 [n], prompt and output.
        num_prompt_tokens: Length of the prompt, in [1, n).
        hidden: [n, H] floating, the target's last hidden states (what its output head reads); row t is token t's and
            predicts token t + 1.
        seed: Of the trajectory's keyed noise.
        is_sampled: bool [n], the tokens that the target drew; None where it drew every token after the prompt.
    """

    token_ids: torch.Tensor
    num_prompt_tokens: int
    hidden: torch.Tensor
    seed: int
    is_sampled: torch.Tensor | None = None

    def __post_init__(self) -> None:
        num_tokens = len(self.token_ids)
        if not 1 <= self.num_prompt_tokens < num_tokens:
            raise InvalidRequest("prompt length", self.num_prompt_tokens, f"a number in [1, {num_tokens})")
        if self.hidden.ndim != 2 or len(self.hidden) != num_tokens:
            raise InvalidRequest("hidden states", tuple(self.hidden.shape), f"one row for each of {num_tokens} tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftBatch:
    """Samples padded on the right, where causality hides the padding.

    Attributes:
        tokens: int64 [B, n].
        hidden: float32 [B, n, H].
        is_output: bool [B, n], whether the target drew a token; False on padding.
        seeds: int64 [B], of the keyed noise.
    """

    tokens: torch.Tensor
    hidden: torch.Tensor
    is_output: torch.Tensor
    seeds: torch.Tensor


def collate(samples: Sequence[DraftSample], device: torch.device | str = "cpu") -> DraftBatch:
    """Pad samples to one length."""
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad([s.token_ids for s in samples], batch_first=True)
    hidden = pad([s.hidden.float() for s in samples], batch_first=True)
    is_output = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        drawn = is_output[row, sample.num_prompt_tokens : len(sample.token_ids)]
        drawn.copy_(torch.tensor(True) if sample.is_sampled is None else sample.is_sampled[sample.num_prompt_tokens :])
    seeds = torch.tensor([s.seed for s in samples])
    return DraftBatch(
        tokens=tokens.to(device), hidden=hidden.to(device), is_output=is_output.to(device), seeds=seeds.to(device)
    )


def drawn_batches(
    samples: Sequence[DraftSample], batch_tokens: int, generator: torch.Generator
) -> Iterator[list[DraftSample]]:
    """Batches of samples of similar length, without end.

    A loss that is a mean over the generated tokens of its batch is, over many batches, one over all generated tokens if
    batches are drawn in proportion to theirs. So short answers to long prompts, which cost much and teach little, come
    seldom.

    Args:
        samples: At least one.
        batch_tokens: Tokens of a batch at most, padding included (one sample may be longer).
        generator: On the CPU; the batches are a function of its state.
    """
    while True:
        batches = _partition(samples, batch_tokens, generator)
        sizes = [sum(len(s.token_ids) - s.num_prompt_tokens for s in batch) for batch in batches]
        drawn = torch.multinomial(
            torch.tensor(sizes, dtype=torch.float64), len(batches), replacement=True, generator=generator
        )
        for i in drawn.tolist():
            yield batches[i]


def _partition(
    samples: Sequence[DraftSample], batch_tokens: int, generator: torch.Generator
) -> list[list[DraftSample]]:
    noise = torch.rand(len(samples), generator=generator).tolist()
    # Random within a length, so that batches differ from pass to pass.
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].token_ids), noise[i]))
    batches: list[list[DraftSample]] = []
    for i in order:
        length = len(samples[i].token_ids)  # ascending: the longest so far
        if not batches or (len(batches[-1]) + 1) * length > batch_tokens:
            batches.append([])
        batches[-1].append(samples[i])
    return batches
