"""Collectives through shared memory, between real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actors.vllm_plugin.shm_exchange import SHARED_MEMORY, ShmExchange, boot_id

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120


def run_ranks(folder: Path, size: int, count: int, dies: dict[int, int]) -> list[tuple[int, str]]:
    """Exit code and errors of every rank; `dies` says before which collective a rank ends."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.actors.shm_child", str(folder), *map(str, (rank, size, count))]
            + ([str(dies[rank])] if rank in dies else []),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    said = [process.communicate(timeout=TIMEOUT_S)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.mark.parametrize("size", [2, 3])
def test_ragged_collectives_give_every_rank_the_same(tmp_path: Path, size: int) -> None:
    for code, text in run_ranks(tmp_path, size, 300, {}):
        assert code == 0, text
    assert not list(SHARED_MEMORY.glob(f"longroll-ep-{tmp_path.name}-*")), "segments were left behind"


def test_the_death_of_a_rank_is_an_error_at_its_peers(tmp_path: Path) -> None:
    (dead, _), (code, text) = run_ranks(tmp_path, 2, 300, {0: 150})
    assert dead == 9 and code == 1
    assert "PeerLost: expert-parallel rank 0: got a process" in text and "that is gone" in text


def test_room_is_that_of_one_slot_with_every_part_aligned() -> None:
    exchange = object.__new__(ShmExchange)
    exchange._slot_bytes = 256
    rows = torch.empty(9, 4)  # 16 bytes a row
    assert exchange.has_room([(rows, 16)]) and not exchange.has_room([(rows, 17)])
    assert exchange.has_room([(rows, 1)] * 4) and not exchange.has_room([(rows, 1)] * 5)


def test_processes_of_one_host_know_it() -> None:
    assert boot_id() == boot_id() and "-" in boot_id()
