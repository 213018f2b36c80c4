"""What attention back ends that know token trees have in common, on any device.

A back end takes the rows of branching trees out of a step and computes them under their mask; all other rows, those of
chains included, which see what rows of a prefill see, are a step of the back end it is built on. Knows no kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from actors.vllm_plugin.trees import TreeBatch, Written, parent_rows
from kernels import tree_attention as kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeMetadata:
    """A step in which some requests have trees.

    Attributes:
        batch: The trees.
        plain: The base back end's metadata of the requests without a branching tree; None if there are none.
        plain_rows: [n] int64 flat rows of these; None if they are all rows.
        trees: The branching trees, as the back end wants them; None if there are none.
    """

    batch: TreeBatch
    plain: Any
    plain_rows: torch.Tensor | None
    trees: Any


def kernel_batch(batch: TreeBatch, places: np.ndarray) -> kernels.TreeBatch:
    """The trees of some requests as the kernels take them."""
    trees = [batch.trees[place] for place in places]
    counts = np.array([tree.num_rows for tree in trees])
    return kernels.tree_batch(torch.from_numpy(parent_rows(trees)), torch.from_numpy(counts))


def other_rows(
    batch: TreeBatch, places: np.ndarray, common: CommonAttentionMetadata
) -> tuple[CommonAttentionMetadata | None, torch.Tensor | None]:
    """The step as if only the requests that are not at `places` were in it, and their flat rows; None where all are."""
    is_plain: np.ndarray = np.ones(len(batch.trees), dtype=bool)
    is_plain[places] = False
    if not is_plain.any():
        return None, None
    device, lengths = common.seq_lens.device, np.diff(batch.starts)
    rows = torch.from_numpy(np.repeat(is_plain, lengths).nonzero()[0]).to(device, non_blocking=True)
    chosen, counts = torch.from_numpy(is_plain.nonzero()[0]).to(device, non_blocking=True), lengths[is_plain]
    starts = torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int32))
    others = replace(
        common,
        query_start_loc=starts.to(device, non_blocking=True),
        query_start_loc_cpu=starts,
        seq_lens=common.seq_lens[chosen],
        num_reqs=len(counts),
        num_actual_tokens=len(rows),
        max_query_len=int(counts.max()),
        block_table_tensor=common.block_table_tensor[chosen],
        slot_mapping=common.slot_mapping[rows],
    )
    return others, rows


class TreeBuilderMixin:
    """Mix in before a metadata builder. The runner sets `trees` before a step that has any."""

    trees: TreeBatch | None = None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        batch, common = self.trees, common_attn_metadata
        if batch is None:
            return super().build(common_prefix_len, common, fast_build)  # type: ignore[misc]
        places: np.ndarray = np.array(batch.branching(), dtype=np.int64)
        if len(places):
            return self.build_trees(batch, places, common)
        plain = super().build(common_prefix_len, common, fast_build)  # type: ignore[misc]
        return TreeMetadata(batch=batch, plain=plain, plain_rows=None, trees=None)

    def build_trees(self, batch: TreeBatch, places: np.ndarray, common: CommonAttentionMetadata) -> TreeMetadata:
        """The metadata of a step in which the requests at `places` have branching trees."""
        raise NotImplementedError


class TreeImplMixin:
    """Mix in before the attention of one layer: remembers what was written, for `TreeBatch.move`."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        scales = (output_scale, output_block_scale)
        step = attn_metadata
        if not isinstance(step, TreeMetadata):
            return super().forward(layer, query, key, value, kv_cache, step, output, *scales)  # type: ignore[misc]
        if self.kv_sharing_target_layer_name is None:  # type: ignore[attr-defined]
            step.batch.written.append(Written(impl=self, layer=layer, key=key, value=value, kv_cache=kv_cache))
        if step.plain_rows is not None:
            rows = query[step.plain_rows]
            part = output.new_empty(len(rows), *output.shape[1:])
            super().forward(layer, rows, key, value, kv_cache, step.plain, part, *scales)  # type: ignore[misc]
            output[step.plain_rows] = part
        elif step.plain is not None:
            super().forward(layer, query, key, value, kv_cache, step.plain, output, *scales)  # type: ignore[misc]
        if step.trees is not None:
            self.attend_trees(query, kv_cache, step.trees, output)
        return output

    def attend_trees(self, query: torch.Tensor, kv_cache: torch.Tensor, plan: Any, output: torch.Tensor) -> None:
        """Attend with the rows of branching trees, writing theirs of `output`."""
        raise NotImplementedError
