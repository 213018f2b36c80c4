"""The ranks of a simulated fleet: real participants over real shadows, small live weights, and how they are called."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rollout.config import InFlight
from rollout.errors import EngineDead
from rollout.sync.encoding import Encoding, TensorPlan
from rollout.sync.manifest import BucketRef, Piece
from rollout.sync.participant import Participant
from rollout.sync.shadow import Shadow
from tests.rollout.sync_network import Network, forever

GROUPS = {0: 0, 1: 0, 2: 1, 3: 1}


def plan(name: str, num_rows: int) -> TensorPlan:
    return TensorPlan(name=name, shape=(num_rows * 64,), encoding=Encoding.PLAIN, row_elements=64, dtype="float16")


PLANS = {p.name: p for p in (plan("w", 6), plan("e0", 3), plan("e1", 3))}
HELD = {0: ("w", "e0"), 1: ("w", "e1"), 2: ("w", "e0"), 3: ("w", "e1")}
PIECES = (
    (0, Piece(name="w", first_row=0, num_rows=4)),
    (0, Piece(name="e0", first_row=0, num_rows=3)),
    (1, Piece(name="w", first_row=4, num_rows=2)),
    (1, Piece(name="e1", first_row=0, num_rows=3)),
)
Rows = Mapping[str, torch.Tensor]


class LiveWeights:
    """A Store: a real shadow, and live weights that a flip copies into."""

    def __init__(self, rows: Rows, version: int) -> None:
        self.shadow = Shadow(PLANS, {name: matrix.clone() for name, matrix in rows.items()}, version)
        self.live = {name: matrix.clone() for name, matrix in rows.items()}
        self._prepared: dict[str, torch.Tensor] = {}

    def begin(self, base: int | None) -> None:
        self.shadow.begin(base)

    def stage(self, ref: BucketRef, payload: torch.Tensor) -> None:
        self.shadow.stage(ref, payload)

    def missing(self) -> list[str]:
        return self.shadow.missing()

    def digest(self) -> str:
        return self.shadow.common_digest(["w"])

    def prepare(self) -> None:
        self._prepared = {name: self.shadow.rows(name).clone() for name in self.shadow.changed}

    def flip(self, version: int) -> None:
        for name, matrix in self._prepared.items():
            self.live[name].copy_(matrix)
        self.shadow.commit(version)
        self._prepared = {}

    def undo(self) -> None:
        self.shadow.drop()
        self._prepared = {}


@dataclass(eq=False)
class Rank:
    """A process with weights."""

    number: int
    store: LiveWeights
    participant: Participant
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    is_dead: bool = False
    is_hung: bool = False
    is_paused: bool = False

    async def handle(self, work: Callable[[], Any], is_locked: bool = True) -> Any:
        """Do what a message asks for; with the lock, between two forwards."""
        if self.is_hung:
            await forever()
        if is_locked:
            async with self.lock:
                return await self.handle(work, is_locked=False)
        if self.is_dead:
            raise EngineDead(f"shard {self.number} is dead")
        return work()


class SimulatedReceiver:
    """A rank behind the network.

    Args:
        rank: The process; one that is started anew has a receiver of its own.
        network: Carries the calls.
        kill: Called when a fault ends the process, with its kind.
        payloads: Of buckets, by the name of their segment.
    """

    def __init__(
        self,
        rank: Rank,
        network: Network,
        kill: Callable[[Rank, str], None],
        payloads: Mapping[str | None, torch.Tensor],
    ) -> None:
        self._rank, self._network, self._kill, self._payloads = rank, network, kill, payloads

    def _call(self, method: str, work: Callable[[], Any], is_locked: bool = True) -> Awaitable[Any]:
        rank = self._rank
        label = f"{method}@{rank.number}"
        return self._network.call(label, lambda: rank.handle(work, is_locked), lambda kind: self._kill(rank, kind))

    async def begin(self, attempt: int, version: int, base: int | None) -> None:
        await self._call("begin", lambda: self._rank.participant.begin(attempt, version, base))

    async def stage(self, ref: BucketRef) -> None:
        await self._call("stage", lambda: self._rank.participant.stage(ref, self._payloads[ref.segment]))

    async def verify(self, attempt: int) -> str:
        return await self._call("verify", lambda: self._rank.participant.verify(attempt))

    async def arm(self, attempt: int) -> None:
        await self._call("arm", lambda: self._rank.participant.arm(attempt))

    async def flip(self, attempt: int) -> int:
        return await self._call("flip", lambda: self._rank.participant.flip(attempt))

    async def drop(self, attempt: int) -> int:
        return await self._call("drop", lambda: self._rank.participant.drop(attempt))

    async def live_version(self) -> int:
        return await self._call("live_version", lambda: self._rank.participant.live_version, is_locked=False)

    async def pause(self, mode: InFlight) -> None:
        await self._call("pause", lambda: setattr(self._rank, "is_paused", True), is_locked=False)

    async def resume(self) -> None:
        await self._call("resume", lambda: setattr(self._rank, "is_paused", False), is_locked=False)
