"""vLLM's CPU platform with a communicator that can do expert parallelism over data-parallel ranks."""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class ExpertParallelCpuPlatform(CpuPlatform):
    """`CpuPlatform` but for the communicator."""

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "actors.vllm_plugin.communicator.ExpertParallelCpuCommunicator"
