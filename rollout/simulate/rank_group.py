"""Ranks that step together, and how long their steps take.

Owns the clock of one expert-parallel group: a step of the group lasts as long as its slowest rank's, for the exchange
of rows is a barrier in every layer. Between two events the batches are constant and every rank's step is affine in the
steps passed, so the group's step is the upper envelope of a few lines and any number of steps is summed at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from rollout.simulate.costs import StepCosts
from rollout.simulate.rank import Rank, Sequence
from rollout.simulate.speculation import Load, Speculation

ROUNDING = 1e-9  # of a step: what float arithmetic may be off in telling whether a step has ended
CONTEXTS_PER_OCTAVE = 4  # the choice of drafts is remembered for contexts within 19 %
ROUNDING_S = 1e-8  # the same in seconds, for clocks of up to 1e7 s


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkEnd:
    """A chunk came back from an engine with so many tokens."""

    job_id: str
    num_tokens: int
    submitted_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Something for an engine, that arrives at `at`: a sequence to start, or a job to cut."""

    at: float
    rank: int
    start: Sequence | None = None
    cut: str | None = None


class RankGroup:
    """See the module. Messages arrive in the order in which they are sent.

    Args:
        ranks: Engines by fleet rank.
        costs: Prices a step.
        speculation: What drafts bring; None: there are none.
        max_rows: Of a rank's step, drafts included.
    """

    def __init__(
        self, ranks: dict[int, Rank], costs: StepCosts, speculation: Speculation | None = None, max_rows: int = 2**30
    ) -> None:
        self.ranks = ranks
        self._list = list(ranks.values())
        self._costs, self._speculation, self._max_rows = costs, speculation, max_rows
        self._num_drafts = 0
        self._drafts: dict[tuple[int, int, int], int] = {}
        self._local: dict[tuple[int, int, float], float] = {}
        self._shared: dict[int, float] = {}
        self._inbox: deque[Message] = deque()
        self.clock = 0.0  # of the last boundary between steps that was reached
        self.is_live = True
        self._step = 0
        self._steps_planned = 0

    @property
    def step(self) -> int:
        """Steps done so far."""
        return self._step

    def send(self, message: Message) -> None:
        self._inbox.append(message)

    def plan(self) -> float | None:
        """When `run` is to be called next; None if the group has nothing to do."""
        if not self.is_live:
            return None
        self._speculate()
        waits = [n for rank in self._list if (n := rank.steps_to_event()) is not None]
        arrival = self._inbox[0].at if self._inbox else None
        if not waits:
            self._steps_planned = 0
            return None if arrival is None else max(arrival, self.clock)
        within = None if arrival is None else max(0.0, arrival - self.clock)
        self._steps_planned, duration = self._steps_within(min(waits), within)
        return self.clock + duration

    def run(self, now: float) -> list[ChunkEnd]:
        """Reach the boundary that `plan` told. Returns the chunks that came back."""
        ended = self._advance(now)
        while self._inbox and self._inbox[0].at <= now + ROUNDING_S:
            message = self._inbox.popleft()
            rank = self.ranks[message.rank]
            if message.start is not None:
                rank.submit(message.start)
            elif message.cut is not None:
                sequence = rank.abort(message.cut)
                if sequence is not None:
                    ended.append(_end(sequence, sequence.kept))
        for rank in self._list:
            rank.settle()
        return ended

    def stop(self, now: float) -> list[ChunkEnd]:
        """Abort everything at the first boundary at or after `now`, which becomes the clock."""
        waits = [n for rank in self._list if (n := rank.steps_to_event()) is not None]
        reached = now
        if waits and self.is_live and now > self.clock:
            self._steps_planned, duration = self._steps_within(min(waits), now - self.clock)
            reached = max(now, self.clock + duration)
        ended = self._advance(reached)
        for rank in self._list:
            for sequence in rank.sequences():
                rank.abort(sequence.job_id)
                ended.append(_end(sequence, sequence.kept))
        ended += [_end(m.start, 0) for m in self._inbox if m.start is not None]
        self._inbox.clear()
        return ended

    def die(self, now: float) -> int:
        """All engines are gone. Returns the tokens that the running chunks had."""
        lost = sum(s.num_tokens(r.progress) for r in self._list for s in r.sequences())
        for rank in self._list:
            rank.clear()
        self._inbox.clear()
        self.clock, self.is_live, self._steps_planned = now, False, 0
        return lost

    def revive(self, now: float) -> None:
        self.clock, self.is_live = now, True

    def _advance(self, now: float) -> list[ChunkEnd]:
        steps, self._steps_planned = self._steps_planned, 0
        self._step += steps
        self.clock = now
        return [_end(s, s.target) for rank in self._list for s in rank.advance(steps)]

    def _lines(self) -> list[tuple[float, float]]:
        """(seconds of the next step, growth with every further one) of each rank, the shared part included."""
        rows, lines = 0, []
        for rank in self._list:
            tokens, reads = rank.prefill_of_step() if rank.is_prefilling else (0, 0.0)
            key = (rank.decode_rows, tokens, reads)
            local = self._local.get(key)
            if local is None:
                local = self._costs.local_s(*key)
                if not tokens:
                    self._local[key] = local
            rows += rank.decode_rows + tokens
            per_token = self._costs.context_token_s
            lines.append((local + per_token * rank.context_tokens, per_token * rank.num_decoding * rank.accepted))
        shared = self._shared.get(rows)
        if shared is None:
            shared = self._shared[rows] = self._costs.shared_s(rows)
        if self._speculation is not None:
            shared += self._num_drafts * self._speculation.draft_s
        return [(value + shared, slope) for value, slope in lines]

    def _speculate(self) -> None:
        """Choose the drafts of the steps to come, as the governor would; alike where the load is about the same."""
        if self._speculation is None:
            return
        loads = [Load(num_decoding=r.num_decoding, context_tokens=r.context_tokens) for r in self._list]
        most = max(load.num_decoding for load in loads)
        context = max(load.context_tokens for load in loads)
        about = (most, sum(load.num_decoding for load in loads), round(CONTEXTS_PER_OCTAVE * math.log2(1 + context)))
        num_drafts = self._drafts.get(about)
        if num_drafts is None:
            num_drafts = self._drafts[about] = self._speculation.best(loads, self._costs, self._max_rows)
        if num_drafts != self._num_drafts:
            self._num_drafts = num_drafts
            for rank in self._list:
                rank.speculate(num_drafts, self._speculation.tokens[num_drafts])

    def _segments(self, num_steps: int) -> Iterator[tuple[int, float, float]]:
        """(steps, seconds of the first, growth) of stretches in which one rank is the slowest."""
        lines = self._lines()
        done = 0
        while done < num_steps:
            first, slope = max((v + done * g, g) for v, g in lines)
            count = num_steps - done
            for value, growth in lines:
                if growth > slope:
                    overtakes = math.floor((first - value - done * growth) / (growth - slope)) + 1
                    count = min(count, max(1, overtakes))
            yield count, first, slope
            done += count

    def _steps_within(self, num_steps: int, within_s: float | None) -> tuple[int, float]:
        """Steps, at most `num_steps`, and their seconds; no more than it takes to pass `within_s`."""
        steps, seconds = 0, 0.0
        for count, first, slope in self._segments(num_steps):
            duration = count * first + slope * count * (count - 1) / 2
            if within_s is not None and seconds + duration >= within_s:
                count = min(count, _steps_to_pass(within_s - seconds, first, slope))
                return steps + count, seconds + count * first + slope * count * (count - 1) / 2
            steps, seconds = steps + count, seconds + duration
        return steps, seconds


def _steps_to_pass(wanted_s: float, first: float, slope: float) -> int:
    """Least n with n · first + slope · n (n - 1) / 2 >= wanted_s; 0 if nothing is wanted."""
    if wanted_s <= 0:
        return 0
    if slope <= 0:
        return math.ceil(wanted_s / first - ROUNDING)
    linear = first - slope / 2
    # The stable form of the root, for a slope that may be tiny.
    root = 2 * wanted_s / (linear + math.sqrt(linear * linear + 2 * slope * wanted_s))
    return max(0, math.ceil(root - ROUNDING))


def _end(sequence: Sequence, num_tokens: int) -> ChunkEnd:
    return ChunkEnd(job_id=sequence.job_id, num_tokens=num_tokens, submitted_at=sequence.submitted_at)
