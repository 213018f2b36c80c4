"""A target small enough to be written down: its hidden state depends on its last two tokens only."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.gumbel_sample import gumbel_sample
from rollout.speculation.clover import CloverDraft, TargetLayers
from rollout.speculation.clover_config import DraftConfig
from rollout.speculation.clover_samples import DraftSample

VOCAB, HIDDEN = 24, 16
LENGTHS = 4  # kinds of trajectories in `ToyTarget.samples`


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
        """[..., n] → [..., n, H]; the token before the first counts as token 0."""
        before = torch.cat([torch.zeros_like(tokens[..., :1]), tokens[..., :-1]], dim=-1)
        state = torch.tanh(self.embedding[tokens] + self.second[before])
        return state / state.square().mean(-1, keepdim=True).sqrt()

    def sample(self, seed: int, num_prompt_tokens: int, num_tokens: int) -> DraftSample:
        """A trajectory drawn with keyed noise, from a prompt that follows from the seed."""
        return self._sample([seed], num_prompt_tokens, num_tokens)[0]

    def samples(self, first_seed: int, number: int) -> list[DraftSample]:
        """Trajectories of several lengths."""
        found = []
        for kind in range(LENGTHS):
            seeds = list(range(first_seed + kind, first_seed + number, LENGTHS))
            found += self._sample(seeds, 3 + kind, 12 + 2 * kind) if seeds else []
        return found

    def _sample(self, seeds: list[int], num_prompt_tokens: int, num_tokens: int) -> list[DraftSample]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        tokens = torch.stack([torch.randint(1, VOCAB, (num_prompt_tokens,), generator=g) for g in generators])
        keys = torch.tensor(seeds)
        for position in range(num_prompt_tokens, num_prompt_tokens + num_tokens):
            drawn, _ = gumbel_sample(
                self.hidden(tokens[:, -2:])[:, -1] @ self.head.T,
                seeds=keys,
                positions=torch.full_like(keys, position),
                temperature=torch.ones(len(keys)),
            )
            tokens = torch.cat([tokens, drawn[:, None]], dim=1)
        return [
            DraftSample(token_ids=row, num_prompt_tokens=num_prompt_tokens, hidden=self.hidden(row), seed=seed)
            for row, seed in zip(tokens, seeds, strict=True)
        ]


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
