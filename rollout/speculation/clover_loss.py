"""The distillation loss of Clover-2 over whole sequences of the target.

At every depth the draft is taught two things at once: the hidden state the target's output head read (smooth L1) and
the distribution that came of it (cross entropy with soft labels), the way of EAGLE (arXiv 2401.15077) that Clover-2
(arXiv 2408.00264) takes over; deeper layers weigh less, as they are reached less often. Drafted tokens are the
sequence's own (teacher forcing).

Owns the loss. Knows nothing of optimisers or of where sequences come from.

Shape legend: R rows (a row is a root: a generated token that is followed by another), H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.gumbel_sample import gumbel_noise
from rollout.speculation.clover import CloverDraft, TargetLayers
from rollout.speculation.clover_config import DraftConfig
from rollout.speculation.clover_samples import DraftBatch

KEYED_ROWS = 128
"""Rows of a batch that the trust layer learns from, and agreement is measured on: noise costs more than logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """How the parts of the loss are mixed; the published values.

    Attributes:
        hidden: Of the smooth L1 distance of hidden states (mean over H).
        token: Of the cross entropy with the target's distribution.
        trust: Of the cross entropy of `keyed_scores` with the token drawn, which reaches the trust layer only.
        decay: Each depth weighs this much of the one before it.
    """

    hidden: float = 10.0
    token: float = 1.0
    trust: float = 1.0
    decay: float = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftLoss:
    """The loss of a batch.

    Attributes:
        loss: Scalar with gradient.
        agreement: For each depth, the share of some rows where the draft's likeliest token is the target's likeliest.
    """

    loss: torch.Tensor
    agreement: tuple[float, ...]


def distillation_loss(
    draft: CloverDraft,
    batch: DraftBatch,
    where: tuple[torch.Tensor, torch.Tensor],
    *,
    target: TargetLayers,
    weights: LossWeights,
    temperature: float = 1.0,
) -> DraftLoss:
    """Teach the draft on one batch.

    Args:
        draft: With gradients enabled.
        batch: Sequences of the target and its hidden states.
        where: int64 [R] sequences and places of the roots to draft from, see `draw_roots`.
        target: The layers shared with the draft.
        weights: Of the parts.
        temperature: Of sampling, > 0: both distributions are taken at it.

    Returns:
        The loss, a mean over rows at each depth and a weighted sum over depths; 0 where nothing can be learnt.
    """
    sequence, place = where
    state = draft.roots(batch.tokens, batch.hidden, target)[sequence, place - 1]
    output = draft.root_output(state)
    is_output = F.pad(batch.is_output, (0, draft.config.num_steps))
    keyed = _KeyedNoise(batch, where, draft.config)
    total, agreement = state.new_zeros(()), []
    for depth in range(draft.config.num_steps):
        if depth:
            # Rows go on while the drafted token is followed by another one.
            goes_on = is_output[sequence, place + depth + 1]
            sequence, place, state = sequence[goes_on], place[goes_on], state[goes_on]
            keyed.keep(goes_on)
            state, output = draft.next_state(state, target.embed(batch.tokens[sequence, place + depth]))
        if not len(place):
            break
        hidden = batch.hidden[sequence, place + depth]
        with torch.no_grad():
            probs = (target.logits(hidden) / temperature).softmax(-1)
        logits = target.logits(output)
        distance = F.smooth_l1_loss(output, hidden)
        cross_entropy = F.cross_entropy(logits / temperature, probs)
        total = total + weights.decay**depth * (weights.hidden * distance + weights.token * cross_entropy)
        rows = keyed.rows
        if len(rows):
            # Trust only learns to use what the draft says: no gradient into what it says.
            noise = temperature * keyed.noise(depth)
            scores = draft.keyed_scores(output[rows].detach(), logits[rows].detach(), noise, depth)
            drawn = batch.tokens[sequence[rows], place[rows] + depth + 1]
            total = total + weights.trust * F.cross_entropy(scores, drawn)
            agreement.append(float((logits[rows].argmax(-1) == probs[rows].argmax(-1)).float().mean()))
    return DraftLoss(loss=total, agreement=tuple(agreement))


class _KeyedNoise:
    """The noise of the first rows of a batch, as rows drop out with depth."""

    def __init__(self, batch: DraftBatch, where: tuple[torch.Tensor, torch.Tensor], config: DraftConfig) -> None:
        sequence, place = where[0][:KEYED_ROWS], where[1][:KEYED_ROWS]
        places = place[:, None] + torch.arange(1, config.num_steps + 1, device=place.device)
        seeds = batch.seeds[sequence][:, None].expand_as(places)
        noise = gumbel_noise(seeds.flatten(), places.flatten(), config.vocab_size)
        self._noise = noise.unflatten(0, places.shape)
        self._row = torch.arange(len(where[0]), device=place.device)  # of each row left, what it was at first

    def keep(self, kept: torch.Tensor) -> None:
        """Drop rows, as the caller does: bool [R]."""
        self._row = self._row[kept]

    @property
    def rows(self) -> torch.Tensor:
        """Which of the rows left have noise."""
        return (self._row < len(self._noise)).nonzero().squeeze(1)

    def noise(self, depth: int) -> torch.Tensor:
        """Of these rows, [rows, V]."""
        return self._noise[self._row[self.rows], depth]


def draw_roots(batch: DraftBatch, limit: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Places where a tree can grow: generated tokens that another one follows.

    Args:
        batch: The sequences.
        limit: Places at most; where there are more, a random choice of them.
        generator: Of the choice, on the CPU.

    Returns:
        int64 [R] sequences, int64 [R] indices of the root tokens, in random order.
    """
    is_root = batch.is_output[:, :-1] & batch.is_output[:, 1:]
    sequence, place = is_root.nonzero(as_tuple=True)
    chosen = torch.randperm(len(place), generator=generator)[:limit].to(place.device)
    return sequence[chosen], place[chosen]
