"""vLLM's CPU platform with a communicator that can do expert parallelism over data-parallel ranks,
and an attention back end for INT8 KV caches.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform

from actors.vllm_plugin import CPU_WORKER
from actors.vllm_plugin.options import PluginOptions


class ExpertParallelCpuPlatform(CpuPlatform):
    """`CpuPlatform` but for the communicator, and for attention over a cache in `int8_per_token_head`."""

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """As vLLM's, but an engine of ours that has one worker runs it in its own process.

        vLLM wants a process of its own for every CPU worker, so that OpenMP finds its settings in the environment; a
        shard sets them for the engine. Saves two messages between processes in every step, and a process to start.
        """
        super().check_and_update_config(vllm_config)
        parallel = vllm_config.parallel_config
        if parallel.world_size == 1 and parallel.worker_cls == CPU_WORKER:
            parallel.distributed_executor_backend = "uni"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "actors.vllm_plugin.communicator.ExpertParallelCpuCommunicator"

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        speculates = _speculates()
        if attn_selector_config.kv_cache_dtype == "int8_per_token_head" and not attn_selector_config.use_mla:
            return f"actors.vllm_plugin.{'tree_attention.TreeInt8Backend' if speculates else 'attention.Int8KvBackend'}"
        if speculates:
            return "actors.vllm_plugin.tree_attention.TreeCpuBackend"
        return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)


def _speculates() -> bool:
    """Whether the engine being built verifies token trees."""
    from vllm.config import get_current_vllm_config_or_none  # vllm.config imports the platform

    config = get_current_vllm_config_or_none()
    return config is not None and PluginOptions.of(config).speculation is not None
