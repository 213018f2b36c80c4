"""When to try what is not known to pay, and with how many requests.

Four reasons to try. A plan might pay, going by how little is known of it (its estimate plus a standard error): that is
what happens at the start, and again where the batch has a size not seen before, and ends by itself as the errors
shrink. And a set of sources that did not pay might have become better: it is tried again after an interval that doubles
as long as it does not, and starts afresh when the weights change or at a smaller size that is new. And a source that
seems to have fallen at a sync is drafted with, as cheaply as can be, until that is certain or refuted: it stops paying
before the alarm is certain of it, and would otherwise be turned off in silence. And the time of steps without drafts
must be looked at now and then: what was measured on a slower machine, an hour ago, would make any draft look good.

Trials that might be dear are made with a few of the requests; what they may cost in all is bounded by an account.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rollout.governor.config import GovernorConfig
from rollout.governor.plans import Plan, Sources
from rollout.governor.records import StepState
from rollout.governor.time_model import TimeModel

HOPE = 1.0  # standard errors by which a plan is judged better than estimated
MIN_HOPE_GAIN = 0.03  # what a trial must promise beyond the best known gain
SHOTS = 4  # steps of one trial
KNOWN_TRIALS = 32  # requests drafted for, from which step times are what is worth learning
RETRY_REQUESTS = 16  # requests that one retry drafts for, spread over steps
RETRY_STEPS = 4  # but in no more steps than that
SOUNDING_REQUESTS = 8  # in one step of a trial that is about acceptance
SHRUNK_STEPS = 16  # until what did not pay is tried again once batches have shrunk
COOLING_STEPS = 256  # until the same plan, at the same size, is tried again
OFF_STEPS = 256  # between two looks at steps without drafts, which all else is compared with, while drafts are chosen
OFF_SHOTS = 3  # steps of one such look, of which the first follows drafts and tells nothing


@dataclass(slots=True)
class Trial:
    """A plan to be tried for some more steps."""

    plan: Plan
    shots: int
    is_retry: bool


@dataclass(slots=True)
class Retry:
    """When a set of sources is tried again."""

    interval: int
    at_step: int


class Exploration:
    """Owns the trial under way and the intervals."""

    def __init__(self, config: GovernorConfig) -> None:
        self._config = config
        self._retries: dict[tuple[int, Sources], Retry] = {}  # by size
        self._tried: dict[tuple[int, Sources, int], int] = {}  # at which step a plan was last to be tried, by size
        self._size = 0
        self._off_at = 0  # step of the next look at steps without drafts
        self.trial: Trial | None = None

    def rearm(self, step: int) -> None:
        """The weights changed: all that was given up is tried again at once."""
        self._tried.clear()
        self._retries = {key: Retry(self._config.retry_steps, step) for key in self._retries if key[0] == self._size}

    def resized(self, size: int, step: int) -> None:
        """Steps have this size from now on. Each size is tried for itself, however often batches change between them.

        Of fewer requests drafts pay sooner, if they are any good: at a smaller size that is new they are tried soon. At
        a larger one that is new they wait as they did.
        """
        for (at, sources), retry in list(self._retries.items()):
            if at == self._size and (size, sources) not in self._retries:
                same = Retry(retry.interval, retry.at_step)
                soon = Retry(self._config.retry_steps, min(retry.at_step, step + SHRUNK_STEPS))
                self._retries[size, sources] = soon if size < at else same
        self._size = size

    def plan(
        self, plans: Sequence[Plan], best: Plan, allowed: set[Sources], step: int, suspected: Sequence[str] = ()
    ) -> None:
        """Decide what to try next.

        Args:
            plans: All.
            best: What is chosen now.
            allowed: Sets that may be tried because they might pay (and not only as a retry).
            step: Number of the present one.
            suspected: Sources that seem to have fallen at the latest sync.
        """
        self.trial = None
        for source in suspected:
            if source not in best.sources:
                # The alarm looks at first layers only, so the smallest trees do.
                self.trial = Trial(_smallest(plans, (source,)), RETRY_REQUESTS, is_retry=True)
                return
        wanted = best.gain * (1 + MIN_HOPE_GAIN)
        off_s = plans[0].step_s
        hopes = [
            (_hope(plan, off_s), index)
            for index, plan in enumerate(plans)
            if plan is not best
            and plan.is_near
            and (plan.is_off or plan.sources in allowed)
            and step >= self._tried.get(self._key(plan), -COOLING_STEPS) + COOLING_STEPS
        ]
        if best.is_off:
            self._off_at = step + OFF_STEPS
        elif step >= self._off_at:
            self._off_at = step + OFF_STEPS
            self.trial = Trial(plans[0], OFF_SHOTS, is_retry=False)
            return
        hope, index = max(hopes, default=(0.0, 0))
        if hope > wanted:
            self.trial = Trial(plans[index], SHOTS, is_retry=False)
            return
        for sources, plan in _best_of_each(plans).items():
            # Sets that are new are due at once: hope alone would leave one aside that another outshines.
            retry = self._retries.setdefault((self._size, sources), Retry(self._config.retry_steps, step))
            if sources == best.sources:
                retry.interval, retry.at_step = self._config.retry_steps, step + self._config.retry_steps
            elif step >= retry.at_step:
                retry.at_step = step + retry.interval
                retry.interval = min(2 * retry.interval, self._config.max_retry_steps)
                # Where nothing pays, whether first nodes are accepted after all; larger trees are tried if that raises
                # hopes of them.
                self.trial = Trial(_smallest(plans, sources) if best.is_off else plan, RETRY_REQUESTS, is_retry=True)
                return

    def num_requests(self, sequences: int, trials_known: float, best: Plan, afford: Callable[[int], bool]) -> int:
        """Requests that the trial may draft for in this step; 0 = it has to wait.

        Args:
            sequences: In the step.
            trials_known: Requests that the plan's sources were verified on.
            best: What is chosen now.
            afford: Whether drafting for so many requests can be paid for.
        """
        trial = self.trial
        assert trial is not None
        if not best.is_off:  # those without a draft would lose what the present choice brings them
            return sequences if afford(sequences) else 0
        is_sounding = trial.is_retry or trials_known < KNOWN_TRIALS
        if not is_sounding:
            return sequences if afford(sequences) else 0
        requests = min(sequences, SOUNDING_REQUESTS)
        while requests and not afford(requests):
            requests //= 2
        return requests

    def fired(self, requests: int, step: int, is_full: bool) -> None:
        """A step of the trial was chosen, with so many requests, or all of them."""
        trial = self.trial
        assert trial is not None
        trial.shots -= max(requests, RETRY_REQUESTS // RETRY_STEPS) if trial.is_retry else 1
        if trial.shots <= 0:
            self.trial = None
            if is_full:
                self._tried[self._key(trial.plan)] = step

    def _key(self, plan: Plan) -> tuple[int, Sources, int]:
        return self._size, plan.sources, plan.budget_index


def loss_s(plan: Plan, best_gain: float, times: TimeModel, state: StepState, requests: int) -> float:
    """Seconds that a step of a trial may lose against a choice of that gain, at the worst that is plausible.

    Args:
        requests: That are drafted for.
    """
    everybody = state.num_sequences + state.peer_sequences
    off_s, _ = times.predict(everybody, everybody, state.context_tokens)
    if plan.is_off:
        return off_s * (1 - 1 / best_gain)
    rows = state.num_sequences + max(state.peer_rows, state.peer_sequences) + requests * plan.nodes
    slow_s = times.worst(everybody, rows, state.context_tokens) + plan.draft_s
    tokens = everybody + requests * max(0.0, plan.accepted - 2 * plan.accepted_error)
    return max(0.0, slow_s - tokens * off_s / (everybody * best_gain))


def _hope(plan: Plan, off_s: float) -> float:
    """The gain that the plan might have."""
    if plan.is_off:
        return math.exp(HOPE * plan.time_error)
    faster_s = max(plan.step_s * math.exp(-HOPE * plan.time_error), off_s + plan.draft_s)
    more = 1 + HOPE * plan.accepted_error / (1 + plan.accepted)
    return plan.gain * plan.step_s / faster_s * more


def _best_of_each(plans: Sequence[Plan]) -> dict[Sources, Plan]:
    result: dict[Sources, Plan] = {}
    for plan in plans:
        if plan.sources and (plan.sources not in result or plan.gain > result[plan.sources].gain):
            result[plan.sources] = plan
    return result


def _smallest(plans: Sequence[Plan], sources: Sources) -> Plan:
    return min((plan for plan in plans if plan.sources == sources), key=lambda plan: plan.budget_index)
