"""The shards as a publisher calls them: all together, with a limit in time, every answer kept.

Owns how one step is asked of many shards and how a lost answer is asked for again. Knows nothing of
the order of steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Protocol

from rollout.config import InFlight
from rollout.errors import EngineDead
from rollout.fleet import Rendezvous
from rollout.sync.manifest import BucketRef

NUM_SENDS = 3
"""How often a message that must get through is sent, within the time limit of one step."""


class Receiver(Protocol):
    """One shard, as the publisher sees it; see rollout.sync.participant for what the calls mean.

    Every call may raise, or never return. EngineDead means that the shard is gone for good; anything
    else means only that this call failed.
    """

    async def open_transport(self, rendezvous: Rendezvous, world_size: int) -> None: ...

    async def begin(self, attempt: int, version: int, base: int | None) -> None: ...

    async def stage(self, ref: BucketRef) -> None: ...

    async def verify(self, attempt: int) -> str: ...

    async def arm(self, attempt: int) -> None: ...

    async def flip(self, attempt: int) -> int: ...

    async def drop(self, attempt: int) -> int: ...

    async def live_version(self) -> int: ...

    async def pause(self, mode: InFlight) -> None: ...

    async def resume(self) -> None: ...


Call = Callable[[Receiver], Awaitable[Any]]
Receivers = Mapping[int, Receiver]


async def ask(receivers: Receivers, call: Call, timeout_s: float) -> dict[int, Any]:
    """Make one call on every shard at once. Returns the result, or the exception, of each by rank."""
    limited = (asyncio.wait_for(call(receiver), timeout_s) for receiver in receivers.values())
    answers = await asyncio.gather(*limited, return_exceptions=True)
    return dict(zip(receivers, answers, strict=True))


async def insist(receivers: Receivers, call: Call, timeout_s: float) -> dict[int, Any]:
    """Like `ask`, for a call that may be doubled: sent again to those that did not answer, within `timeout_s`."""
    answers: dict[int, Any] = {}
    left = dict(receivers)
    for _ in range(NUM_SENDS):
        answers |= await ask(left, call, timeout_s / NUM_SENDS)
        left = {
            rank: receiver
            for rank, receiver in left.items()
            if isinstance(answers[rank], Exception) and not isinstance(answers[rank], EngineDead)
        }
        if not left:
            break
    return {rank: answers[rank] for rank in receivers}


def failed(answers: Mapping[int, Any]) -> dict[int, BaseException]:
    """The answers that are faults."""
    return {rank: answer for rank, answer in answers.items() if isinstance(answer, BaseException)}


def said(faults: Mapping[int, BaseException], timeout_s: float) -> str:
    """What failed shards said, for an error message."""
    return "; ".join(f"shard {rank}: {_one_said(fault, timeout_s)}" for rank, fault in faults.items())


def watched(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A task that ends even if whoever started it is cancelled; its fault is then nobody's."""
    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


def _one_said(fault: BaseException, timeout_s: float) -> str:
    if isinstance(fault, TimeoutError):
        return f"no answer within {timeout_s:g} s"
    return str(fault) or type(fault).__name__
