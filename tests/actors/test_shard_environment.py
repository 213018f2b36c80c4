from __future__ import annotations

import os

import pytest

from actors.shard_environment import prepare_environment

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
