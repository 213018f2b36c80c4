"""vLLM's CPU platform with a communicator that can do expert parallelism over data-parallel ranks,
and an attention back end for INT8 KV caches.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform


class ExpertParallelCpuPlatform(CpuPlatform):
    """`CpuPlatform` but for the communicator, and for attention over a cache in `int8_per_token_head`."""

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "actors.vllm_plugin.communicator.ExpertParallelCpuCommunicator"

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if attn_selector_config.kv_cache_dtype == "int8_per_token_head" and not attn_selector_config.use_mla:
            return "actors.vllm_plugin.attention.Int8KvBackend"
        return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
