"""A scripted shard that holds its chunks until it is told to go on, and from then on holds none."""

from __future__ import annotations

from dataclasses import replace

from actors.process import place_of_this_process
from tests.actors.fakes import ANSWER, HOLD, FakeShard


class FleetShard(FakeShard):
    """See the module; a successor of its controller can take it over."""

    is_held = True

    async def start(self, rendezvous):
        return replace(await super().start(rendezvous), place=place_of_this_process())

    async def generate(self, chunk):
        if not self.is_held and chunk.token_ids[0] == HOLD:
            told = replace(chunk, token_ids=(ANSWER, *chunk.token_ids[1:]))
            return await super().generate(told)
        return await super().generate(chunk)

    async def go_on(self):
        self.is_held = False
        await self.release()

    async def abort_all(self):
        for trajectory_id in list(self.held):
            self._end(trajectory_id, False)
