"""What the trainer's ranks tell each other during a publication: numbers, bytes and faults.

Every method is collective. Knows nothing of weights.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from rollout.errors import LongrollError, SyncRefused

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An error, and when it happened by the wall clock: one rank's failure makes others fail after it."""

    error: Exception
    at: float = field(default_factory=time.time)


class RankGroup:
    """The ranks of a process group.

    Args:
        group: Of the trainer; the default group unless a test has its own.
        device: What its collectives work on.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self.device = group, device
        self.rank, self.size = group.rank(), group.size()

    def gather_numbers(self, number: int) -> list[int]:
        """One integer of every rank, by rank."""
        mine = torch.tensor([number], dtype=torch.int64, device=self.device)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        self._group.allgather([every], [mine]).wait()
        return [int(value) for value in every]

    def gather_bytes(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Bytes of every rank, by rank.

        Args:
            mine: uint8 [n] on the group's device; every rank has its own n.
        """
        sizes = self.gather_numbers(mine.numel())
        width = max(sizes)
        if width == 0:
            return [mine] * self.size
        padded = torch.zeros(width, dtype=torch.uint8, device=self.device)
        padded[: mine.numel()] = mine
        every = [torch.empty_like(padded) for _ in range(self.size)]
        self._group.allgather([every], [padded]).wait()
        return [part[:size] for part, size in zip(every, sizes, strict=True)]

    def gather(self, mine: T) -> list[T]:
        """A picklable value of every rank, by rank."""
        packed = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8).to(self.device)
        return [pickle.loads(part.cpu().numpy().tobytes()) for part in self.gather_bytes(packed)]

    def agree(self, what: str, fault: Fault | None) -> None:
        """Return on all ranks if none has a fault, otherwise raise on all of them the one that came first.

        Args:
            what: Begins the message of an error that is not one of ours.
            fault: Of this rank.

        Raises:
            LongrollError: The first error by the clock; SyncRefused in place of one of another kind.
        """
        if not any(self.gather_numbers(fault is not None)):
            return
        mine = None
        if fault is not None:
            error = fault.error
            if not isinstance(error, LongrollError):
                error = SyncRefused(f"{what}, trainer rank {self.rank}: {type(error).__name__}: {error}")
            mine = (fault.at, error)
        raise min((known for known in self.gather(mine) if known is not None), key=lambda known: known[0])[1]

    def together(self, what: str, action: Callable[[], T], *, on: int | None = None) -> T | None:
        """Run an action on one rank, or on all; every rank learns whether it worked.

        Args:
            what: See `agree`.
            action: What to run.
            on: The rank to run it on; None = on every rank.

        Returns:
            The action's result where it ran.

        Raises:
            LongrollError: See `agree`.
        """
        result: T | None = None
        fault: Fault | None = None
        if on is None or on == self.rank:
            try:
                result = action()
            except Exception as error:  # whatever it is, the other ranks must hear of it
                fault = Fault(error=error)
        self.agree(what, fault)
        return result
