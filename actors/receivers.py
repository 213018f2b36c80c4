"""Calls to a shard's actor, with errors in their own class. Knows nothing of when to call what."""

from __future__ import annotations

from typing import Any

from ray.exceptions import RayActorError

from rollout.config import InFlight
from rollout.errors import EngineDead
from rollout.fleet import Rendezvous
from rollout.remote import original_error
from rollout.sync.manifest import BucketRef


async def answer(reference: Any) -> Any:
    """Await a remote call; what it raised is raised in its own class."""
    try:
        return await reference
    except RayActorError as error:
        raise EngineDead(f"shard: its actor is gone: {str(error).splitlines()[0]}") from error
    except Exception as error:  # every error is passed on
        original = original_error(error)
        if original is error:
            raise
        raise original from None


class ShardReceiver:
    """A shard's actor as the publisher wants to see it, its errors in their own class.

    Args:
        shard: The actor.

    Attributes:
        num_workers_left: Workers of this shard and of those after it; in a broadcast group they come last.
    """

    def __init__(self, shard: Any) -> None:
        self._shard = shard
        self.num_workers_left = 1
        self._payloads: dict[tuple[int, int, int], Any] = {}

    def offer(self, ref: BucketRef, payload: Any) -> None:
        """Keep a bucket's reference in the object store for `stage`; None forgets it."""
        key = (ref.attempt, ref.sender, ref.index)
        if payload is None:
            self._payloads.pop(key, None)
        else:
            self._payloads[key] = payload

    async def open_transport(self, rendezvous: Rendezvous, world_size: int) -> None:
        first = world_size - self.num_workers_left
        await answer(self._shard.open_transport.remote(rendezvous, first, world_size))

    async def begin(self, attempt: int, version: int, base: int | None) -> None:
        await answer(self._shard.begin.remote(attempt, version, base))

    async def stage(self, ref: BucketRef) -> None:
        payload = self._payloads.get((ref.attempt, ref.sender, ref.index))
        await answer(self._shard.stage.remote(ref, payload))

    async def verify(self, attempt: int) -> str:
        digest: str = await answer(self._shard.verify.remote(attempt))
        return digest

    async def arm(self, attempt: int) -> None:
        await answer(self._shard.arm.remote(attempt))

    async def flip(self, attempt: int) -> int:
        version: int = await answer(self._shard.flip.remote(attempt))
        return version

    async def drop(self, attempt: int) -> int:
        version: int = await answer(self._shard.drop.remote(attempt))
        return version

    async def live_version(self) -> int:
        version: int = await answer(self._shard.live_version.remote())
        return version

    async def pause(self, mode: InFlight) -> None:
        await answer(self._shard.pause.remote(mode))

    async def resume(self) -> None:
        await answer(self._shard.resume.remote())
