"""The drafters of an engine by name, and those that need no model: for tests and measurements of the machinery."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from actors.vllm_plugin.draft_records import Drafter, DraftLimits, DraftRequest
from actors.vllm_plugin.drafting import DraftDesk
from actors.vllm_plugin.options import PluginOptions
from rollout.speculation.growth import ScoredTree
from rollout.speculation.tree import TokenTree
from rollout.speculation_config import SpeculationConfig

BUILT_IN = {
    "random": "actors.vllm_plugin.drafters:RandomDrafter",
    "adversarial": "actors.vllm_plugin.drafters:AdversarialDrafter",
    "sibling": "actors.vllm_plugin.sibling_drafter:SiblingDrafter",
    "clover2": "actors.vllm_plugin.clover_drafter:CloverDrafter",
}


def make_desk(vllm_config: Any, model: Any) -> DraftDesk:
    """The desk of an engine that speculates.

    Args:
        vllm_config: Of the engine.
        model: The target, loaded.

    Raises:
        InvalidRequest: A drafter does not fit the model.
    """
    config = PluginOptions.of(vllm_config).speculation
    assert config is not None
    drafters: dict[str, Drafter] = {}
    for source in config.sources:
        module, _, name = BUILT_IN.get(source, source).partition(":")
        drafters[source] = getattr(importlib.import_module(module), name)(config, vllm_config, model)
    scheduler = vllm_config.scheduler_config
    return DraftDesk(
        config,
        drafters,
        vocab_size=vllm_config.model_config.get_vocab_size(),
        # Room for a row of every request beside the trees: nobody waits for a step because others speculate.
        max_nodes=max(0, scheduler.max_num_batched_tokens - scheduler.max_num_seqs),
    )


class StatelessDrafter:
    """What drafters share that look at a request's tokens alone.

    Args:
        config: Limits, which each call may narrow.
        vllm_config: Of the engine.
        model: The target.
    """

    needs_hidden = False
    learns = False

    def __init__(self, config: SpeculationConfig, vllm_config: Any, model: Any) -> None:
        self._vocab_size: int = vllm_config.model_config.get_vocab_size()

    def prepare(self, requests: Sequence[DraftRequest]) -> None:
        """Nothing."""

    def propose(self, requests: Sequence[DraftRequest], limits: DraftLimits) -> list[ScoredTree]:
        """One tree for each request."""
        return [self._scored(self.tree(request, limits)) for request in requests]

    def tree(self, request: DraftRequest, limits: DraftLimits) -> TokenTree:
        """The tree of one request."""
        raise NotImplementedError

    def take_hidden(
        self, request_ids: Sequence[str], counts: np.ndarray | None, first: np.ndarray, rows: torch.Tensor
    ) -> None:
        """Nothing."""

    def learn(self, request: DraftRequest) -> None:
        """Nothing."""

    def end(self, request: DraftRequest) -> None:
        """Nothing."""

    def forget(self, request_id: str) -> None:
        """Nothing."""

    def _scored(self, tree: TokenTree) -> ScoredTree:
        """Any token is as likely as any other."""
        scores = -math.log(self._vocab_size) * tree.depths[1:].astype(np.float64)
        order = np.argsort(tree.depths[1:], kind="stable")  # best first
        row: np.ndarray = np.zeros(tree.num_rows, dtype=np.int32)
        row[order + 1] = np.arange(1, tree.num_rows)
        ordered = TokenTree(tokens=tree.tokens[order], parents=row[tree.parents[order]])
        return ScoredTree(tree=ordered, scores=scores[order], sources=np.ones(tree.num_nodes, dtype=np.int32))


class RandomDrafter(StatelessDrafter):
    """Random trees of random tokens: any size within the limits, seldom right."""

    def __init__(self, config: SpeculationConfig, vllm_config: Any, model: Any) -> None:
        super().__init__(config, vllm_config, model)
        self._draw = np.random.default_rng(0)

    def tree(self, request: DraftRequest, limits: DraftLimits) -> TokenTree:
        deepest = min(limits.max_depth, request.max_depth)
        parents: list[int] = []
        depths, widths = [0], [0] * (deepest + 1)
        for node in range(int(self._draw.integers(0, request.budget + 1))):
            parent = int(self._draw.integers(0, node + 1))
            depth = depths[parent] + 1
            if depth > deepest or widths[depth] == limits.max_width:
                break
            widths[depth] += 1
            parents.append(parent)
            depths.append(depth)
        tokens = self._draw.choice(self._vocab_size, len(parents), replace=False)
        return TokenTree(tokens=tokens.astype(np.int32), parents=np.array(parents, dtype=np.int32))


class AdversarialDrafter(StatelessDrafter):
    """The widest and deepest trees, of tokens that were right a little while ago: what a request said last, repeated
    at every depth and below every parent, so that a right token is mostly drafted at a wrong place."""

    def tree(self, request: DraftRequest, limits: DraftLimits) -> TokenTree:
        width = min(limits.max_width, request.budget)
        deepest = min(limits.max_depth, request.max_depth)
        recent = list(dict.fromkeys(request.token_ids[: -width - 1 : -1].tolist()))
        recent += [token for token in range(width) if token not in recent][: width - len(recent)]
        size = min(request.budget, width * deepest)
        parents = [0 if node < width else node + 1 - width for node in range(size)]
        tokens = [recent[node % width] for node in range(size)]
        return TokenTree.of_lists(tokens, parents)
