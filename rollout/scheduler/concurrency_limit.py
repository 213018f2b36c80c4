"""How many completions users may have under way at once so that those which are let in keep the targets.

Neither how long a step takes with so many sequences nor how long a first token waits is known beforehand, so the bound
is learned from what is observed, as concurrency limits are in TCP (additive increase and multiplicative decrease) and
in Netflix's concurrency-limits (the gradient of the time over what it should be):

- time to first token: the bound goes down when too many of the requests that it let in missed the target, sent over
  more than `PAUSE_S` (a single pause of a machine is no overload), and up by rounds while the tail is well below it;
- time per output token: it grows at most in proportion to what runs. With n running and a time t the target T is kept
  by at least n · T / t while t < T, and by at most that while t > T; that is the bound's ceiling, and converges.

It is of one shard, so that it holds when shards come and go; it never goes below one, nor above the slots. Where a
target is missed by requests that have a shard nearly to themselves, refusing others does not help: the target is then
`RELIEF` times what was seen there, until less is seen. Time is passed in as ticks, about one a second. Knows nothing of
requests, queues or who is refused.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from rollout.config import AdmissionConfig

PAUSE_S = 1.0
WINDOW_TICKS = 5  # that times to first token are remembered for
TOKEN_TICKS = 3  # that the time per output token is averaged over
TAIL = 0.95  # quantile of the time to first token that is held against the target
MISSES = 0.02  # share of requests that may miss a target; half of it by the time per token
ROOM = 0.7  # of the target to first token: the bound grows while the tail is below
GROWTH, FALL = 1.5, 0.5  # most in one tick
FALLEN = 0.9  # of the bound before; what falls by less is an adjustment
RELIEF = 2.0
MIN_ROUND, MAX_ROUND = 4, 32  # first tokens between two steps up: one of each slot, within these
PROBE_ROUNDS = 4  # before one more is let in though the tail is near the target: it may be so whatever else runs
DRAIN_TICKS = 30  # that a bound waits at most for what was let in before it fell
MIN_TOKENS = 32  # before a time per token is believed
HEADROOM, MIN_HEADROOM, MAX_HEADROOM = 0.9, 0.6, 0.95  # of the target per token, on average over what runs
HEADROOM_STEP = 0.04  # down for a request that missed its target, and up for so many that kept it as balance it
MAX_STEPS = 4  # down in a tick, as what misses together misses for one reason
SPARE = 1.1  # of the headroom over the time per token: one more is let in, though in proportion it would not be
ALONE = 1.5  # completions on a shard, at most, to be nearly alone there
ALONE_SEEN = 8  # of those, that are remembered
OUTDATED = 0.7  # of what was seen alone: requests that are not take less, so that it is no longer true


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What was under way in one tick.

    Attributes:
        num_shards, slots: That serve, and sequences that each may run.
        mean_open, peak_open: Completions of users under way, on all shards together.
        num_others: Other trajectories that ran at its end.
    """

    num_shards: int
    slots: int
    mean_open: float
    peak_open: int
    num_others: int = 0


@dataclass(slots=True)
class _Tick:
    """Owned by the limit. Loads are of one shard."""

    mean: float = 0.0
    peak: float = 0.0
    first: list[tuple[float, float]] = field(default_factory=list)  # times to first token, and of sending
    token_s: float = 0.0
    num_tokens: int = 0
    num_late: int = 0


@dataclass(slots=True)
class _Goal:
    """A target, and what it comes to. Owned by the limit."""

    target_s: float
    aim_s: float = 0.0
    alone: deque[float] = field(default_factory=lambda: deque(maxlen=ALONE_SEEN))

    def __post_init__(self) -> None:
        self.aim_s = self.target_s

    def note(self, seen_s: float, *, is_alone: bool) -> None:
        """Requests that were nearly alone, or were not, took so long."""
        if is_alone:
            self.alone.append(seen_s)
            if len(self.alone) >= MIN_ROUND:
                usual_s = _quantile(self.alone, 0.5)
                self.aim_s = RELIEF * usual_s if usual_s > self.target_s else self.target_s
        elif RELIEF * seen_s < OUTDATED * self.aim_s:
            self.alone.clear()
            self.aim_s = self.target_s


class ConcurrencyLimit:
    """See the module.

    Args:
        config: The targets.
    """

    def __init__(self, config: AdmissionConfig) -> None:
        self._first = None if config.ttft_target_s is None else _Goal(config.ttft_target_s)
        self._token = None if config.tpot_target_s is None else _Goal(config.tpot_target_s)
        self._headroom = HEADROOM
        self._bound = math.inf  # of one shard
        self._ticks: deque[_Tick] = deque(maxlen=WINDOW_TICKS)
        self._tick = _Tick()
        self._round: deque[float] = deque(maxlen=PROBE_ROUNDS * MAX_ROUND)  # first tokens since it grew
        self._num_ticks = 0  # since it last grew
        self._drains_for = 0  # ticks, at most: more than the bound is still under way from before it fell
        self._lowered_at = -math.inf

    @property
    def is_on(self) -> bool:
        return self._first is not None or self._token is not None

    def total(self, num_shards: int, slots: int) -> int | None:
        """Completions that may be under way on so many shards; None without targets."""
        if not self.is_on:
            return None
        return max(1, math.floor(min(self._bound, slots) * num_shards))

    def first_token(self, ttft_s: float, sent_at: float) -> None:
        """A request has its first token. What was sent before the bound last fell says nothing about it."""
        if self._first is not None and sent_at >= self._lowered_at:
            self._tick.first.append((ttft_s, sent_at))
            self._round.append(ttft_s)

    def tokens(self, token_s: float, num_tokens: int) -> None:
        """So many tokens that followed others took so long together, each counted from the one before it."""
        self._tick.token_s += token_s
        self._tick.num_tokens += num_tokens

    def ended(self, tpot_s: float, sent_at: float) -> None:
        """A request has ended, with this time per output token: requests vary around what all of them take."""
        if self._token is None or sent_at < self._lowered_at or tpot_s < ROOM * self._headroom * self._token.aim_s:
            return
        is_missed = tpot_s > self._token.aim_s
        self._tick.num_late += is_missed
        if not is_missed:
            self._headroom = min(MAX_HEADROOM, self._headroom + HEADROOM_STEP * MISSES / 2)
        elif self._tick.num_late <= MAX_STEPS:
            self._headroom = max(MIN_HEADROOM, self._headroom - HEADROOM_STEP)

    def tick(self, load: Load, now: float) -> None:
        """A tick is over: let the bound follow what was observed in it."""
        done, self._tick = self._tick, _Tick()
        if not self.is_on or not load.num_shards:
            return
        if load.num_others > load.mean_open:  # how long steps take is not for the users' requests to change
            self._forget()
            return
        done.mean, done.peak = load.mean_open / load.num_shards, load.peak_open / load.num_shards
        self._ticks.append(done)
        self._num_ticks += 1
        self._drains_for = 0 if done.mean <= self._bound else max(0, self._drains_for - 1)
        self._bound = min(self._bound, float(load.slots))
        mean, by_token = self._by_tokens()
        lower = max(1.0, min(self._by_first_tokens(), by_token if by_token < mean else math.inf))
        if lower < self._bound:
            if lower <= FALLEN * self._bound:  # what was sent until now says nothing about the new bound
                self._lowered_at, self._drains_for = now, DRAIN_TICKS
                self._forget()
            self._bound = lower
        elif done.peak < min(self._bound - 1, 0.9 * self._bound):
            self._round.clear()
        elif not self._drains_for:
            self._raise(load, by_token)

    def _forget(self) -> None:
        self._ticks.clear()
        self._round.clear()

    def _by_first_tokens(self) -> float:
        """The bound that the times to first token ask for; infinite where they are content."""
        goal, ticks = self._first, self._ticks
        seen = [value for tick in ticks for value, _ in tick.first]
        if goal is None or not seen:
            return math.inf
        tail_s, peak = _quantile(seen, TAIL), max(tick.peak for tick in ticks)
        if peak > ALONE and len(seen) >= MIN_ROUND:
            goal.note(tail_s, is_alone=False)
        for value, _ in ticks[-1].first if peak <= ALONE else ():
            goal.note(value, is_alone=True)
        missed_at = [sent_at for tick in ticks for value, sent_at in tick.first if value > goal.aim_s]
        if len(missed_at) < max(2, MISSES * len(seen)) or max(missed_at) - min(missed_at) < PAUSE_S:
            return math.inf
        return min(self._bound, peak) * min(FALLEN, max(FALL, goal.aim_s / tail_s))

    def _by_tokens(self) -> tuple[float, float]:
        """What ran, and the bound that its time per output token allows; infinite where nothing can be told."""
        goal, ticks = self._token, list(self._ticks)[-TOKEN_TICKS:]
        num_tokens = sum(tick.num_tokens for tick in ticks)
        if goal is None or num_tokens < MIN_TOKENS:
            return 0.0, math.inf
        seen_s = sum(tick.token_s for tick in ticks) / num_tokens
        mean = sum(tick.mean for tick in ticks) / len(ticks)
        goal.note(seen_s, is_alone=max(tick.peak for tick in ticks) <= ALONE)
        ratio = self._headroom * goal.aim_s / seen_s
        return mean, mean * max(FALL, ratio) + (ratio > SPARE)

    def _raise(self, load: Load, by_token: float) -> None:
        """All that may be under way is: allow some more, if the targets are kept by far enough."""
        if len(self._ticks) < TOKEN_TICKS:
            return
        growth = GROWTH
        if self._first is not None and self._round:
            num_wanted = min(MAX_ROUND, max(MIN_ROUND, self._bound * load.num_shards))
            tail_s, room_s = _quantile(self._round, TAIL), ROOM * self._first.aim_s
            if len(self._round) < num_wanted * (1 if tail_s <= room_s else PROBE_ROUNDS) or tail_s > self._first.aim_s:
                return
            growth = 1 + (GROWTH - 1) * max(0.0, 1 - tail_s / room_s)
        step = max(self._bound * (growth - 1), 1 / load.num_shards)
        room = (by_token - self._bound) * min(1.0, self._num_ticks / (2 * TOKEN_TICKS))
        if room > 0 and self._bound < load.slots:
            self._bound = min(self._bound + min(step, room), float(load.slots))
            self._round.clear()
            self._num_ticks = 0


def _quantile(values: Collection[float], share: float) -> float:
    """Smallest value that at least this share of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
