"""How many tokens a step a drafter would have saved on trajectories that are already written.

The keyed walk emits the target's own tokens, so a trajectory is what speculation would have written, whatever was
drafted; a tree is accepted as far as it holds the trajectory's next tokens. That makes acceptance exact without an
engine, and all positions of a trajectory can be tried at once.

Owns the trial of a drafter at every position, the count of steps, and prompt look-up as the yardstick. Knows nothing
of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from rollout.speculation.clover import CloverDraft, TargetLayers
from rollout.speculation.clover_samples import DraftSample, collate
from rollout.speculation.clover_trees import Beams, DraftSampling, grow_beams

SIDE_BY_SIDE = 32  # samples tried together
NO_TOKEN = -1  # behind a trajectory's end; no candidate equals it


@dataclass(frozen=True, slots=True, kw_only=True)
class Roots:
    """Every place where trees of some samples can grow, in order of samples and positions.

    Attributes:
        states: [R, H].
        truth: int64 [R, D], the trajectory's tokens after each root, NO_TOKEN behind its end.
        seeds: int64 [R].
        positions: int64 [R], of the root token.
        lengths: Roots of each sample.
    """

    states: torch.Tensor
    truth: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeShape:
    """Limits of every tree of a trial.

    Attributes:
        max_width: Nodes in a layer at most.
        depth: Layers.
        budget: Nodes at most.
        is_keyed: Rank candidates with the noise; False ranks by probability alone.
    """

    max_width: int
    depth: int
    budget: int
    is_keyed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """What a drafter saved.

    Attributes:
        num_tokens: Tokens after the first of every trajectory (that one comes with the prompt's forward).
        num_steps: Forward passes they took.
        num_drafted: Nodes verified.
        by_depth: Steps that accepted at least 1, 2, … drafted tokens.
    """

    num_tokens: int
    num_steps: int
    num_drafted: int
    by_depth: tuple[int, ...]

    @property
    def tokens_per_step(self) -> float:
        """Mean accepted length, the target's own token included."""
        return self.num_tokens / max(self.num_steps, 1)


@torch.inference_mode()
def roots_of(draft: CloverDraft, samples: Sequence[DraftSample], target: TargetLayers, depth: int) -> Roots:
    """Run the augmenting block over samples and collect their roots."""
    batch = collate(samples)
    states = draft.roots(batch.tokens, batch.hidden, target)
    kept, truth, positions, seeds, lengths = [], [], [], [], []
    for row, sample in enumerate(samples):
        first, stop = sample.num_prompt_tokens, len(sample.token_ids) - 1  # the last token ends it: no root
        places = torch.arange(first, stop)
        padded = torch.cat([sample.token_ids, torch.full((depth,), NO_TOKEN)])
        kept.append(states[row, first - 1 : stop - 1])
        truth.append(padded[places[:, None] + torch.arange(1, depth + 1)])
        positions.append(places)
        seeds.append(torch.full((len(places),), sample.seed))
        lengths.append(len(places))
    return Roots(
        states=torch.cat(kept),
        truth=torch.cat(truth),
        seeds=torch.cat(seeds),
        positions=torch.cat(positions),
        lengths=tuple(lengths),
    )


def best_nodes(scores: torch.Tensor, budget: int) -> torch.Tensor:
    """Which nodes [B, N] of `Beams` are among each tree's best `budget`, as `rollout.speculation.growth` chooses.

    A child is never likelier than its parent and comes after it where they tie, so what is kept is a tree.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks) < budget


def matched(beams: Beams, kept: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """How many tokens of the truth [R, D] each tree of kept nodes holds along one path: int64 [R]."""
    row = torch.zeros(len(truth), dtype=torch.long, device=truth.device)
    count = torch.zeros_like(row)
    for depth in range(beams.tokens.shape[1] // beams.max_width):
        start = depth * beams.max_width
        nodes = slice(start, start + beams.max_width)
        hit = kept[:, nodes] & (beams.parents[:, nodes] == row[:, None])
        hit &= beams.tokens[:, nodes] == truth[:, depth, None]
        found = hit.any(1) & (count == depth)
        row = torch.where(found, start + 1 + hit.int().argmax(1), row)
        count += found
    return count


def count_steps(matches: Sequence[int], drafted: Sequence[int], lengths: Sequence[int], depth: int) -> Acceptance:
    """Walk every trajectory from its first root, each step as far as its tree goes.

    Args:
        matches: Drafted tokens accepted at every root, R of them in order.
        drafted: Nodes of the tree at every root.
        lengths: Roots of each trajectory.
        depth: Deepest tree.
    """
    num_tokens, num_steps, num_drafted, start = 0, 0, 0, 0
    by_depth = [0] * depth
    for length in lengths:
        place = 0
        while place < length:
            accepted = matches[start + place]
            num_steps, num_drafted = num_steps + 1, num_drafted + drafted[start + place]
            for reached in range(accepted):
                by_depth[reached] += 1
            place += accepted + 1
        # A tree that holds the trajectory's last token saves the target's own one after it: nothing follows.
        num_tokens += length
        start += length
    return Acceptance(num_tokens=num_tokens, num_steps=num_steps, num_drafted=num_drafted, by_depth=tuple(by_depth))


def simulate_draft(
    draft: CloverDraft,
    samples: Sequence[DraftSample],
    shapes: Sequence[TreeShape],
    *,
    target: TargetLayers,
    temperature: float,
) -> list[Acceptance]:
    """Acceptance of the draft on trajectories that were sampled with keyed noise.

    Args:
        draft: The model.
        samples: With the seeds they were sampled with.
        shapes: Trees to try.
        target: The layers shared with the draft.
        temperature: The samples were drawn at.

    Returns:
        What each shape saved, in order.
    """
    depth = max(shape.depth for shape in shapes)
    matches: list[list[int]] = [[] for _ in shapes]
    drafted: list[list[int]] = [[] for _ in shapes]
    lengths: list[int] = []
    for some in _slices(samples, SIDE_BY_SIDE):
        roots = roots_of(draft, some, target, depth)
        lengths += roots.lengths
        if not len(roots.truth):
            continue
        sampling = DraftSampling(seeds=roots.seeds, temperature=torch.full(roots.seeds.shape, temperature))
        noise = sampling.noise(roots.positions, depth, draft.config.vocab_size)
        for number, shape in enumerate(shapes):
            heard = noise[:, : shape.depth] * float(shape.is_keyed)
            limits = {"max_width": shape.max_width, "budget": shape.budget}
            beams = grow_beams(draft, target, roots.states, heard, sampling, **limits)
            kept = best_nodes(beams.scores, shape.budget)
            matches[number] += matched(beams, kept, roots.truth).tolist()
            drafted[number] += kept.sum(1).tolist()
    return [
        count_steps(mine, nodes, lengths, shape.depth)
        for mine, nodes, shape in zip(matches, drafted, shapes, strict=True)
    ]


def look_up(tokens: Sequence[int], *, min_ngram: int, max_ngram: int, depth: int) -> Sequence[int]:
    """Draft by prompt look-up: what followed the earliest of the longest earlier matches of the last tokens.

    The rule of vLLM's ngram drafter (v1/spec_decode/ngram_proposer.py), written as its definition.

    Args:
        tokens: Prompt and output so far.
        min_ngram, max_ngram: Lengths of suffixes that are looked up, the longest first.
        depth: Tokens to draft at most.
    """
    for size in range(min(max_ngram, len(tokens) - 1), min_ngram - 1, -1):
        suffix = tokens[len(tokens) - size :]
        for start in range(len(tokens) - size):
            if tokens[start : start + size] == suffix:
                return tokens[start + size : start + size + depth]
    return ()


def simulate_look_up(samples: Sequence[DraftSample], *, min_ngram: int, max_ngram: int, depth: int) -> Acceptance:
    """Acceptance of prompt look-up on trajectories."""
    matches, drafted, lengths = [], [], []
    for sample in samples:
        tokens = sample.token_ids.tolist()
        for place in range(sample.num_prompt_tokens, len(tokens) - 1):
            draft = look_up(tokens[: place + 1], min_ngram=min_ngram, max_ngram=max_ngram, depth=depth)
            truth = tokens[place + 1 : place + 1 + len(draft)]
            matches.append(next((i for i, (a, b) in enumerate(zip(draft, truth, strict=False)) if a != b), len(truth)))
            drafted.append(len(draft))
        lengths.append(len(tokens) - 1 - sample.num_prompt_tokens)
    return count_steps(matches, drafted, lengths, depth)


def _slices(samples: Sequence[DraftSample], size: int) -> Iterator[Sequence[DraftSample]]:
    """Samples of similar length together."""
    ordered = sorted(samples, key=lambda s: len(s.token_ids))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
