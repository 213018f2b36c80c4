"""The token trees of one step, as the runner, the attention back end and the mover of KV share them.

Owns the bookkeeping between requests and rows of the flat batch; one object lives for one step. Knows nothing of
who drafted the trees, and nothing of a layer.

Rows of a request with a tree are contiguous: row 0 (its last accepted token), then the nodes; see
rollout.speculation.tree. They are written to consecutive KV slots, whatever their depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from rollout.speculation.tree import TokenTree, tree_masks
from rollout.speculation.walk import Accepted, kv_moves


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Keys and values that a layer has put into its cache in this step: [T, Hkv, D] each."""

    impl: Any
    layer: Any
    key: torch.Tensor
    value: torch.Tensor
    kv_cache: torch.Tensor


_ROOT: np.ndarray = np.zeros(1, dtype=np.int32)  # the root is its own parent


def parent_rows(trees: Sequence[TokenTree]) -> np.ndarray:
    """int32, for every row of one tree after the other the row of its parent in that tree, 0 for a root."""
    return np.concatenate([part for tree in trees for part in (_ROOT, tree.parents)])


@dataclass(kw_only=True)
class TreeBatch:
    """Trees of the B requests of a step, in batch order; a request without a draft has the empty tree.

    Attributes:
        trees: B trees.
        starts: [B + 1] first flat row of each request; a request with a tree has its num_rows of them.
        bases: [B] int64 position of each request's last row that is not a node.
        written: What each layer wrote, filled by the attention back end during the forward.
    """

    trees: Sequence[TokenTree]
    starts: np.ndarray
    bases: np.ndarray
    written: list[Written] = field(default_factory=list)

    @cached_property
    def num_rows(self) -> np.ndarray:
        """[B] rows that are sampled from: 1 without a tree."""
        return np.fromiter((tree.num_rows for tree in self.trees), np.int64, len(self.trees))

    @cached_property
    def sampled_rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(flat row, request, position) of every row that is sampled from, each [S] int64, request by request."""
        counts = self.num_rows
        owners: np.ndarray = np.repeat(np.arange(len(counts)), counts)
        ends = counts.cumsum()
        place = np.arange(ends[-1]) - (ends - counts)[owners]
        rows = (self.starts[1:] - counts)[owners] + place
        depths = np.concatenate([tree.depths for tree in self.trees])
        return rows, owners, self.bases[owners] + depths

    @cached_property
    def draws(self) -> tuple[np.ndarray, np.ndarray]:
        """([U] int64 sampled rows, [S] int64 places among these): a request's rows at one depth draw the same noise."""
        _, owners, positions = self.sampled_rows
        _, rows, places = np.unique(owners << 40 | positions, return_index=True, return_inverse=True)
        return rows, places

    def branching(self) -> list[int]:
        """Requests whose tree is no chain. A chain's rows see what rows of a prefill see, so they need no mask."""
        return [
            place
            for place, tree in enumerate(self.trees)
            if tree.num_nodes and not np.array_equal(tree.parents, np.arange(tree.num_nodes))
        ]

    def masks(self, places: Sequence[int]) -> np.ndarray:
        """[len(places), R, R] bool: which rows of its own tree each row sees, padded to the largest."""
        return tree_masks([self.trees[place] for place in places])

    def move(self, accepted: Sequence[Accepted], slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the KV of accepted rows into consecutive slots, in every layer that wrote any.

        Args:
            accepted: B walks.
            slots: [T] int64 slot of every flat row.

        Returns:
            (rows [n], slots [n]): the flat rows whose KV was written to another slot than theirs, and that slot.
        """
        rows, _, _ = self.sampled_rows
        sources, destinations = kv_moves(self.trees, accepted)
        moved = torch.from_numpy(rows[sources]).to(slots.device)
        target_slots = slots[torch.from_numpy(rows[destinations]).to(slots.device)]
        if len(sources):
            for one in self.written:
                key, value = one.key.index_select(0, moved), one.value.index_select(0, moved)
                one.impl.do_kv_cache_update(one.layer, key, value, one.kv_cache, target_slots)
        self.written.clear()
        return moved, target_slots
