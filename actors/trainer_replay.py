"""Routing replay (R3, arXiv 2510.11370) in a Hugging Face Qwen3-MoE model: its routers choose what sampling chose.

A forward hook on each router replaces the chosen experts, and computes their weights from the logits of this
very forward as the router itself would, so that gradients reach it. Tokens without a record (pads, the last
token of a row, what was not captured) keep their own choice, and the load-balancing loss, which is taken from
the logits, is unaffected. Recomputed activations (gradient checkpointing) replay too, as long as the backward
pass runs inside `replaying`. Knows nothing of where records come from but `fetch_recorded`, nor of losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from actors.routing_store import fetch
from rollout.batch import MicroBatch
from rollout.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Experts of a micro-batch at sampling.

    Attributes:
        ids: uint8 or int32 [B, L, layers, places]; None when no row has a record.
        is_recorded: bool [B, L]; where `ids` means something.
        num_found: Trained rows with a record.
        num_missing: Trained rows without.
    """

    ids: torch.Tensor | None
    is_recorded: torch.Tensor
    num_found: int
    num_missing: int


def fetch_recorded(batch: MicroBatch, device: torch.device) -> Recorded:
    """Fetch the records of a micro-batch's rows; what is lost is counted as missing."""
    is_trained = (batch.weights > 0).any(dim=1).tolist()
    rows = [fetch(refs, length - 1) for refs, length in zip(batch.routing, batch.lengths.tolist(), strict=True)]
    num_found = sum(row is not None and trained for row, trained in zip(rows, is_trained, strict=True))
    is_recorded = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    ids: torch.Tensor | None = None
    for i, row in enumerate(rows):
        if row is None:
            continue
        if ids is None:
            dtype = torch.uint8 if row.dtype == "uint8" else torch.int32  # most operations lack uint16
            ids = torch.zeros(*batch.input_ids.shape, *row.shape[1:], dtype=dtype)
        ids[i, : len(row)] = torch.from_numpy(row if ids.dtype == torch.uint8 else row.astype("int32"))
        is_recorded[i, : len(row)] = True
    return Recorded(
        ids=None if ids is None else ids.to(device),
        is_recorded=is_recorded.to(device),
        num_found=num_found,
        num_missing=sum(is_trained) - num_found,
    )


class RouterReplay:
    """Hooks on the routers of one model; without a record they change nothing.

    Args:
        module: The model, before or after DeepSpeed has taken it. A model without such routers cannot replay.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._recorded: Recorded | None = None
        self._counts: list[torch.Tensor] | None = None
        routers = [part for part in module.modules() if isinstance(part, Qwen3MoeTopKRouter)]
        self._shape = (len(routers), routers[0].top_k) if routers else None
        for layer, router in enumerate(routers):
            # First of all hooks: what DeepSpeed and transformers see of the output is what the experts get.
            router.register_forward_hook(partial(self._route, layer), prepend=True)

    @property
    def can_replay(self) -> bool:
        return self._shape is not None

    @contextmanager
    def replaying(self, recorded: Recorded) -> Iterator[None]:
        """Replay a record in every forward and recomputation inside.

        Raises:
            InvalidRequest: The record is of a model with other layers or another number of experts a token.
        """
        if recorded.ids is not None and tuple(recorded.ids.shape[2:]) != self._shape:
            got = f"(layers, experts of a token) = {tuple(recorded.ids.shape[2:])}"
            raise InvalidRequest("recorded routing", got, f"those of the trained model, {self._shape}")
        self._recorded = recorded
        try:
            yield
        finally:
            self._recorded = None

    @contextmanager
    def counting(self) -> Iterator[list[torch.Tensor]]:
        """Count flips in every replayed forward inside: int64 pairs (recorded choices, of them other than its own)."""
        self._counts = []
        try:
            yield self._counts
        finally:
            self._counts = None

    def _route(
        self, layer: int, router: Qwen3MoeTopKRouter, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        if self._recorded is None or self._recorded.ids is None:
            return None
        logits, scores, own = output
        is_recorded = self._recorded.is_recorded.reshape(-1)
        recorded = self._recorded.ids[:, :, layer].reshape(-1, own.shape[1]).long()
        if self._counts is not None:
            flips = (recorded.sort(dim=-1).values != own.sort(dim=-1).values).any(dim=-1) & is_recorded
            self._counts.append(torch.stack([is_recorded.sum(), flips.sum()]))
        chosen = torch.where(is_recorded[:, None], recorded, own)
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32).gather(1, chosen)
        if router.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights.to(scores.dtype), chosen
