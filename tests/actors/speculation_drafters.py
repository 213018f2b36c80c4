"""Drafters for tests: they know the truth, and say it among other things."""

import numpy as np
import torch

from actors.vllm_plugin.draft_records import DraftLimits, DraftRequest
from actors.vllm_plugin.drafters import StatelessDrafter
from rollout.speculation.growth import ScoredTree
from rollout.speculation.tree import TokenTree


class TruthDrafter(StatelessDrafter):
    """Random trees in which, as a rule, one path is what the request goes on with; decoys hang below every node.

    Args:
        truth: Seed → prompt and output.
    """

    def __init__(self, truth: dict[int, list[int]], vocab_size: int, chance: float = 0.8) -> None:
        self.truth, self._vocab_size, self._chance = truth, vocab_size, chance
        self._draw = np.random.default_rng(7)

    def tree(self, request: DraftRequest, limits: DraftLimits) -> TokenTree:
        draw, known = self._draw, self.truth[request.seed]
        tokens: list[int] = []
        parents: list[int] = []
        frontier, true_row = [0], 0
        for depth in range(1, min(limits.max_depth, request.max_depth) + 1):
            place = len(request.token_ids) + depth - 1
            width = min(int(draw.integers(1, limits.max_width + 1)), request.budget - len(tokens))
            has_truth = true_row is not None and place < len(known) and draw.random() < self._chance
            true_slot = int(draw.integers(0, width)) if has_truth and width else None
            layer, edges, next_true = [], set(), None
            for slot in range(width):
                parent = true_row if slot == true_slot else int(draw.choice(frontier))
                token = known[place] if slot == true_slot else int(draw.integers(0, self._vocab_size))
                is_spoilt = slot != true_slot and has_truth and (parent, token) == (true_row, known[place])
                if (parent, token) in edges or is_spoilt:
                    continue
                edges.add((parent, token))
                tokens.append(token)
                parents.append(parent)
                layer.append(len(tokens))
                if slot == true_slot:
                    next_true = len(tokens)
            if not layer:
                break
            frontier, true_row = layer, next_true
        return TokenTree.of_lists(tokens, parents)


class HiddenSpy(StatelessDrafter):
    """Never drafts; keeps the hidden states it is handed, by request and position, and what it was handed itself."""

    needs_hidden = True

    def __init__(self) -> None:
        self.rows: dict[str, dict[int, torch.Tensor]] = {}
        self.handed: list[tuple[torch.Tensor, torch.Tensor]] = []  # with a copy of what it was then

    def take_hidden(self, request_ids, counts, first, rows) -> None:
        self.handed.append((rows, rows.clone()))
        parts = rows.split(1 if counts is None else counts.tolist())
        for request_id, start, part in zip(request_ids, first.tolist(), parts, strict=True):
            self.rows.setdefault(request_id, {}).update({start + i: row.clone() for i, row in enumerate(part)})

    def propose(self, requests, limits) -> list[ScoredTree]:
        return [ScoredTree.empty()] * len(requests)


class StubDrafter(StatelessDrafter):
    """Proposes the given trees, one for each request, whatever the limits, or no more of them than the budget."""

    def __init__(self, trees: list[TokenTree], scores: list[float] | None = None, keeps_budget: bool = False) -> None:
        self._trees, self._scores, self._keeps_budget = trees, scores, keeps_budget

    def propose(self, requests, limits) -> list[ScoredTree]:
        pairs = zip(requests, self._trees, strict=False)
        return [self._scored_as(tree.prefix(request.budget) if self._keeps_budget else tree) for request, tree in pairs]

    def _scored_as(self, tree: TokenTree) -> ScoredTree:
        scores = np.zeros(tree.num_nodes) if self._scores is None else np.array(self._scores)
        return ScoredTree(tree=tree, scores=scores, sources=np.ones(tree.num_nodes, dtype=np.int32))
