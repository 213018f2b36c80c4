"""Sampling memory of a tree of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.device_memory import (
    MIB,
    MemorySampler,
    Sample,
    gpu_bytes,
    memory_use,
    parse_nvidia_smi,
    process_tree,
    pss_bytes,
)
from rollout.errors import InvalidRequest

HOLDER = "import sys; held = bytearray(b'x') * (64 * 2**20); print('ready', flush=True); sys.stdin.read()"


@pytest.fixture
def holder():  # type: ignore[no-untyped-def]
    """A child that holds 64 MiB."""
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


def test_pss_counts_what_a_child_holds(holder: subprocess.Popen[bytes]) -> None:
    held = pss_bytes(holder.pid)
    assert 64 * MIB <= held < 128 * MIB  # and an interpreter of some 10 MiB
    assert holder.pid in [process.pid for process in process_tree(os.getpid())]


def test_sampler_sees_the_whole_tree(holder: subprocess.Popen[bytes]) -> None:
    with MemorySampler(os.getpid(), interval_s=0.05) as sampler:
        pass
    (sample, *_) = sampler.samples
    assert sample.num_processes >= 2 and sample.pss_bytes >= pss_bytes(holder.pid)


def test_no_such_process_is_refused_and_a_dead_one_counts_nothing() -> None:
    with pytest.raises(InvalidRequest):
        process_tree(2**22 + 1)  # above the largest pid of Linux
    assert pss_bytes(2**22 + 1) == 0


def test_memory_use_tells_growth_from_a_level() -> None:
    level = [Sample(time_s=float(i), pss_bytes=100 * MIB, num_processes=3) for i in range(16)]
    assert memory_use(level).growth_bytes == 0 and memory_use(level).peak_gpu_bytes is None
    growing = [Sample(time_s=float(i), pss_bytes=(100 + i) * MIB, num_processes=3) for i in range(16)]
    # Medians of samples 4-7 and 12-15.
    assert memory_use(growing).growth_bytes == 8 * MIB and memory_use(growing).peak_pss_bytes == 115 * MIB
    with pytest.raises(InvalidRequest):
        memory_use([])


def test_reads_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_nvidia_smi("12\n80000\n") == (12 * MIB, 80000 * MIB)
    fake = tmp_path / "nvidia-smi"
    fake.write_text('#!/bin/sh\n[ "$1" = --query-gpu=memory.used ] && echo 5 && echo 7\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu_bytes() == (5 * MIB, 7 * MIB)
    with MemorySampler(os.getpid(), interval_s=0.05) as sampler:
        pass
    assert memory_use(sampler.samples).peak_gpu_bytes == 7 * MIB
