"""Clover-2 drafts in a worker: feeds the draft model with hidden states and turns its beams into scored trees.

Owns the draft model and its state for each request. The embedding and the output head are the target's own, read
where the target reads them, so they change with it. What the model computes is `rollout.speculation.clover`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from actors.vllm_plugin.drafting import DraftLimits, DraftRequest
from actors.vllm_plugin.hidden_log import HiddenLog
from kernels.gumbel_sample import gumbel_noise
from rollout.errors import InvalidRequest
from rollout.speculation.clover import CloverDraft
from rollout.speculation.clover_config import load_draft, vocabulary_digest
from rollout.speculation.clover_state import DraftState
from rollout.speculation.clover_trees import grow_beams
from rollout.speculation.growth import ScoredTree, best_tree
from rollout.speculation_config import SpeculationConfig

HIDDEN_BYTES = 64 * 2**20  # of hidden states kept for a draft model that is off


class CloverDrafter:
    """Drafts with a model that reads the target's hidden states.

    Args:
        config: Names the draft's directory.
        vllm_config: Of the engine.
        model: The target, loaded.

    Raises:
        InvalidRequest: The draft was made for another model, or the target has no plain embedding and head.
    """

    needs_hidden = True

    def __init__(self, config: SpeculationConfig, vllm_config: Any, model: Any) -> None:
        assert config.draft_model is not None
        draft_config, tensors = load_draft(config.draft_model)
        target = vllm_config.model_config
        draft_config.check_target(
            vocab_size=target.get_vocab_size(),
            hidden_size=target.get_hidden_size(),
            vocabulary=vocabulary_digest(target.model),
        )
        self._embedding, self._head = _table(model, "embed_tokens"), _table(model, "lm_head")
        if len(self._embedding) < draft_config.vocab_size or len(self._head) < draft_config.vocab_size:
            raise InvalidRequest("target's vocabulary on this rank", len(self._head), f"all {draft_config.vocab_size}")
        self._embedding = self._embedding[: draft_config.vocab_size]
        self._head = self._head[: draft_config.vocab_size]
        self.draft = CloverDraft(draft_config).to(self._head.device, self._head.dtype)
        self.draft.load({name: tensor.to(self._head.dtype) for name, tensor in tensors.items()})
        self.draft.requires_grad_(False).eval()
        self._states: dict[str, DraftState] = {}
        self._log = HiddenLog(HIDDEN_BYTES)

    @torch.inference_mode()
    def propose(self, requests: Sequence[DraftRequest], limits: DraftLimits) -> list[ScoredTree]:
        able = [(request, state) for request in requests if (state := self._catch_up(request)) is not None]
        trees = dict.fromkeys((request.request_id for request in requests), ScoredTree.empty())
        if able:
            trees |= self._grow([request for request, _ in able], [state for _, state in able], limits)
        return [trees[request.request_id] for request in requests]

    def take_hidden(
        self, request_ids: Sequence[str], counts: np.ndarray, first: np.ndarray, rows: torch.Tensor
    ) -> None:
        self._log.add(request_ids, counts, first, rows)

    def learn(self, request: DraftRequest) -> None:
        """Nothing: hidden states are kept until they are needed."""

    def forget(self, request_id: str) -> None:
        self._states.pop(request_id, None)

    def _catch_up(self, request: DraftRequest) -> DraftState | None:
        """The request's state with all of its tokens; None if the target's last state is not here."""
        stop = len(request.token_ids) - 1  # position of the root; the hidden state before it emitted it
        state = self._states.get(request.request_id)
        if state is not None and state.position == stop:
            return state
        start = 0 if state is None or state.position > stop else state.position
        begin, hidden = self._log.since(request.request_id, start, stop)
        if hidden is None:
            return None
        if state is None or begin != state.position:
            state = self._states[request.request_id] = DraftState.at(begin)
        tokens = torch.from_numpy(request.token_ids[begin + 1 : stop + 1].astype(np.int64)).to(hidden.device)
        self.draft.extend([state], [len(tokens)], tokens, hidden.to(self._head.dtype), self._embedding)
        return state

    def _grow(
        self, requests: Sequence[DraftRequest], states: Sequence[DraftState], limits: DraftLimits
    ) -> dict[str, ScoredTree]:
        depth = min(limits.max_depth, max(request.max_depth for request in requests))
        device = self._head.device
        first = torch.tensor([len(request.token_ids) for request in requests], device=device)
        seeds = torch.tensor([request.seed for request in requests], device=device)
        positions = first[:, None] + torch.arange(depth, device=device)
        noise = gumbel_noise(seeds.repeat_interleave(depth), positions.flatten(), len(self._head))
        beams = grow_beams(
            self.draft,
            torch.stack([state.root for state in states if state.root is not None]),
            noise.view(len(requests), depth, -1),
            torch.tensor([request.temperature for request in requests], device=device),
            embedding=self._embedding,
            head=self._head,
            max_width=limits.max_width,
        )
        rows = zip(requests, beams.tokens.tolist(), beams.parents.tolist(), beams.scores.tolist(), strict=True)
        return {
            request.request_id: best_tree(
                tokens,
                parents,
                scores,
                max_width=limits.max_width,
                budget=request.budget,
                source=limits.source,
            )
            for request, tokens, parents, scores in rows
        }


def _table(model: Any, name: str) -> torch.Tensor:
    """The weight [rows, H] of the target's embedding or output head."""
    layer = getattr(model, name, None) or getattr(getattr(model, "model", None), name, None)
    weight = getattr(layer, "weight", None)
    if weight is None or not weight.is_floating_point():
        raise InvalidRequest(f"target's {name}", type(layer).__name__, "one in the activation dtype, to draft with")
    found: torch.Tensor = weight
    return found
