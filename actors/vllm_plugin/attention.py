"""INT8 KV cache inside CPU engines: an attention back end that vLLM calls, over `kernels.kv_attention`.

It serves `kv_cache_dtype = int8_per_token_head`, which vLLM's own CPU attention cannot store: INT8 codes
with one float32 scale for every token and KV head of K and of V. All other cache types stay with vLLM.
A prefill reads its own chunk back from the quantised cache, so a trajectory that was cut and resumed,
or preempted, sees the very keys and values it saw before. Neither the arithmetic nor what the bytes of a
block mean is known here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.v1.attention.backend import (
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers
from vllm.v1.kv_cache_interface import AttentionSpec, KVQuantMode

from kernels.kv_attention import (
    AttentionPlan,
    KVCache,
    kv_cache_from_pages,
    page_bytes,
    paged_attention_cpu,
    plan_attention,
    write_kv,
)


class Int8KvBackend(CPUAttentionBackend):
    """vLLM's CPU attention for decoders, with the cache in INT8. The platform chooses it."""

    supported_kv_cache_dtypes = ["int8_per_token_head"]  # noqa: RUF012 (vLLM's type)

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return Int8KvImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return Int8KvMetadataBuilder

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Bytes of one token and head: the codes of K and V and their two scales."""
        if spec.state_content_bytes is not None or spec.kv_quant_mode != KVQuantMode.INT8_PER_TOKEN_HEAD:
            return spec
        if spec.head_size_v != spec.head_size:
            raise ValueError(f"INT8 KV cache on CPU, head size of V: got {spec.head_size_v}, expected {spec.head_size}")
        return replace(spec, state_content_bytes=page_bytes(1, 1, spec.head_size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8KvMetadata:
    """One step's batch.

    Attributes:
        num_tokens: Query tokens, padding not counted.
        plan: Which rows read which blocks; the same for every layer.
    """

    num_tokens: int
    plan: AttentionPlan


class Int8KvMetadataBuilder(AttentionMetadataBuilder[Int8KvMetadata]):
    """Plans a step once for all layers of a KV cache group."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        num_heads = get_num_attention_heads_from_layers(vllm_config, layer_names)
        if num_heads is None:
            raise ValueError(f"attention layers: got none of the names {layer_names}, expected layers with heads")
        self._num_query_heads = num_heads
        spec = kv_cache_spec
        # A plan asks only for a cache's shape, and this object is built before the cache.
        self._shape = cache_views(
            torch.empty(1, spec.num_kv_heads, spec.block_size, page_bytes(1, 1, spec.head_size), dtype=torch.int8),
            spec.head_size,
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Int8KvMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError(f"INT8 KV cache on CPU, causal: got {common.causal}, expected True")
        plan = plan_attention(
            block_table=common.block_table_tensor[: common.num_reqs],
            query_start_loc=common.query_start_loc[: common.num_reqs + 1],
            seq_lens=common.seq_lens[: common.num_reqs],
            num_query_heads=self._num_query_heads,
            cache=self._shape,
        )
        return Int8KvMetadata(num_tokens=common.num_actual_tokens, plan=plan)


def cache_views(kv_cache: torch.Tensor, head_dim: int) -> KVCache:
    """A layer's cache as the kernels take it.

    Args:
        kv_cache: [num_blocks, Hkv, block_size, bytes of a token and head] int8, as vLLM allocates it for
            `Int8KvBackend.customize_spec`.
        head_dim: D.

    Raises:
        ValueError: The bytes of a block are not contiguous, or not those of such heads.
    """
    _, num_kv_heads, block_size, _ = kv_cache.shape
    if not kv_cache[0].is_contiguous():
        raise ValueError(f"INT8 KV cache: got strides {kv_cache.stride()}, expected blocks that are contiguous")
    pages = kv_cache.flatten(1)
    return kv_cache_from_pages(pages, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim)


class Int8KvImpl(AttentionImpl[Int8KvMetadata]):
    """Attention of one layer; owns nothing but views of the layer's cache."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        unsupported = dict(
            alibi_slopes=alibi_slopes, sliding_window=sliding_window, logits_soft_cap=logits_soft_cap, sinks=sinks
        )
        for name, value in unsupported.items():
            if value is not None:
                raise ValueError(f"INT8 KV cache on CPU, {name}: got {value}, expected None")
        if attn_type != AttentionType.DECODER:
            raise ValueError(f"INT8 KV cache on CPU, attention type: got {attn_type}, expected decoder")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self._viewed: torch.Tensor | None = None
        self._views: KVCache | None = None

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Quantise this step's keys and values and put them into their slots.

        Args:
            layer: Unused.
            key: [≥ T, Hkv, D]; rows past those of `slot_mapping` are padding.
            value: As `key`.
            kv_cache: The layer's cache.
            slot_mapping: [T] int64: block × block_size + place in the block; -1 for padding.
        """
        num_tokens = slot_mapping.shape[0]
        if num_tokens:
            write_kv(key[:num_tokens], value[:num_tokens], self._cache(kv_cache), slot_mapping=slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Int8KvMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to the cache, which already holds this step's keys and values.

        Args:
            layer: Unused.
            query: [≥ T, Hq, D].
            key: Unused: read back from the cache instead.
            value: Likewise.
            kv_cache: The layer's cache.
            attn_metadata: The batch; None for a dummy run.
            output: [≥ T, Hq, D], overwritten; rows past T become 0.
            output_scale: Must be None.
            output_block_scale: Must be None.

        Returns:
            `output`
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("INT8 KV cache on CPU: got a quantised output, expected a plain one")
        if attn_metadata is None:
            return output.zero_()
        attended, _ = paged_attention_cpu(query, self._cache(kv_cache), plan=attn_metadata.plan, scale=self.scale)
        return output.copy_(attended)

    def _cache(self, kv_cache: torch.Tensor) -> KVCache:
        if self._views is None or self._viewed is not kv_cache:
            self._views, self._viewed = cache_views(kv_cache, self.head_size), kv_cache
        return self._views
