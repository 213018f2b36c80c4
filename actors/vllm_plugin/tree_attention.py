"""Attention of token trees inside CPU engines: a row sees the prefix and its own path, nothing of its siblings.

Two back ends, chosen by the platform for engines that speculate: vLLM's own CPU attention, and the INT8 one of
attention.py. Rows of branching trees go to tree_rows.py and to `kernels.tree_attention`.
"""

from __future__ import annotations

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
from actors.vllm_plugin.tree_rows import attend_trees, plan_step
from actors.vllm_plugin.tree_steps import TreeBuilderMixin, TreeImplMixin, TreeMetadata, kernel_batch, other_rows
from actors.vllm_plugin.trees import TreeBatch
from kernels import tree_attention as kernels


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
        trees = plan_step(
            batch,
            places,
            common.block_table_tensor.numpy(),
            spec.dtype,
            num_kv_heads=spec.num_kv_heads,
            block_size=spec.block_size,
            head_dim=spec.head_size,
        )
        others, rows = other_rows(batch, places, common)
        plain = None if others is None else CPUAttentionMetadataBuilder.build(self, 0, others)
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
