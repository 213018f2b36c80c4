"""One rank of a shared-memory exchange, as a process of its own. Run by test_shm_exchange.py.

Collectives of random sizes; every result is compared with what all ranks' tensors, drawn from the same seeds, give.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from actors.vllm_plugin.shm_exchange import ShmExchange

SLOT_BYTES = 2**16


def drawn(rank: int, number: int, rows: int) -> list[torch.Tensor]:
    """What a rank gives to a collective."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return [
        torch.randn(rows, 7, generator=generator),
        torch.randint(0, 99, (rows, 3), generator=generator, dtype=torch.int32),
        torch.randn(rows, 5, generator=generator).bfloat16(),
    ]


def meet(folder: Path, rank: int, size: int) -> None:
    """A barrier of files."""
    number = len(list(folder.glob(f"{rank}-*")))
    (folder / f"{rank}-{number}").touch()
    while not all((folder / f"{r}-{number}").exists() for r in range(size)):
        time.sleep(0.001)


def main(folder: Path, rank: int, size: int, count: int, die_at: int | None) -> None:
    torch.set_num_threads(1)
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    meet(folder, rank, size)
    pids = [int((folder / f"pid{r}").read_text()) for r in range(size)]
    exchange = ShmExchange(
        name=folder.name,
        rank=rank,
        slot_bytes=SLOT_BYTES,
        timeout_s=20.0,
        meet=lambda: meet(folder, rank, size),
        pids=pids,
    )
    for number in range(count):
        if number == die_at:
            os._exit(9)
        rows = [(number * 3 + r * 5) % 11 for r in range(size)]  # 0 among them
        every = [drawn(r, number, rows[r]) for r in range(size)]
        for i, tensor in enumerate(exchange.gather_rows(every[rank], rows)):
            assert torch.equal(tensor, torch.cat([mine[i] for mine in every])), (number, i)
        partial = [torch.randn(sum(rows), 6, generator=torch.Generator().manual_seed(number + r)) for r in range(size)]
        total = partial[0].clone()
        for other in partial[1:]:
            total += other
        start = sum(rows[:rank])
        assert torch.equal(exchange.sum_rows(partial[rank], rows), total[start : start + rows[rank]]), number


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), int(sys.argv[5]) if len(sys.argv) > 5 else None)
