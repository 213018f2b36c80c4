"""A target small enough to be written down: its hidden state depends on its last two tokens only."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.gumbel_sample import gumbel_sample
from rollout.speculation.clover import CloverDraft, TargetLayers
from rollout.speculation.clover_config import DraftConfig
from rollout.speculation.clover_samples import DraftSample

VOCAB, HIDDEN = 24, 16


@dataclass(frozen=True)
class ToyTarget:
    """hidden(t) = norm(tanh(first(token t) + second(token t - 1))), logits = head · hidden."""

    embedding: torch.Tensor
    second: torch.Tensor
    head: torch.Tensor

    @property
    def layers(self) -> TargetLayers:
        return TargetLayers.of(self.embedding, self.head)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """[n] → [n, H]; the token before the first counts as token 0."""
        before = torch.cat([torch.zeros(1, dtype=torch.long), tokens[:-1]])
        state = torch.tanh(self.embedding[tokens] + self.second[before])
        return state / state.square().mean(-1, keepdim=True).sqrt()

    def sample(self, seed: int, num_prompt_tokens: int, num_tokens: int, temperature: float = 1.0) -> DraftSample:
        """A trajectory drawn with keyed noise, from a prompt that follows from the seed."""
        prompt = torch.randint(1, VOCAB, (num_prompt_tokens,), generator=torch.Generator().manual_seed(seed))
        tokens = prompt
        while len(tokens) < num_prompt_tokens + num_tokens:
            drawn, _ = gumbel_sample(
                self.hidden(tokens)[-1:] @ self.head.T,
                seeds=torch.tensor([seed]),
                positions=torch.tensor([len(tokens)]),
                temperature=torch.tensor([temperature]),
            )
            tokens = torch.cat([tokens, drawn])
        return DraftSample(token_ids=tokens, num_prompt_tokens=num_prompt_tokens, hidden=self.hidden(tokens), seed=seed)

    def samples(self, first_seed: int, number: int) -> list[DraftSample]:
        """Trajectories of several lengths."""
        return [self.sample(first_seed + i, 3 + i % 4, 12 + i % 9) for i in range(number)]


def toy_target(sharpness: float = 1.0) -> ToyTarget:
    """`sharpness` scales the logits: about 1 gives distributions with several likely tokens."""
    generator = torch.Generator().manual_seed(11)
    embedding, second, head = (torch.randn(VOCAB, HIDDEN, generator=generator) for _ in range(3))
    return ToyTarget(embedding=embedding, second=second, head=sharpness * head)


def toy_config(**own: object) -> DraftConfig:
    settings: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "intermediate_size": 32,
        "num_steps": 3,
    }
    return DraftConfig(**(settings | own))  # type: ignore[arg-type]


def scrambled_draft(seed: int = 0, **own: object) -> CloverDraft:
    """A draft with random parameters: one that starts as published is nearly the identity and hides mistakes."""
    torch.manual_seed(seed)
    draft = CloverDraft(toy_config(**own)).eval()
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.normal_(std=0.4)
    return draft
