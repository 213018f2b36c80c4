"""Longroll's vLLM plug-in: expert parallelism on CPU, keyed sampling, and verified weight loading.

vLLM calls the two functions here through its entry points `vllm.platform_plugins` and
`vllm.general_plugins`, in the front end, the engine core and every worker. They only register
things; nothing changes for an engine that does not ask for them, except that an unquantised MoE
layer on CPU honours its expert map (the built-in kernel reads out of bounds there).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys

SEED_KEY = "longroll_seed"  # SamplingParams.extra_args: Gumbel key of a request
WEIGHT_ENGINES = {"shared_memory": "longroll_staged", "nccl": "longroll_nccl"}  # by sync.transport
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
CPU_WORKER = "actors.vllm_plugin.worker.KeyedCpuWorker"
GPU_WORKER = "actors.vllm_plugin.worker.KeyedGpuWorker"


def platform() -> str | None:
    """Entry point `vllm.platform_plugins`: our CPU platform where vLLM runs on CPU, else None."""
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() is None:
        return None
    return "actors.vllm_plugin.platform.ExpertParallelCpuPlatform"


def register() -> None:
    """Entry point `vllm.general_plugins`; safe to call more than once in a process."""
    _die_with_parent()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    for transport, module, engine in (
        ("shared_memory", "actors.vllm_plugin.weights", "StagedWeightEngine"),
        ("nccl", "actors.vllm_plugin.nccl", "NcclWeightEngine"),
    ):
        if WEIGHT_ENGINES[transport] not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(WEIGHT_ENGINES[transport], module, engine)
    if current_platform.is_cpu():
        import actors.vllm_plugin.moe  # noqa: F401  (registers the layer by being imported)


def _die_with_parent() -> None:
    """Have the kernel kill this engine process when its parent dies.

    vLLM's engine core outlives a front end that was killed with SIGKILL, and keeps its cores and memory.
    Only processes that `multiprocessing` spawned do this; a front end belongs to its user.
    """
    if sys.platform == "linux" and multiprocessing.parent_process() is not None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
