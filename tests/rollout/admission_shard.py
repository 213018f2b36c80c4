"""A shard whose steps take longer the more sequences they have, and users who ask more of it than it can do."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rollout.errors import QueueFull
from rollout.scheduler.admission import Admission, Fleet
from rollout.types import Prompt, RolloutRequest, SamplingParams, Ticket

TICK_S = 1.0
TTFT_S, TPOT_S = 0.2, 0.05


def completion(ticket: Ticket | None = None, max_wait_s: float | None = 0.1) -> RolloutRequest:
    return RolloutRequest(
        prompts=(Prompt(token_ids=(1,), prompt_id="p"),),
        n_samples_per_prompt=1,
        sampling=SamplingParams(max_tokens=4),
        run_seed=0,
        group_ids=("a",),
        priority=-1,
        max_wait_s=max_wait_s,
        ticket=ticket,
        is_interactive=True,
    )


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Seconds of a step: base + sequence × decoding + prefill × prefilled, times noise; of a request: a way of its own.

    Attributes:
        slots: Sequences that run together.
        num_tokens: Of every answer, on average; lengths vary by half around it.
        noise: Relative, of a step; log-normal.
        stall_every_s, stall_s: The machine does something else now and then.
        way_s: From the user to the engine and back, for a first token.
        refusal_s: That a refusal costs the machine.
    """

    base_s: float = 0.01
    sequence_s: float = 0.001
    prefill_s: float = 0.004
    slots: int = 64
    num_tokens: int = 64
    noise: float = 0.1
    stall_every_s: float = 20.0
    stall_s: float = 0.25
    way_s: float = 0.02
    refusal_s: float = 0.0


@dataclass
class Served:
    """One request that was let in."""

    sent_s: float
    num_tokens: int
    first_s: float = 0.0
    last_s: float = 0.0
    got: int = 0

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        return (self.last_s - self.first_s) / (self.num_tokens - 1)

    @property
    def is_within(self) -> bool:
        return self.ttft_s <= TTFT_S and self.tpot_s <= TPOT_S


@dataclass
class Run:
    """What came of it. `bounds` has the bound after every tick."""

    served: list[Served] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    bounds: list[int] = field(default_factory=list)

    def ended(self, start_s: float, stop_s: float) -> list[Served]:
        return [one for one in self.served if start_s <= one.last_s < stop_s]

    def share_within(self, start_s: float, stop_s: float) -> float:
        ended = self.ended(start_s, stop_s)
        return sum(one.is_within for one in ended) / max(1, len(ended))

    def good_per_s(self, start_s: float, stop_s: float) -> float:
        return sum(one.is_within for one in self.ended(start_s, stop_s)) / (stop_s - start_s)


def simulate(
    engine: Engine,
    rate: float,
    duration_s: float,
    admission: Admission,
    *,
    fixed: int | None = None,
    pace: Callable[[float], float] = lambda now: 1.0,
    num_rollouts: Callable[[float], int] = lambda now: 0,
    seed: int = 0,
) -> Run:
    """Offer requests as a Poisson process.

    Args:
        rate: Requests in a second.
        admission: Lets in.
        fixed: Let so many in at once instead.
        pace: What steps take at a time, of what they take usually.
        num_rollouts: That decode as well.
    """
    draw, run, now, next_tick = random.Random(seed), Run(), 0.0, TICK_S
    waiting: list[Served] = []
    running: list[Served] = []
    arrivals = _arrivals(rate, duration_s, engine, draw)
    arriving = next(arrivals, None)
    stall_at = engine.stall_every_s
    num_ended, num_tokens, token_s = 0, 0, 0.0
    while now < duration_s:
        lost_s = 0.0
        while arriving is not None and arriving.sent_s + engine.way_s <= now:
            num_open = len(waiting) + len(running)
            fleet = Fleet(num_shards=1, slots=engine.slots, num_ahead=max(0, num_open + 1 - engine.slots))
            try:
                if fixed is None:
                    admission.enter(completion(), fleet, now)
                elif num_open >= fixed:
                    raise QueueFull("fixed")
                waiting.append(arriving)
            except QueueFull:
                run.refused_s.append(now)
                lost_s += engine.refusal_s
            arriving = next(arrivals, None)
        prefilled, waiting = waiting[: engine.slots - len(running)], waiting[engine.slots - len(running) :]
        others = num_rollouts(now)
        if running or prefilled or others:
            step_s = engine.base_s + engine.sequence_s * (len(running) + others) + engine.prefill_s * len(prefilled)
            step_s = step_s * pace(now) * draw.lognormvariate(0.0, engine.noise) + lost_s
        else:
            step_s = 0.002
        if now >= stall_at:
            step_s, stall_at = step_s + engine.stall_s, stall_at + engine.stall_every_s * draw.uniform(0.5, 1.5)
        now += step_s
        token_s, num_tokens = token_s + step_s * (len(running) + others), num_tokens + len(running) + others
        for one in running:
            one.got, one.last_s = one.got + 1, now
        for one in prefilled:
            one.got, one.first_s = 1, now + engine.way_s * draw.uniform(0.5, 1.0)
            one.last_s = one.first_s
            admission.limit.first_token(one.ttft_s, one.sent_s)
        running += prefilled
        for one in [one for one in running if one.got >= one.num_tokens]:
            run.served.append(one)
            admission.limit.ended(one.tpot_s, one.sent_s)
            num_ended += 1
            if fixed is None:
                admission.leave(now)
        running = [one for one in running if one.got < one.num_tokens]
        while now >= next_tick:
            fleet = Fleet(num_shards=1, slots=engine.slots, num_ahead=0)
            admission.tick(fleet, len(running) + others, num_ended, next_tick)
            admission.limit.tokens(token_s, num_tokens)  # as the controller learns of them: with the next tick
            token_s, num_tokens = 0.0, 0
            run.bounds.append(admission.bound(1, engine.slots))
            next_tick += TICK_S
    return run


def _arrivals(rate: float, duration_s: float, engine: Engine, draw: random.Random):
    own = random.Random(draw.random())
    now = 0.0
    for _ in itertools.count():
        now += own.expovariate(rate)
        if now >= duration_s:
            return
        half = engine.num_tokens // 2
        yield Served(sent_s=now, num_tokens=own.randint(max(2, half), engine.num_tokens + half))


def fixed_bounds(engine: Engine, rate: float, duration_s: float, admission: Callable[[], Admission], **options) -> dict:
    """Share within and goodput of fixed bounds."""
    found = {}
    for bound in _bounds(engine.slots):
        run = simulate(engine, rate, duration_s, admission(), fixed=bound, **options)
        found[bound] = (run.share_within(10, duration_s), run.good_per_s(10, duration_s))
    return found


def _bounds(slots: int) -> Sequence[int]:
    return sorted({max(1, round(slots * share / 16)) for share in range(1, 17)})
