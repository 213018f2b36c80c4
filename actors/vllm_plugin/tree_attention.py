"""Attention of token trees inside CPU engines: a row sees the prefix and its own path, nothing of its siblings.

Two back ends, chosen by the platform for engines that speculate: vLLM's own CPU attention, and the INT8 one of
attention.py. Rows of branching trees go to tree_rows.py and to `kernels.tree_attention`; rows without a tree, and those
of chains, which see what rows of a prefill see, go through the kernels they always went through. Knows nothing of
drafts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from actors.vllm_plugin.attention import Int8KvBackend, Int8KvImpl, Int8KvMetadataBuilder
from actors.vllm_plugin.tree_rows import TreeGroup, attend_trees, plan_trees
from actors.vllm_plugin.trees import TreeBatch, Written
from kernels import tree_attention as kernels
from kernels.tree_attention import StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeMetadata:
    """A step in which some requests have trees.

    Attributes:
        batch: The trees.
        plain: The base back end's metadata of the requests without a branching tree; None if there are none.
        plain_rows: [n] int64 flat rows of these; None if they are all rows.
        trees: The branching trees; None if there are none.
    """

    batch: TreeBatch
    plain: Any
    plain_rows: torch.Tensor | None
    trees: list[TreeGroup] | StepPlan | None


def kernel_batch(batch: TreeBatch, places: np.ndarray) -> kernels.TreeBatch:
    """The trees of some requests as the kernels take them."""
    trees = [batch.trees[place] for place in places]
    parents = np.concatenate([part for tree in trees for part in (_ROOT, tree.parents)])
    counts = np.array([tree.num_rows for tree in trees])
    return kernels.tree_batch(torch.from_numpy(parents), torch.from_numpy(counts))


_ROOT: np.ndarray = np.zeros(1, dtype=np.int32)  # the root is its own parent


class TreeBuilderMixin:
    """Mix in before a CPU metadata builder. The runner sets `trees` before a step that has any."""

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
            part = torch.empty(len(rows), *output.shape[1:], dtype=output.dtype)
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


class TreeCpuBackend(CPUAttentionBackend):
    """vLLM's CPU attention for decoders, and trees."""

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return TreeCpuImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return TreeCpuMetadataBuilder


class TreeCpuMetadataBuilder(TreeBuilderMixin, CPUAttentionMetadataBuilder):
    """vLLM's, for rows without a branching tree.

    Its layout for matrix tiles (AMX) is none that the kernels of trees can read, so the one for vectors is taken.
    """

    isa: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.isa == "amx":
            self.isa = "vec"
            self._set_isa_to_layers(self.layer_names)
        if self.isa != "vec":
            raise ValueError(f"speculation on CPU: got attention kernels of kind {self.isa}, expected vec or amx")

    def build_trees(self, batch: TreeBatch, places: np.ndarray, common: CommonAttentionMetadata) -> TreeMetadata:
        spec = self.kv_cache_spec
        trees = plan_trees(
            batch,
            places,
            common.block_table_tensor.numpy(),
            num_kv_heads=spec.num_kv_heads,
            block_size=spec.block_size,
            head_dim=spec.head_size,
        )
        is_plain: np.ndarray = np.ones(len(batch.trees), dtype=bool)
        is_plain[places] = False
        if not is_plain.any():
            return TreeMetadata(batch=batch, plain=None, plain_rows=None, trees=trees)
        lengths = np.diff(batch.starts)
        rows = torch.from_numpy(np.repeat(is_plain, lengths).nonzero()[0])
        chosen, counts = torch.from_numpy(is_plain), lengths[is_plain]
        starts = torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int32))
        others = replace(
            common,
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=common.seq_lens[chosen],
            num_reqs=len(counts),
            num_actual_tokens=len(rows),
            max_query_len=int(counts.max()),
            block_table_tensor=common.block_table_tensor[chosen],
            slot_mapping=common.slot_mapping[rows],
        )
        plain = CPUAttentionMetadataBuilder.build(self, 0, others)
        return TreeMetadata(batch=batch, plain=plain, plain_rows=rows, trees=trees)


class TreeCpuImpl(TreeImplMixin, CPUAttentionBackendImpl):
    """vLLM's, and trees over its cache."""

    def attend_trees(self, query: torch.Tensor, kv_cache: torch.Tensor, plan: Any, output: torch.Tensor) -> None:
        attend_trees(query, kv_cache, plan, self.scale, output)


class TreeInt8Backend(Int8KvBackend):
    """INT8 keys and values, and trees."""

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return TreeInt8Impl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return TreeInt8MetadataBuilder


class TreeInt8MetadataBuilder(TreeBuilderMixin, Int8KvMetadataBuilder):
    """Plans trees and other rows together."""

    def build_trees(self, batch: TreeBatch, places: np.ndarray, common: CommonAttentionMetadata) -> TreeMetadata:
        plan = kernels.plan_step(
            trees=kernel_batch(batch, places),
            tree_requests=torch.from_numpy(places),
            block_table=common.block_table_tensor[: common.num_reqs],
            query_start_loc=common.query_start_loc[: common.num_reqs + 1],
            seq_lens=common.seq_lens[: common.num_reqs],
            num_query_heads=self._num_query_heads,
            cache=self._shape,
        )
        return TreeMetadata(batch=batch, plain=None, plain_rows=None, trees=plan)


class TreeInt8Impl(TreeImplMixin, Int8KvImpl):
    """INT8 keys and values, and trees: a tree's row has the bits that decoding its path gives."""

    def attend_trees(self, query: torch.Tensor, kv_cache: torch.Tensor, plan: Any, output: torch.Tensor) -> None:
        attended, _ = kernels.paged_step_attention_cpu(query, self._cache(kv_cache), plan=plan, scale=self.scale)
        output.copy_(attended)
