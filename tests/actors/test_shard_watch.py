"""The watch on shards: who hangs, and how long tokens took meanwhile. The shards are scripted, and so is the time."""

from __future__ import annotations

import asyncio

from actors.shard_watch import ShardWatch
from rollout.fleet import Pace
from tests.actors.gateway_fakes import Remote


class Scripted:
    """A shard with the pace that it is given."""

    def __init__(self) -> None:
        self.told = Pace(num_steps=0)

    async def pace(self) -> Pace:
        return self.told


def test_tokens_between_two_answers_are_counted_and_who_makes_no_step_hangs() -> None:
    watch, one, other = ShardWatch(5.0), Scripted(), Scripted()
    shards, both = {0: Remote(one), 1: Remote(other)}, {0, 1}

    async def look(now: float, busy: set[int] = both) -> list[int]:
        hanging = watch.look(shards, busy, now)
        await asyncio.sleep(0.01)  # the answers come
        return hanging

    async def work() -> None:
        one.told = Pace(num_steps=10, num_tokens=100, token_s=2.0)
        assert await look(0.0) == []
        one.told = Pace(num_steps=12, num_tokens=130, token_s=2.5)
        assert await look(1.0) == []
        assert watch.take_tokens() == (0.0, 0), "what was before it looked first does not count"
        other.told = Pace(num_steps=1, num_tokens=4, token_s=0.25)
        assert await look(2.0) == []
        assert watch.take_tokens() == (0.5, 30)
        assert await look(3.0) == []
        assert watch.take_tokens() == (0.25, 4) and watch.take_tokens() == (0.0, 0)
        assert await look(7.5) == [0], "its last step was seen at 2"
        assert await look(8.5, {1}) == [1]
        assert await look(9.5) == [1], "who was idle meanwhile is given its time anew"

    asyncio.run(work())
