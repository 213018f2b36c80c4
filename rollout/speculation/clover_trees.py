"""From roots to scored token trees: a beam of at most max_width nodes in each layer, for a whole batch at once.

The target draws its token at a position as the arg max of logits + T · Gumbel(seed, position), and the drafter knows
that noise, so candidates are ranked by logits and noise together (`CloverDraft.keyed_scores`), not by probability. A
node's score is the sum of the log-probabilities along its path.

Owns the growth of one batch. Knows nothing of engines or of other drafters; `rollout.speculation.growth` chooses
among what is grown here and merges it with what others propose.

Shape legend: B requests, W nodes in a layer, D depth, N = W · D nodes, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from kernels.clover_draft import DraftShape, NativeDraft
from kernels.gumbel_sample import gumbel_noise, truncation_threshold
from rollout.errors import InvalidRequest
from rollout.speculation.clover import CloverDraft, TargetLayers, check_rows
from rollout.speculation.clover_state import DraftState
from rollout.speculation.growth import ScoredTree, beam_tree
from rollout.speculation.tree import check_limits


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSampling:
    """How the requests of a batch draw; all on the draft's device.

    Attributes:
        seeds: int64 [B], keys of their noise.
        temperature: float32 [B]; 0 is greedy.
        top_k: int64 [B], 0 for a request without; None where no request has one.
        top_p: float32 [B], 1 for a request without; None where no request has one.
    """

    seeds: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None

    def noise(self, positions: torch.Tensor, depth: int, vocab_size: int) -> torch.Tensor:
        """T · Gumbel noise, float32 [B, depth, V], of the positions behind each root at int64 [B] positions."""
        places = positions[:, None] + torch.arange(1, depth + 1, device=positions.device)
        noise = gumbel_noise(self.seeds[:, None].expand_as(places).flatten(), places.flatten(), vocab_size)
        return noise.unflatten(0, (-1, depth)).mul_(self.temperature[:, None, None])

    def cut(self, logits: torch.Tensor) -> torch.Tensor:
        """Float32 logits [B, W, V] with what top-k and top-p leave out at -inf."""
        if self.top_k is None and self.top_p is None:
            return logits.float()
        width = logits.shape[1]
        temperature = self.temperature.repeat_interleave(width)
        threshold = truncation_threshold(
            logits.flatten(0, 1).float(),
            temperature=temperature,
            top_k=None if self.top_k is None else self.top_k.repeat_interleave(width),
            top_p=None if self.top_p is None else self.top_p.repeat_interleave(width),
        )
        # Compared as the threshold was made, by the rounded 1 / T: times T it may lie above the largest logit.
        # Greedy rows have a threshold of -inf, so nothing of them is cut.
        inverse = torch.where(temperature == 0, 1.0, temperature).reciprocal().view(-1, width, 1)
        return logits.float().masked_fill(logits.float() * inverse < threshold.view(-1, width, 1), -torch.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Beams:
    """Candidate nodes of B trees, layer by layer; parents first, scores never above the parent's.

    Attributes:
        tokens: int64 [B, N].
        parents: int64 [B, N], rows as in `rollout.speculation.tree`: 0 is the root, i + 1 is node i.
        scores: float32 [B, N], log-probability that the node is accepted.
        max_width: Nodes of each layer.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    scores: torch.Tensor
    max_width: int


@torch.inference_mode()
def grow_beams(
    draft: CloverDraft,
    target: TargetLayers,
    roots: torch.Tensor,
    noise: torch.Tensor,
    sampling: DraftSampling,
    *,
    max_width: int,
    budget: int,
) -> Beams:
    """Draft from roots.

    Args:
        draft: The model.
        target: The layers it shares.
        roots: [B, H] states.
        noise: float32 [B, D, V] from `DraftSampling.noise`; D layers are drafted at most.
        sampling: How the requests draw.
        max_width: Nodes in a layer at most.
        budget: No tree will keep more nodes than this, so growth ends once none could still enter.
    """
    max_depth, vocab_size = noise.shape[1:]
    width = min(max_width, vocab_size)
    state, output = roots[:, None], draft.root_output(roots)[:, None]
    path = torch.zeros(len(roots), 1, device=roots.device)
    token = parent = torch.zeros(len(roots), 1, dtype=torch.long, device=roots.device)
    tokens: list[torch.Tensor] = []
    parents: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []
    for layer in range(max_depth):
        if layer:
            state = state.gather(1, parent[..., None].expand(-1, -1, state.shape[-1]))
            state, output = draft.next_state(state, target.embed(token))
        logits = sampling.cut(target.logits(output))
        chances, best = draft.keyed_scores(output, logits, noise[:, layer, None], layer).log_softmax(-1).topk(width)
        path, place = (path[..., None] + chances).flatten(1).topk(width)
        token, parent = best.flatten(1).gather(1, place), place // width
        tokens.append(token)
        parents.append(parent + (1 + (layer - 1) * width if layer else 0))
        scores.append(path)
        if (layer + 1) * width >= budget and layer + 1 < max_depth:
            floor = torch.cat(scores, 1).topk(budget).values[:, -1]
            if bool((path[:, 0] <= floor).all()):
                break
    return Beams(
        tokens=torch.cat(tokens, 1),
        parents=torch.cat(parents, 1),
        scores=torch.cat(scores, 1),
        max_width=width,
    )


class CloverProposer:
    """Drafts for running requests. Owns nothing but the model: states belong to the caller, by request.

    In bfloat16 or float32 on a CPU with AVX-512 it runs on `kernels.clover_draft`.

    Args:
        draft: The model, on the device of the hidden states.
        target: The layers it shares; where their matrices change in place, nothing needs to be told.
        source: Bit of this drafter in the trees it proposes.
    """

    def __init__(self, draft: CloverDraft, target: TargetLayers, source: int = 1) -> None:
        self.draft, self._target, self._source = draft.eval(), target, source
        self._native = _native(draft, target)

    @torch.inference_mode()
    def extend(
        self, states: Sequence[DraftState], counts: Sequence[int], tokens: torch.Tensor, hidden: torch.Tensor
    ) -> None:
        """Take in accepted or prefilled tokens: see `CloverDraft.extend`."""
        if self._native is None:
            self.draft.extend(states, counts, tokens, hidden, self._target)
            return
        check_rows(counts, tokens, hidden)
        config = self.draft.config
        places = [one.place_for(config, count, hidden) for one, count in zip(states, counts, strict=True)]
        for one, count, root in zip(states, counts, self._native.extend(places, tokens, hidden), strict=True):
            one.advance(count, root)

    def propose(
        self,
        states: Sequence[DraftState],
        sampling: DraftSampling,
        budgets: Sequence[int],
        *,
        max_width: int,
        max_depth: int,
    ) -> list[ScoredTree]:
        """A tree for each of B requests, best nodes first.

        Args:
            states: Extended up to the last accepted token.
            sampling: How the requests draw, B of each.
            budgets: Nodes of each tree at most; at least 1.
            max_width: Nodes in a layer at most, in [1, MAX_WIDTH].
            max_depth: Layers at most.

        Raises:
            InvalidRequest: A limit is impossible, or a state has taken in nothing yet.
        """
        for budget in budgets:
            check_limits(max_width=max_width, budget=budget)
        if max_depth < 1:
            raise InvalidRequest("max_depth", max_depth, "at least 1")
        roots = [state.root for state in states if state.root is not None]
        if len(roots) < len(states) or len(budgets) != len(states):
            got = f"{len(states)} states, {len(roots)} of them with a root, and {len(budgets)} budgets"
            raise InvalidRequest("draft states", got, "states that have taken in a token, and a budget for each")
        if not states:
            return []
        positions = torch.tensor([state.position for state in states], device=roots[0].device)
        beams = self._grow(torch.stack(roots), positions, sampling, max_width, max_depth, max(budgets))
        rows = zip(beams.tokens.tolist(), beams.parents.tolist(), beams.scores.tolist(), budgets, strict=True)
        return [
            beam_tree(tokens, parents, scores, budget=budget, source=self._source)
            for tokens, parents, scores, budget in rows
        ]

    def _grow(
        self,
        roots: torch.Tensor,
        positions: torch.Tensor,
        sampling: DraftSampling,
        max_width: int,
        max_depth: int,
        budget: int,
    ) -> Beams:
        if self._native is not None:
            tokens, parents, scores = self._native.grow(
                roots,
                sampling.seeds,
                positions,
                sampling.temperature,
                sampling.top_k,
                sampling.top_p,
                max_depth=max_depth,
                max_width=max_width,
                budget=budget,
            )
            return Beams(tokens=tokens, parents=parents, scores=scores, max_width=max_width)
        noise = sampling.noise(positions, max_depth, self.draft.config.vocab_size)
        return grow_beams(self.draft, self._target, roots, noise, sampling, max_width=max_width, budget=budget)


def _native(draft: CloverDraft, target: TargetLayers) -> NativeDraft | None:
    """The same draft on `kernels.clover_draft`, where that runs."""
    if target.matrices is None:
        return None
    shape = DraftShape(**{field.name: getattr(draft.config, field.name) for field in fields(DraftShape)})
    return NativeDraft.of(shape, dict(draft.named_parameters()), *target.matrices)
