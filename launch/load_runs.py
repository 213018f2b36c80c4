"""Many requests at once: as many as may be under way (closed loop), or at given times (open loop).

Owns tasks and the clock of a run. Knows nothing of what is measured.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Iterable, Sequence

from launch.http_load import Ask, Outcome, Target, send, session
from rollout.errors import InvalidRequest

REFUSED_S = 0.1  # after a refusal that did not say when to come again


def arrivals(rate: float, duration_s: float, cv: float, seed: int) -> list[float]:
    """Times of arrival in [0, duration_s), with gaps drawn from a gamma distribution.

    Args:
        rate: Mean arrivals in a second.
        cv: Standard deviation of a gap over its mean: 0 = a clock, 1 = a Poisson process, above = in bursts.

    Raises:
        InvalidRequest: A rate or duration that is not positive, or a cv below 0.
    """
    if rate <= 0 or duration_s <= 0 or cv < 0:
        raise InvalidRequest("arrivals", f"rate={rate}, duration_s={duration_s}, cv={cv}", "> 0, > 0, ≥ 0")
    draw, shape = random.Random(seed), None if cv == 0 else 1 / cv**2
    times: list[float] = []
    now = 0.0
    while True:
        now += 1 / rate if shape is None else draw.gammavariate(shape, 1 / (rate * shape))
        if now >= duration_s:
            return times
        times.append(now)


async def closed_loop(
    target: Target, asks: Iterable[Ask], concurrency: int, until_s: float = math.inf
) -> list[Outcome]:
    """`concurrency` requests under way until all were sent, or until none may be sent any more."""
    began, waiting = time.perf_counter(), iter(asks)
    outcomes: list[Outcome] = []

    def now() -> float:
        return time.perf_counter() - began

    async def one_after_another() -> None:
        for ask in waiting:
            if now() >= until_s:
                return
            outcome = await send(http, target, ask, now)
            outcomes.append(outcome)
            if outcome.is_refused:  # a client that is told when to come again does
                await asyncio.sleep(outcome.retry_after_s or REFUSED_S)

    async with session() as http:
        await asyncio.gather(*(one_after_another() for _ in range(concurrency)))
    return outcomes


async def open_loop(target: Target, asks: Sequence[Ask], times: Sequence[float]) -> list[Outcome]:
    """Each request at its time, however many are under way; returns when all have ended."""
    began = time.perf_counter()

    def now() -> float:
        return time.perf_counter() - began

    async with session() as http:
        tasks = []
        for ask, at in zip(asks, times, strict=True):
            await asyncio.sleep(max(0.0, at - now()))
            tasks.append(asyncio.create_task(send(http, target, ask, now, planned_s=at)))
        return list(await asyncio.gather(*tasks))
