"""Longroll's vLLM plug-in: expert parallelism on CPU, keyed sampling, and weights that change in place.

vLLM calls the two functions here through its entry points `vllm.platform_plugins` and
`vllm.general_plugins`, in the front end, the engine core and every worker. They only register
things; nothing changes for an engine that does not ask for them.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys

SEED_KEY = "longroll_seed"  # SamplingParams.extra_args: Gumbel key of a request
GROUP_KEY = "longroll_group"  # likewise: key of its prompt, the same for all members of a group
MEMBER_KEY = "longroll_member"  # likewise: key of its trajectory
PROMPT_KEY = "longroll_prompt"  # likewise: tokens of its trajectory's prompt; what else it comes with was generated
QUANTIZATIONS = {None: "longroll_plain", "int4": "longroll_int4"}  # vLLM's name, by engine.quantization
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
CPU_WORKER = "actors.vllm_plugin.worker.KeyedCpuWorker"
GPU_WORKER = "actors.vllm_plugin.worker.KeyedGpuWorker"
GPU_TREE_ATTENTION = "actors.vllm_plugin.gpu_tree_attention.TreeTritonBackend"  # vLLM's CUSTOM; CPUs: platform.py
CPU_SCHEDULER = "actors.vllm_plugin.scheduler.VersionedScheduler"
GPU_SCHEDULER = "actors.vllm_plugin.scheduler.VersionedAsyncScheduler"


def platform() -> str | None:
    """Entry point `vllm.platform_plugins`: our CPU platform where vLLM runs on CPU, else None."""
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() is None:
        return None
    return "actors.vllm_plugin.platform.ExpertParallelCpuPlatform"


def register() -> None:
    """Entry point `vllm.general_plugins`; safe to call more than once in a process."""
    _die_with_parent()
    _ask_for_amx()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    import actors.vllm_plugin.quantization  # noqa: F401  (registers the configurations by being imported)
    from actors.vllm_plugin.patches import install

    install()
    register_backend(AttentionBackendEnum.CUSTOM, GPU_TREE_ATTENTION)


def _ask_for_amx() -> None:
    """Ask Linux for AMX tiles, where the CPU has them.

    vLLM's bfloat16 attention uses them, and oneDNN asks, but for linears that ours replace: without it the first tile
    of an INT4 engine is an illegal instruction.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def _die_with_parent() -> None:
    """Have the kernel kill this engine process when its parent dies.

    vLLM's engine core outlives a front end that was killed with SIGKILL, and keeps its cores and memory.
    Only processes that `multiprocessing` spawned do this; a front end belongs to its user.
    """
    if sys.platform == "linux" and multiprocessing.parent_process() is not None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
