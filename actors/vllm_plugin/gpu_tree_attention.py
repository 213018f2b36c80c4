"""Attention of token trees inside CUDA engines: vLLM's Triton back end, with the rows of branching trees taken out.

It serves plain caches and `int8_per_token_head`, whose scales lie behind each token's codes. Imported only where vLLM
runs on CUDA, through the name under which `register` of this package registers it. Not run on a GPU so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVQuantMode

from actors.vllm_plugin.tree_steps import TreeBuilderMixin, TreeImplMixin, TreeMetadata, kernel_batch, other_rows
from actors.vllm_plugin.trees import TreeBatch
from kernels import tree_attention as kernels
from kernels.kv_attention import KVCache
from kernels.tree_attention import PagedCache, PlainCache


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTrees:
    """The branching trees of a step on their device.

    Attributes:
        trees: As the kernels take them.
        rows: [t] int64 flat rows of the batch.
        block_table, seq_lens: Of their requests.
        max_seq_len: Upper bound of seq_lens.
    """

    trees: kernels.TreeBatch
    rows: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    max_seq_len: int


class TreeTritonBackend(TritonAttentionBackend):
    """vLLM's Triton attention for decoders, and trees."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return TreeTritonImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return TreeTritonMetadataBuilder


class TreeTritonMetadataBuilder(TreeBuilderMixin, TritonAttentionMetadataBuilder):
    """vLLM's, for rows without a branching tree."""

    def build_trees(self, batch: TreeBatch, places: np.ndarray, common: CommonAttentionMetadata) -> TreeMetadata:
        device = common.seq_lens.device
        chosen = torch.from_numpy(places).to(device, non_blocking=True)
        rows = np.concatenate([np.arange(batch.starts[place], batch.starts[place + 1]) for place in places])
        trees = DeviceTrees(
            trees=kernel_batch(batch, places).to(device),
            rows=torch.from_numpy(rows).to(device, non_blocking=True),
            block_table=common.block_table_tensor[chosen],
            seq_lens=common.seq_lens[chosen],
            max_seq_len=common.max_seq_len,
        )
        others, plain_rows = other_rows(batch, places, common)
        plain = None if others is None else TritonAttentionMetadataBuilder.build(self, 0, others)
        return TreeMetadata(batch=batch, plain=plain, plain_rows=plain_rows, trees=trees)


class TreeTritonImpl(TreeImplMixin, TritonAttentionImpl):
    """vLLM's, and trees over its cache."""

    def attend_trees(self, query: torch.Tensor, kv_cache: torch.Tensor, plan: Any, output: torch.Tensor) -> None:
        attend_on_device(query, self._paged(kv_cache), plan, self.scale, output)

    def _paged(self, kv_cache: torch.Tensor) -> PagedCache:
        size = self.head_size
        if self._kv_quant_mode == KVQuantMode.INT8_PER_TOKEN_HEAD:
            key, value = self._pth_key_value_caches(kv_cache)
            return KVCache(
                key=key[..., :size],
                value=value[..., :size],
                key_scale=self._k_scale_cache,
                value_scale=self._v_scale_cache,
            )
        if self.kv_cache_dtype not in ("auto", "float16", "bfloat16"):
            raise ValueError(
                f"speculation: got a KV cache of {self.kv_cache_dtype}, expected auto or int8_per_token_head"
            )
        key, value = kv_cache.transpose(1, 2).split(size, dim=-1)
        return PlainCache(key=key, value=value)


def attend_on_device(
    query: torch.Tensor, cache: PagedCache, plan: DeviceTrees, scale: float, output: torch.Tensor
) -> None:
    """Attend with the rows of branching trees, writing theirs of `output` [T, Hq, D]."""
    attended, _ = kernels.tree_attention(
        query.index_select(0, plan.rows),
        cache,
        trees=plan.trees,
        block_table=plan.block_table,
        seq_lens=plan.seq_lens,
        scale=scale,
        max_seq_len=plan.max_seq_len,
    )
    output.index_copy_(0, plan.rows, attended.view(len(plan.rows), *output.shape[1:]))
