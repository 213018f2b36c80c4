"""Sibling drafts in a worker: feeds `rollout.speculation.suffix` with what runs here and with what other shards send.

Owns the index and the positions up to which it knows each request. Tokens of other shards come through the control
line, in other threads, and are taken in a few at a time between steps, so that no step waits for a long message.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from actors.vllm_plugin.draft_records import DraftLimits, DraftRequest
from rollout.speculation.growth import ScoredTree
from rollout.speculation.histories import MAX_CONTEXT
from rollout.speculation.suffix import SiblingIndex, SiblingTokens
from rollout.speculation_config import SpeculationConfig

TOKENS_A_STEP = 128  # of other shards that are taken in before a proposal: about a third of a millisecond


class SiblingDrafter:
    """Drafts from what the group's members, here and elsewhere, went on with.

    Args:
        config: The memory it may take.
        vllm_config, model: Unused.
    """

    needs_hidden = False
    learns = True

    def __init__(self, config: SpeculationConfig, vllm_config: Any, model: Any) -> None:
        self._index = SiblingIndex(config.sibling_tokens)
        self._known: dict[str, int] = {}  # request → tokens of it that were taken in
        self._waiting: deque[SiblingTokens] = deque()
        self._lock = threading.Lock()

    def prepare(self, requests: Sequence[DraftRequest]) -> None:
        """Take in the histories of requests that are new here."""
        with self._lock:
            for request in requests:
                if request.request_id not in self._known:
                    self._take_in(request)

    def propose(self, requests: Sequence[DraftRequest], limits: DraftLimits) -> list[ScoredTree]:
        with self._lock:
            self._take_waiting()
            for request in requests:
                self._take_in(request)
            return [self._draft(request, limits) for request in requests]

    def take_hidden(
        self, request_ids: Sequence[str], counts: np.ndarray | None, first: np.ndarray, rows: torch.Tensor
    ) -> None:
        """Nothing."""

    def learn(self, request: DraftRequest) -> None:
        """Take in what a request has said, without drafting for it."""
        with self._lock:
            self._take_in(request)

    def end(self, request: DraftRequest) -> None:
        """Take in the rest; what was said stays."""
        self.learn(request)
        self.forget(request.request_id)

    def forget(self, request_id: str) -> None:
        """What was taken in stays."""
        self._known.pop(request_id, None)

    def delta(self, receiver: str) -> tuple[SiblingTokens, ...]:
        """What has been generated here since this receiver last asked. From any thread."""
        with self._lock:
            return self._index.delta(receiver)

    def apply(self, delta: Sequence[SiblingTokens]) -> None:
        """Take in, before long, what another shard has generated. From any thread."""
        self._waiting.extend(delta)

    def _take_in(self, request: DraftRequest) -> None:
        if request.group is None or request.member is None:
            return
        known, tokens = self._known.get(request.request_id), request.token_ids
        if known is None:
            known = request.num_prompt_tokens
            self._index.begin(request.group, request.member, tokens[:known].tolist())
        if len(tokens) > known:
            self._index.add(request.group, request.member, tokens[known:].tolist(), start=known)
        self._known[request.request_id] = len(tokens)

    def _take_waiting(self) -> None:
        left = TOKENS_A_STEP
        while self._waiting and left > 0:
            one = self._waiting.popleft()
            if len(one.tokens) > left:
                rest = SiblingTokens(
                    group=one.group, member=one.member, start=one.start + left, tokens=one.tokens[left:]
                )
                self._waiting.appendleft(rest)
                one = SiblingTokens(group=one.group, member=one.member, start=one.start, tokens=one.tokens[:left])
            left -= len(one.tokens)
            self._index.apply((one,))

    def _draft(self, request: DraftRequest, limits: DraftLimits) -> ScoredTree:
        if request.group is None:
            return ScoredTree.empty()
        return self._index.propose(
            request.group,
            request.token_ids[-MAX_CONTEXT:].tolist(),
            max_width=limits.max_width,
            max_depth=min(limits.max_depth, request.max_depth),
            budget=request.budget,
        )
