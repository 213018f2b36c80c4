from __future__ import annotations

import os
import subprocess
import sys

import pytest

from actors.shard_environment import engine_cores, front_end_cores, prepare_environment
from rollout.config import EngineConfig

CORES = sorted(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("rank", "bind", "places", "num_threads"),
    [
        (0, None, f"{{{CORES[0]}}}", "1"),
        (len(CORES) + 1, None, f"{{{CORES[1 % len(CORES)]}}}", "1"),
        (1, "0-1|2-4,7", "{2,3,4,7}", "4"),
        (1, "0-1|", f"{{{CORES[1 % len(CORES)]}}}", "1"),  # not given for this one
        (2, "0|1", f"{{{CORES[2 % len(CORES)]}}}", "1"),
    ],
)
def test_a_shard_computes_on_its_cores(
    monkeypatch: pytest.MonkeyPatch, rank: int, bind: str | None, places: str, num_threads: str
) -> None:
    for name in ("OMP_PLACES", "OMP_NUM_THREADS", "OMP_PROC_BIND", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(name, "as it was")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    prepare_environment(rank, bind, on_gpu=False)
    assert os.environ["OMP_PLACES"] == places and os.environ["OMP_NUM_THREADS"] == num_threads
    assert os.environ["OMP_PROC_BIND"] == "true" and os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG", "what the user asked for stays"


def test_cores_are_left_alone_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PLACES", "as it was")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    prepare_environment(0, "0", on_gpu=True)
    assert os.environ["OMP_PLACES"] == "as it was" and os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"


@pytest.mark.parametrize(
    ("num_shards", "num_groups", "bind", "rank", "cores", "expected"),
    [
        (1, 1, None, 0, [0, 1], {1}),
        (2, 1, None, 0, [0, 1, 2, 3], {2, 3}),
        (2, 2, None, 1, [4, 5, 6, 7, 8], {8}),
        (1, 2, None, 0, [0, 1], {1}),  # none is left but that of the other group
        (1, 2, None, 1, [0, 1], {0}),
        (2, 2, None, 2, [0, 1, 2, 3], {0, 1}),
        (2, 1, None, 1, [0, 1], {1}),  # none is left but its own
        (4, 1, None, 3, [0, 1], {1}),
        (2, 1, "0-2|3,4", 1, [0, 1, 2, 3, 4, 5], {5}),
        (2, 1, "0-2|3,4", 1, [0, 1, 2, 3, 4], {3, 4}),
        (1, 1, "", 0, [3], {3}),
    ],
)
def test_a_front_end_keeps_off_the_cores_of_engines(num_shards, num_groups, bind, rank, cores, expected) -> None:
    engine = EngineConfig(num_shards=num_shards, num_groups=num_groups, omp_threads_bind=bind)
    assert front_end_cores(rank, engine, cores) == expected


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_threads_that_openmp_has_bound_move_to_the_front_ends_cores() -> None:
    """In a process of its own: what vLLM imports brings an OpenMP of its own, which binds the thread that loads it."""
    program = """
import os, threading
from actors.shard_environment import front_end_cores, move_threads, prepare_environment
from rollout.config import EngineConfig
cores = sorted(os.sched_getaffinity(0))
prepare_environment(0, None, on_gpu=False)
import vllm.v1.engine.async_llm
done = threading.Event()
other = threading.Thread(target=done.wait)
other.start()
before = os.sched_getaffinity(other.native_id)
move_threads(front_end_cores(0, EngineConfig(num_shards=1), cores))
print(before == {cores[0]}, os.sched_getaffinity(0) == os.sched_getaffinity(other.native_id) == set(cores[1:]))
done.set()
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert told.stdout.split() == ["True", "True"], told.stderr


def test_without_lists_each_shard_has_one_core() -> None:
    assert [engine_cores(rank, None, [2, 5]) for rank in range(3)] == [[2], [5], [2]]
