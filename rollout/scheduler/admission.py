"""Who is let in of those who wait for their answer: users' completions, never rollouts.

A completion is refused, before anything of it is queued, if it would wait for an engine longer than its request allows,
or if more would be under way than keep the targets (`concurrency_limit`). All choices of a user's request are let in
together or not at all. Owns the count of completions under way and the refusals. Time is passed in. Knows nothing of
engines, HTTP or calls.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rollout.config import AdmissionConfig
from rollout.errors import QueueFull
from rollout.rate import RateWindow
from rollout.scheduler.concurrency_limit import ConcurrencyLimit, Load
from rollout.types import RolloutRequest, Ticket

MAX_RETRY_AFTER_S = 60.0
RATE_WINDOW_S = 10.0
TICKET_S = 30.0  # the choices of a request come one after another; what has not come by then does not come


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What a completion finds.

    Attributes:
        num_shards, slots: That serve, and sequences that each may run.
        num_ahead: Trajectories that must end before it has a slot.
    """

    num_shards: int
    slots: int
    num_ahead: int


@dataclass(slots=True)
class _Verdict:
    """On the choices of one request that are still to come. Owned by the admission."""

    num_to_come: int
    at: float
    refusal: QueueFull | None


class Admission:
    """See the module.

    Args:
        config: The targets.
        now: Seconds.

    Attributes:
        num_open: Completions under way.
        num_refused: Requests refused, by reason: wait (for an engine) or targets.
    """

    def __init__(self, config: AdmissionConfig, now: float) -> None:
        self._limit = ConcurrencyLimit(config)
        self._endings = RateWindow(RATE_WINDOW_S)
        self._verdicts: dict[str, _Verdict] = {}
        self.num_open = 0
        self.num_refused: Counter[str] = Counter()
        self._peak_open, self._open_s = 0, 0.0  # since the last tick
        self._ticked_at = self._changed_at = now

    @property
    def limit(self) -> ConcurrencyLimit:
        """To be told of first tokens, tokens and ends."""
        return self._limit

    def enter(self, request: RolloutRequest, fleet: Fleet, now: float) -> None:
        """Count a completion, which must `leave`, or refuse it.

        Raises:
            QueueFull: It is refused; nothing was counted.
        """
        ticket = request.ticket
        verdict = None if ticket is None else self._verdicts.get(ticket.ticket_id)
        if verdict is None:
            refusal = self._judge(request, fleet)
            if ticket is not None and ticket.num_choices > 1:
                self._verdicts[ticket.ticket_id] = _Verdict(ticket.num_choices - 1, now, refusal)
        else:
            refusal = verdict.refusal
            self._count_down(ticket, verdict)
        if refusal is not None:
            raise refusal
        self._count(1, now)

    def leave(self, now: float) -> None:
        """A completion that was let in has ended, however."""
        self._count(-1, now)

    def tick(self, fleet: Fleet, num_running: int, num_ended: int, now: float) -> None:
        """Learn from what was observed since the last tick; about once a second.

        Args:
            fleet: Its shards and slots.
            num_running: Trajectories of all kinds that run.
            num_ended: Trajectories of all kinds that have ended since the start.
            now: Seconds.
        """
        self._endings.sample(now, num_ended)
        for ticket_id in [name for name, one in self._verdicts.items() if now - one.at > TICKET_S]:
            del self._verdicts[ticket_id]
        self._count(0, now)
        elapsed = now - self._ticked_at
        load = Load(
            num_shards=fleet.num_shards,
            slots=fleet.slots,
            mean_open=self._open_s / elapsed if elapsed > 0 else float(self.num_open),
            peak_open=self._peak_open,
            num_others=max(0, num_running - self.num_open),
        )
        self._peak_open, self._open_s, self._ticked_at = self.num_open, 0.0, now
        self._limit.tick(load, now)

    def bound(self, num_shards: int, slots: int) -> int:
        """Completions that may be under way on these shards; the slots where nothing else bounds them."""
        total = self._limit.total(num_shards, slots)
        return num_shards * slots if total is None else total

    def _judge(self, request: RolloutRequest, fleet: Fleet) -> QueueFull | None:
        if request.max_wait_s is None:
            return None
        refusal, reason = self._judge_wait(request.max_wait_s, fleet.num_ahead), "wait"
        if refusal is None:
            refusal, reason = self._judge_targets(request.ticket, fleet), "targets"
        if refusal is not None:
            self.num_refused[reason] += 1
        return refusal

    def _judge_wait(self, max_wait_s: float, num_ahead: int) -> QueueFull | None:
        if num_ahead == 0:
            return None
        per_second = self._endings.per_second
        wait_s = num_ahead / per_second if per_second > 0 else None
        if wait_s is not None and wait_s <= max_wait_s:
            return None
        told = "a wait of unknown length" if wait_s is None else f"an expected wait of {wait_s:.2f} s"
        return QueueFull(
            f"request: got {told} until {num_ahead} others have ended, expected at most {max_wait_s:g} s",
            retry_after_s=None if wait_s is None else min(wait_s, MAX_RETRY_AFTER_S),
        )

    def _judge_targets(self, ticket: Ticket | None, fleet: Fleet) -> QueueFull | None:
        bound, num_choices = self._limit.total(fleet.num_shards, fleet.slots), ticket.num_choices if ticket else 1
        to_come = sum(one.num_to_come for one in self._verdicts.values() if one.refusal is None)
        num_open = self.num_open + to_come
        # A request of more choices than the bound is let in when it is alone, as otherwise it never would be.
        if bound is None or num_open == 0 or num_open + num_choices <= bound:
            return None
        per_second, num_over = self._endings.per_second, min(num_open, num_open + num_choices - bound)
        return QueueFull(
            f"request: got {num_choices} choices with {num_open} under way, expected at most {bound} in all, "
            "which keep the targets (scheduler.admission)",
            retry_after_s=min(num_over / per_second, MAX_RETRY_AFTER_S) if per_second > 0 else None,
        )

    def _count_down(self, ticket: Ticket | None, verdict: _Verdict) -> None:
        assert ticket is not None, "a verdict is found by a ticket"
        verdict.num_to_come -= 1
        if verdict.num_to_come == 0:
            del self._verdicts[ticket.ticket_id]

    def _count(self, change: int, now: float) -> None:
        self._open_s += self.num_open * max(0.0, now - self._changed_at)
        self._changed_at = now
        self.num_open += change
        self._peak_open = max(self._peak_open, self.num_open)
