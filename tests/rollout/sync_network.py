"""Virtual time, and a network on which every message has a number and may meet a planned fault."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from rollout.errors import EngineDead

LATENCY_S = 1.0
KILLING = ("die_before", "die_after", "hang")
OUTAGES = tuple(f"{kind}_{seconds}" for kind in ("cut", "mute", "slow") for seconds in (12, 25))
"""From this message on nothing reaches its receiver (cut), nothing comes back (mute), or nothing arrives
before the end (slow): long enough for all sends of one step, or of two."""
KINDS_IN_ORDER = ("lost", "reply_lost", *KILLING)
"""For pause and resume, which carry no attempt: an actor's calls reach it in order and once, or not at all."""
KINDS = ("lost", "reply_lost", "doubled", "late_3", "late_14", "late_30", "late_48", *OUTAGES, *KILLING)


class Violation(AssertionError):
    """Something that must never happen did."""


class VirtualSelector(selectors.SelectSelector):
    """Instead of waiting, moves the clock."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list:
        if timeout is None:
            raise Violation("everybody waits for something that will never happen")
        self.now += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs callbacks in the order of their times, without waiting."""

    def __init__(self) -> None:
        self._virtual = VirtualSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


async def forever() -> Any:
    await asyncio.get_running_loop().create_future()


class Network:
    """Carries calls; call number `index` meets the fault planned for it, once."""

    def __init__(self, faults: Mapping[int, str]) -> None:
        self._faults = dict(faults)
        self._outages: dict[str, tuple[str, float]] = {}
        self._held: list[tuple[float, asyncio.Event]] = []
        self._tasks: set[asyncio.Task] = set()
        self.log: list[str] = []
        self.num_disturbances = 0  # faults that struck, and messages of a sender that came after it had gone

    async def call(self, label: str, handle: Callable[[], Awaitable[Any]], kill: Callable[[str], None]) -> Any:
        index = len(self.log)
        self.log.append(label)
        for threshold, event in self._held:
            if index >= threshold:
                event.set()
        # A caller that gives up does not call back what is on its way.
        return await asyncio.shield(self.spawn(self._carry(index, handle, kill)))

    async def _carry(self, index: int, handle: Callable[[], Awaitable[Any]], kill: Callable[[str], None]) -> Any:
        kind = self._faults.pop(index, None)
        self.num_disturbances += kind is not None
        loop, target = asyncio.get_running_loop(), self.log[index].partition("@")[2]
        latency_s = LATENCY_S + 0.07 * (index * 7 % 5)
        await asyncio.sleep(latency_s)
        if kind in OUTAGES:
            outage, _, seconds = kind.partition("_")
            self._outages[target] = (outage, loop.time() + float(seconds))
        outage, until = self._outages.get(target, ("", 0.0))
        if loop.time() >= until:
            outage = ""
        if kind == "lost" or outage == "cut":
            return await forever()
        if outage == "slow":
            await asyncio.sleep(until - loop.time())
        if kind is not None and kind.startswith("late"):
            await self._until(index, index + int(kind.removeprefix("late_")))
        if kind in ("die_before", "hang"):
            kill(kind)
        if kind == "doubled":
            self.spawn(self._again(handle))
        result = await handle()
        if kind == "die_after":
            kill(kind)
            raise EngineDead("died after the work was done")
        if kind == "reply_lost" or outage == "mute":
            return await forever()
        await asyncio.sleep(latency_s)
        return result

    async def _again(self, handle: Callable[[], Awaitable[Any]]) -> None:
        await asyncio.sleep(2.6 * LATENCY_S)
        await handle()

    async def _until(self, index: int, threshold: int) -> None:
        event = asyncio.Event()
        self._held.append((threshold, event))
        await event.wait()
        self.num_disturbances += self.log[index].endswith("@publisher")

    @property
    def has_outage(self) -> bool:
        return any(until > asyncio.get_running_loop().time() for _, until in self._outages.values())

    def release(self) -> bool:
        """Deliver everything that is late; whether there was anything."""
        waiting = [event for _, event in self._held if not event.is_set()]
        for event in waiting:
            event.set()
        return bool(waiting)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself keeps no reference to a task
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task
