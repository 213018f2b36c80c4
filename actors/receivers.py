"""Calls to a shard's actor, with errors in their own class. Knows nothing of when to call what."""

from __future__ import annotations

from typing import Any

from rollout.config import InFlight
from rollout.fleet import Rendezvous
from rollout.remote import original_error
from rollout.sync.manifest import BucketRef


async def answer(reference: Any) -> Any:
    """Await a remote call; what it raised is raised in its own class."""
    try:
        return await reference
    except Exception as error:  # every error is passed on
        original = original_error(error)
        if original is error:
            raise
        raise original from None


class ShardReceiver:
    """A shard's actor as the publisher wants to see it, its errors in their own class."""

    def __init__(self, shard: Any) -> None:
        self._shard = shard

    async def open_transport(self, rendezvous: Rendezvous, world_size: int) -> None:
        await answer(self._shard.open_transport.remote(rendezvous, world_size))

    async def stage(self, ref: BucketRef) -> None:
        await answer(self._shard.stage.remote(ref))

    async def drop_stage(self, version: int) -> None:
        await answer(self._shard.drop_stage.remote(version))

    async def pause(self, mode: InFlight) -> None:
        await answer(self._shard.pause.remote(mode))

    async def apply(self, version: int) -> None:
        await answer(self._shard.apply.remote(version))

    async def resume(self) -> None:
        await answer(self._shard.resume.remote())
