"""Environment of a shard's process, which vLLM and OpenMP read when they are imported: set before either is."""

from __future__ import annotations

import os


def prepare_environment(rank: int, omp_threads_bind: str | None, *, on_gpu: bool) -> None:
    """Set what an engine of this shard needs; what it starts inherits it.

    Args:
        rank: Of the shard.
        omp_threads_bind: engine.omp_threads_bind: core list of each shard, '|' between shards; None = one core each.
        on_gpu: Cores are left alone.
    """
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # keyed sampling is built on the V1 runner
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if on_gpu:
        return
    cores = sorted(os.sched_getaffinity(0))
    binds = (omp_threads_bind or "").split("|")
    bind = binds[rank] if len(binds) > rank and binds[rank] else str(cores[rank % len(cores)])
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bind
    from vllm.utils.cpu_resource_utils import parse_id_list

    # What vLLM sets for a worker process, here for an engine with its worker in it (see vllm_plugin.platform).
    chosen = parse_id_list(bind)
    os.environ["OMP_NUM_THREADS"] = str(len(chosen))
    os.environ["OMP_PLACES"] = "{" + ",".join(map(str, chosen)) + "}"
    os.environ["OMP_PROC_BIND"] = "true"
