"""One worker's weights: what the forward reads, the shadow beside it, and their place in the sync protocol.

    stage ─► shadow (canonical bytes, host) ─ verify: prepare ─► next live tensors ─ flip: copy ─► live weights

Everything that can fail happens before the flip; the flip copies ready tensors over the live ones, whose
addresses never change (captured graphs stay valid). Owns the tensors; the rules are those of
`rollout.sync.participant`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from actors.vllm_plugin.live import LiveWeight, live_weights, take_initial_rows
from actors.vllm_plugin.versioned import WeightGate
from rollout.memory import EXPERT_PART
from rollout.sync.encoding import TensorPlan
from rollout.sync.manifest import BucketRef
from rollout.sync.participant import Participant
from rollout.sync.segments import Segment
from rollout.sync.shadow import Shadow


def num_local_experts(model: torch.nn.Module) -> int:
    """Routed experts of each layer held here; 0 for a model without routed experts."""
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            if module.expert_map is None:
                return int(module.global_num_experts)
            return int((module.expert_map >= 0).sum())
    return 0


class WorkerStore:
    """The participant's store: shadow and live weights of one worker.

    Args:
        model: As vLLM loaded it.
        plans: Encoding of every tensor of the checkpoint.
        version: Of the loaded weights.
        draft: Weights of a draft model that travel with the model's.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        plans: Mapping[str, TensorPlan],
        version: int,
        draft: Sequence[LiveWeight] = (),
    ) -> None:
        self._weights = [*live_weights(model, plans), *draft]
        initial = take_initial_rows(model, plans) | {name: rows for one in draft for name, rows in one.initial_rows()}
        # Copies: the rows of a plain tensor are a view of it, and these will be written while it is served.
        rows = {name: found.clone() for name, found in initial.items()}
        drafted = {plan.name: plan for one in draft for plan in one.plans}
        self._shadow = Shadow({**plans, **drafted}, rows, version)
        self._common = [name for name in self._shadow.names if EXPERT_PART not in name]
        self._next: list[tuple[LiveWeight, tuple[torch.Tensor, ...]]] = []

    def begin(self, base: int | None) -> None:
        self._shadow.begin(base)

    def stage(self, ref: BucketRef, payload: torch.Tensor | Segment) -> None:
        self._shadow.stage(ref, payload)

    def missing(self) -> list[str]:
        return self._shadow.missing()

    def digest(self) -> str:
        return self._shadow.common_digest(self._common)

    def prepare(self) -> None:
        changed = self._shadow.changed
        self._next = [
            (weight, weight.prepare({name: self._shadow.rows(name) for name in weight.sources}))
            for weight in self._weights
            if not changed.isdisjoint(weight.sources)
        ]

    def flip(self, version: int) -> None:
        for weight, tensors in self._next:
            for live, new in zip(weight.live, tensors, strict=True):
                live.copy_(new)
        self._next = []
        self._shadow.commit(version)

    def undo(self) -> None:
        self._next = []
        self._shadow.drop()

    @property
    def num_live_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for weight in self._weights for t in weight.live)

    @property
    def num_shadow_bytes(self) -> int:
        return sum(self._shadow.rows(name).numel() for name in self._shadow.names)


class WeightDesk:
    """What a shard's actor calls in a worker about weights; safe to call from several threads.

    Two locks: messages of a publication are handled one at a time, and what can change a vote (begin, arm,
    flip, drop) also waits for the forward under way. Staging and verifying do not, so decoding goes on beside
    them: a rank that is not armed votes for its live version whatever they do.

    Args:
        store: The weights.
        version: Live version.
        is_alone: Whether no other data-parallel rank takes part in this rank's forwards.
    """

    def __init__(self, store: WorkerStore, version: int, *, is_alone: bool) -> None:
        self._participant = Participant(store, version)
        self._store = store
        self._messages = threading.Lock()
        self.gate = WeightGate(self._participant, is_alone=is_alone)

    def begin(self, attempt: int, version: int, base: int | None) -> None:
        with self._messages, self.gate.lock:
            self._participant.begin(attempt, version, base)

    def stage(self, ref: BucketRef, payload: torch.Tensor | None = None) -> None:
        found = Segment(ref) if payload is None else payload
        with self._messages:
            self._participant.stage(ref, found)

    def verify(self, attempt: int) -> str:
        with self._messages:
            return self._participant.verify(attempt)

    def arm(self, attempt: int) -> None:
        with self._messages, self.gate.lock:
            self._participant.arm(attempt)

    def flip(self, attempt: int) -> int:
        with self._messages, self.gate.lock:
            return self._participant.flip(attempt)

    def drop(self, attempt: int) -> int:
        with self._messages, self.gate.lock:
            return self._participant.drop(attempt)

    def live_version(self) -> int:
        return self._participant.live_version

    def methods(self) -> dict[str, Any]:
        """What is served to the actor, by name."""
        names = ("begin", "stage", "verify", "arm", "flip", "drop", "live_version")
        return {name: getattr(self, name) for name in names}
