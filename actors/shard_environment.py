"""What a shard's process sets up before vLLM and OpenMP are imported, which read it then, and which cores are whose.

An engine on CPU computes on cores of its own. OpenMP binds the thread that loads it, in the process of the shard too,
whose own work, a fifth of the engine's, would then wait for the engine and the engine for it: once the engine runs, the
shard's threads move elsewhere, if there are other cores.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Sequence

from rollout.config import EngineConfig


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
    # What vLLM sets for a worker process, here for an engine with its worker in it (see vllm_plugin.platform).
    chosen = engine_cores(rank, omp_threads_bind, sorted(os.sched_getaffinity(0)))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, chosen))
    os.environ["OMP_NUM_THREADS"] = str(len(chosen))
    os.environ["OMP_PLACES"] = "{" + ",".join(map(str, chosen)) + "}"
    os.environ["OMP_PROC_BIND"] = "true"


def engine_cores(rank: int, omp_threads_bind: str | None, cores: Sequence[int]) -> list[int]:
    """The cores that a shard's engine computes on.

    Args:
        rank, omp_threads_bind: As of `prepare_environment`.
        cores: That the shard may use, rising.
    """
    from vllm.utils.cpu_resource_utils import parse_id_list

    binds = (omp_threads_bind or "").split("|")
    given = binds[rank] if rank < len(binds) else ""
    return parse_id_list(given) if given else [cores[rank % len(cores)]]


def front_end_cores(rank: int, engine: EngineConfig, cores: Sequence[int]) -> set[int]:
    """The cores for all else that a shard does.

    Those on which no engine computes; or else no engine of its own group, as other groups may be idle, above all at the
    end of a rollout; or else its own engine's. Shards are taken to share one host: on several, cores may be left alone
    that are free.

    Args:
        rank: Of the shard.
        engine: Of all of them.
        cores: That the shard may use, rising.
    """
    first = rank - rank % engine.num_shards

    def others(ranks: range) -> set[int]:
        return set(cores) - {core for r in ranks for core in engine_cores(r, engine.omp_threads_bind, cores)}

    own = set(engine_cores(rank, engine.omp_threads_bind, cores))
    return others(range(engine.num_all_shards)) or others(range(first, first + engine.num_shards)) or own


def move_threads(cores: Collection[int]) -> None:
    """Let all threads of this process, and what they start, run on these cores."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), cores)
