"""Clover-2 drafts in a worker: feeds `rollout.speculation.clover` with the target's hidden states.

Owns the draft model, its state for each request, and the states that outlive requests: members of a group find their
prompt in the engine's prefix cache, and so do later chunks of a trajectory, so its hidden states are not computed
again. Embedding and output head are the target's own, read where the target reads them, so they change with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from actors.vllm_plugin.draft_records import DraftLimits, DraftRequest
from actors.vllm_plugin.hidden_log import HiddenLog
from rollout.errors import InvalidRequest
from rollout.speculation.clover import CloverDraft, TargetLayers
from rollout.speculation.clover_config import load_draft, vocabulary_digest
from rollout.speculation.clover_state import DraftState, StateStore
from rollout.speculation.clover_trees import CloverProposer, DraftSampling
from rollout.speculation.growth import ScoredTree
from rollout.speculation_config import SpeculationConfig

HIDDEN_BYTES = 64 * 2**20  # of hidden states kept for a draft model that is off
HIDDEN_STEPS = 4096  # that they are of; one that was off for longer begins there
LAGGING_ROWS = 16  # that a request has not taken in, from which on it was not drafted for in the step before
STATE_BYTES = 64 * 2**20  # of states of prompts and of requests that ended


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
    learns = False  # hidden states are kept until they are needed

    def __init__(self, config: SpeculationConfig, vllm_config: Any, model: Any) -> None:
        assert config.draft_model is not None
        draft_config, tensors = load_draft(config.draft_model)
        target = vllm_config.model_config
        draft_config.check_target(
            vocab_size=target.get_vocab_size(),
            hidden_size=target.get_hidden_size(),
            vocabulary=vocabulary_digest(target.model),
        )
        embedding = _table(model, "embed_tokens", draft_config.vocab_size)
        head = _table(model, "lm_head", draft_config.vocab_size)
        self._dtype, self._device = head.dtype, head.device
        self.draft = CloverDraft(draft_config).to(head.device, head.dtype)
        self.draft.load({name: tensor.to(head.dtype) for name, tensor in tensors.items()})
        self.draft.requires_grad_(False)
        self._layers = TargetLayers.of(embedding, head)
        self._proposer = CloverProposer(self.draft, self._layers)
        self._states: dict[str, DraftState] = {}
        self._log = HiddenLog(HIDDEN_BYTES, HIDDEN_STEPS)
        self._store = StateStore(STATE_BYTES)

    @torch.inference_mode()
    def prepare(self, requests: Sequence[DraftRequest]) -> None:
        lagging = [request for request in requests if self._lag(request) > LAGGING_ROWS]
        self._catch_up(lagging, leave=1)  # what a step brings at least is left to it

    @torch.inference_mode()
    def propose(self, requests: Sequence[DraftRequest], limits: DraftLimits) -> list[ScoredTree]:
        self._catch_up(requests)
        able = [request for request in requests if self._is_ready(request)]
        if not able:
            return [ScoredTree.empty()] * len(requests)
        trees = self._proposer.propose(
            [self._states[request.request_id] for request in able],
            self._sampling(able),
            [request.budget for request in able],
            max_width=limits.max_width,
            max_depth=min(limits.max_depth, max(request.max_depth for request in able)),
        )
        found = {request.request_id: tree for request, tree in zip(able, trees, strict=True)}
        return [found.get(request.request_id, ScoredTree.empty()) for request in requests]

    def take_hidden(
        self, request_ids: Sequence[str], counts: np.ndarray | None, first: np.ndarray, rows: torch.Tensor
    ) -> None:
        self._log.add(request_ids, counts, first, rows)

    def learn(self, request: DraftRequest) -> None:
        """Nothing."""

    def end(self, request: DraftRequest) -> None:
        """Keep the state for the next chunk of the trajectory."""
        state = self._states.pop(request.request_id, None)
        if state is not None and state.length:
            self._store.keep(request.token_ids, state)

    def forget(self, request_id: str) -> None:
        self._states.pop(request_id, None)

    def _is_ready(self, request: DraftRequest) -> bool:
        state = self._states.get(request.request_id)
        return state is not None and state.root is not None and state.position == len(request.token_ids) - 1

    def _lag(self, request: DraftRequest) -> int:
        """Rows that the request has yet to take in."""
        state = self._states.get(request.request_id)
        return len(request.token_ids) - 1 - (0 if state is None else state.position)

    def _catch_up(self, requests: Sequence[DraftRequest], leave: int = 0) -> None:
        """Bring the states of the requests to their last tokens, as far as the target's hidden states are here.

        Args:
            requests: Whose.
            leave: Rows of each that are left.
        """
        states, counts, tokens, rows = [], [], [], []
        for request in requests:
            stop = len(request.token_ids) - 1 - leave  # of the root; the state before it emitted it
            state = self._states.get(request.request_id)
            if state is not None and state.position >= stop:
                if state.position > stop:  # preempted, and what was sampled at a change of weights dropped
                    del self._states[request.request_id]
                continue
            begin, hidden = self._log.since(request.request_id, 0 if state is None else state.position, stop)
            if hidden is None:
                continue
            if state is None or state.position != begin:
                state = self._states[request.request_id] = self._store.start(request.token_ids, begin)
            states.append(state)
            counts.append(len(hidden))
            tokens.append(request.token_ids[begin + 1 : stop + 1])
            rows.append(hidden)
        if states:
            new = torch.from_numpy(np.concatenate(tokens).astype(np.int64)).to(self._device)
            self._proposer.extend(states, counts, new, torch.cat(rows).to(self._dtype))

    def _sampling(self, requests: Sequence[DraftRequest]) -> DraftSampling:
        """How these requests draw."""

        def column(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self._device)

        has_k = any(request.top_k for request in requests)
        has_p = any(request.top_p < 1 for request in requests)
        return DraftSampling(
            seeds=column([request.seed for request in requests], torch.int64),
            temperature=column([request.temperature for request in requests], torch.float32),
            top_k=column([request.top_k or 0 for request in requests], torch.int64) if has_k else None,
            top_p=column([request.top_p for request in requests], torch.float32) if has_p else None,
        )


def _table(model: Any, name: str, num_rows: int) -> torch.Tensor:
    """The weight [num_rows, H] of the target's embedding or output head."""
    layer = getattr(model, name, None) or getattr(getattr(model, "model", None), name, None)
    weight = getattr(layer, "weight", None)
    if weight is None or not weight.is_floating_point() or len(weight) < num_rows:
        got = type(layer).__name__ if weight is None else f"{weight.dtype} of shape {tuple(weight.shape)}"
        raise InvalidRequest(f"target's {name}", got, f"{num_rows} rows in the activation dtype, to draft with")
    found: torch.Tensor = weight.detach()[:num_rows]
    return found
