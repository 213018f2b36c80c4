"""Collectives of a few ranks on one host through shared memory: a few microseconds where a socket takes hundreds.

    write own slot (number of the collective mod 2) ─► publish number ─► wait for the peers' ─► read all slots

A rank that publishes number n has read all slots of n - 1, so slots of n - 1 are free for n + 1: two are enough. Stores
become visible in order on x86. Owns the segments and the waiting; what is exchanged is the caller's. A peer that dies
or stays silent is an error here too: nobody waits for ever.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

SHARED_MEMORY = Path("/dev/shm")
ALIGNMENT = 64
HEADER_BYTES = ALIGNMENT  # number of the newest collective, int64; a cache line of its own
SPINS = 200  # looks without a pause, about 30 µs: a peer in step is there by then
YIELD_S = 2e-3  # after which waiting sleeps between two looks; a sleep takes 100 µs, however short it is meant to be
PAUSE_S = 50e-6
CHECK_EVERY_S = 0.05  # between two looks whether a silent peer is alive


class PeerLost(RuntimeError):
    """A rank of the group is dead, or silent for longer than its bound."""


class ShmExchange:
    """One rank's end.

    Args:
        name: Of the group, the same on all its ranks and unique on this host.
        rank: Place in the group.
        slot_bytes: Most that a rank can write in one collective.
        timeout_s: After which a silent peer is an error.
        meet: A barrier of all ranks.
        pids: Processes of the ranks, in order.
    """

    def __init__(
        self,
        *,
        name: str,
        rank: int,
        slot_bytes: int,
        timeout_s: float,
        meet: Callable[[], object],
        pids: Sequence[int],
    ) -> None:
        self._rank, self._slot_bytes, self._timeout_s, self._pids = rank, slot_bytes, timeout_s, pids
        self._number = 0
        length = HEADER_BYTES + 2 * slot_bytes
        paths = [SHARED_MEMORY / f"longroll-ep-{name}-{r}" for r in range(len(pids))]
        mine = _mapped(paths[rank], length, os.O_CREAT | os.O_EXCL)
        try:
            meet()
            everything = [mine if r == rank else _mapped(path, length, 0) for r, path in enumerate(paths)]
            meet()
        finally:
            paths[rank].unlink()  # the mappings hold it; nothing is left behind, however this process ends
        self._numbers = [one[:8].view(torch.int64).numpy() for one in everything]
        self._slots = [one[HEADER_BYTES:].view(2, slot_bytes) for one in everything]

    def has_room(self, parts: Sequence[tuple[torch.Tensor, int]]) -> bool:
        """Whether so many rows of each of these tensors fit a slot; must be asked alike on all ranks."""
        return sum(_aligned(rows * _row_bytes(tensor)) for tensor, rows in parts) <= self._slot_bytes

    def gather_rows(self, tensors: Sequence[torch.Tensor], rows: Sequence[int]) -> list[torch.Tensor]:
        """Every rank's rows of each tensor, rank 0's first.

        Args:
            tensors: [rows[rank], ...] each; the same number and row shapes on every rank.
            rows: By rank.

        Returns:
            [sum(rows), ...] each.

        Raises:
            PeerLost: A rank died or gave no sign of life in time.
        """
        slots = self._next_slots()
        at = 0
        for tensor in tensors:
            _part(slots[self._rank], at, tensor, len(tensor)).copy_(tensor)
            at += _aligned(len(tensor) * _row_bytes(tensor))
        self._publish()
        places = [0] * len(slots)
        gathered = []
        for tensor in tensors:
            parts = []
            for rank, slot in enumerate(slots):
                parts.append(_part(slot, places[rank], tensor, rows[rank]))
                places[rank] += _aligned(rows[rank] * _row_bytes(tensor))
            gathered.append(torch.cat(parts))
        return gathered

    def sum_rows(self, tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """This rank's rows of the sum of all ranks' tensors, added in the order of the ranks.

        Args:
            tensor: [sum(rows), ...], of the same shape on every rank.
            rows: That belong to each rank.

        Raises:
            PeerLost: A rank died or gave no sign of life in time.
        """
        slots = self._next_slots()
        _part(slots[self._rank], 0, tensor, len(tensor)).copy_(tensor)
        self._publish()
        start, count = sum(rows[: self._rank]) * _row_bytes(tensor), rows[self._rank]
        total = _part(slots[0], start, tensor, count).clone()
        for slot in slots[1:]:
            total += _part(slot, start, tensor, count)
        return total

    def _next_slots(self) -> list[torch.Tensor]:
        """Slots of the collective that comes next, by rank: uint8 [slot_bytes]."""
        return [both[(self._number + 1) % 2] for both in self._slots]

    def _publish(self) -> None:
        """This rank's slot is written: wait until all are."""
        self._number += 1
        self._numbers[self._rank][0] = self._number
        for rank in range(len(self._pids)):
            if rank != self._rank:
                self._wait(rank)

    def _wait(self, rank: int) -> None:
        theirs, number = self._numbers[rank], self._number
        for _ in range(SPINS):
            if theirs[0] >= number:
                return
        began = checked = now = time.monotonic()
        while theirs[0] < number:
            if now - began < YIELD_S:
                os.sched_yield()  # whoever shares this core may go on
            else:
                time.sleep(PAUSE_S)
            now = time.monotonic()
            if now - checked >= CHECK_EVERY_S:
                checked = now
                self._check(rank, now - began)

    def _check(self, rank: int, waited_s: float) -> None:
        pid = self._pids[rank]
        if not _is_alive(pid):
            raise PeerLost(f"expert-parallel rank {rank}: got a process {pid} that is gone, expected it to take part")
        if waited_s > self._timeout_s:
            raise PeerLost(f"expert-parallel rank {rank}: got no sign of life for {self._timeout_s:g} s")


def boot_id() -> str:
    """Tells hosts apart, and containers that do not share /dev/shm."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}-{SHARED_MEMORY.stat().st_dev}"


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _row_bytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def _part(slot: torch.Tensor, start: int, like: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Rows of a tensor's shape and dtype that lie in a slot from byte `start` on; a view."""
    return slot[start : start + num_rows * _row_bytes(like)].view(like.dtype).view(num_rows, *like.shape[1:])


def _mapped(path: Path, length: int, flags: int) -> torch.Tensor:
    """uint8 [length] of a file in shared memory, which is made if the flags say so."""
    descriptor = os.open(path, flags | os.O_RDWR, 0o600)
    try:
        if flags:
            os.ftruncate(descriptor, length)
        return torch.frombuffer(mmap.mmap(descriptor, length), dtype=torch.uint8)
    finally:
        os.close(descriptor)


def _is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")
