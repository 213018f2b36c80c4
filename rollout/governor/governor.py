"""The governor: how to speculate in the next step, so that tokens come fastest, and never slower than without.

    choice = governor.choose(state)          # before drafting
    alarms = governor.observe(outcome)       # after the step

It owns the present choice. Two accounts of seconds bound what it may lose: one against no speculation, over steps with
the choice that is taken to be the best, which shuts speculation off while it is overdrawn whatever the estimates say;
and one against that choice, over trials, which lose no more against none. So a dear trial delays the next one, not what
is known to pay. Batches of each size have accounts of their own: a second lost by a full batch is a hundred steps of
the few sequences at the end of a rollout, which are the ones that drafts are for.

One governor serves one rank. Ranks of an expert-parallel group may choose differently: sampled tokens do not depend on
drafts, every rank takes part in each forward whatever its rows, and rows are padded to the largest as those of uneven
batches are. But a rank that drafts makes its peers wait, so tell it of them (`peer_sequences`, `peer_rows`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from rollout.errors import InvalidRequest
from rollout.governor.accounts import Accounts, size_class
from rollout.governor.collapse import SourceWatch
from rollout.governor.config import GovernorConfig
from rollout.governor.exploration import Exploration, loss_s
from rollout.governor.plans import Plan, Planner, Sources
from rollout.governor.records import OFF, Alarm, Choice, StepOutcome, StepState
from rollout.governor.request_budgets import RequestBudgets
from rollout.governor.statistics import SpeculationRecord
from rollout.governor.tally import StepTally
from rollout.speculation_config import SpeculationConfig

logger = logging.getLogger(__name__)

WARM_STEPS = 4  # without drafts, before anything: the time that all else is compared with
KNOWN_ERROR = 0.2  # relative, of a step's time, up to which a plan may be chosen and not only tried
MAX_INTERVALS = 4  # times decide_every, between decisions that come out the same
CAUTION = 0.5  # standard errors by which plans are judged worse than estimated when one is chosen
DEAR_STEP = 1.25  # times the worst that was plausible, beyond which a step was held up by something else than drafts
RETRIED_TRIALS = 32.0  # that acceptance counts at most for, of sources that are tried again


class Governor:
    """Owns the choice of one rank.

    Args:
        limits: Most nodes, layers and nodes in a layer.
        config: What may be spent.
    """

    def __init__(self, limits: SpeculationConfig, config: GovernorConfig | None = None) -> None:
        self._limits, self._config = limits, config or GovernorConfig()
        config = self._config
        self.planner = Planner(limits, config)
        self.requests = RequestBudgets()
        self._exploration = Exploration(config)
        self._guards = Accounts(config.guard_share - config.explore_share, config.grant_steps, config.cap_steps)
        self._trials = Accounts(config.explore_share, config.grant_steps, config.cap_steps)
        self._watches: dict[str, SourceWatch] = {}
        self._record = SpeculationRecord(max_depth=limits.max_depth)
        self._step = 0
        self._version: int | None = None
        self._best: Plan | None = None
        self._choice = OFF
        self._decided_at: tuple[int, int, tuple[str, ...]] | None = None  # step, size class, sources
        self._interval = self._config.decide_every
        self._is_stale = True
        self._num_cold = WARM_STEPS

    def choose(self, state: StepState) -> Choice:
        """How to speculate in this step.

        Raises:
            InvalidRequest: A negative size.
        """
        if min(state.num_sequences, state.context_tokens, state.peer_sequences, state.peer_rows) < 0:
            raise InvalidRequest("state of a step", state, "no negative size")
        self._step += 1
        self._see_version(state.version)
        if not state.num_sequences or not state.sources or self._num_cold:
            return OFF
        self._decide_if_due(state)
        if self._guards.of(state.num_sequences + state.peer_sequences).is_overdrawn:
            self._record.num_guarded_steps += 1
            return OFF
        return self._trial(state) or self._choice

    def observe(self, outcome: StepOutcome) -> tuple[Alarm, ...]:
        """A step ran.

        Returns:
            Sources whose acceptance has fallen since the last sync; they are off from now on.

        Raises:
            InvalidRequest: No time passed, or fewer rows than sequences.
        """
        if not (outcome.step_s > 0 and math.isfinite(outcome.step_s)):
            raise InvalidRequest("seconds of a step", outcome.step_s, "a finite number > 0")
        budget = outcome.choice.budget_nodes
        if not outcome.choice.is_off and budget not in self.planner.budgets:
            raise InvalidRequest("budget of a step's choice", budget, f"one of {self.planner.budgets}, as chosen")
        if outcome.tally is not None and outcome.tally.max_depth != self._limits.max_depth:
            raise InvalidRequest("depth of a step's tally", outcome.tally.max_depth, f"{self._limits.max_depth}")
        if not 1 <= outcome.num_sequences <= outcome.rows:
            expected = "at least one sequence, and a row for each"
            raise InvalidRequest("size of a step", f"{outcome.num_sequences} in {outcome.rows} rows", expected)
        is_charged = outcome.choice.is_trial or not outcome.choice.is_off
        worst_s = self.planner.worst_s(outcome) if is_charged else math.inf
        seconds = min(self.planner.learn(outcome), DEAR_STEP * worst_s)
        if not outcome.has_prefill and outcome.rows == outcome.num_sequences:
            self._num_cold = max(0, self._num_cold - 1)
        self._settle(outcome, seconds)
        if outcome.tally is None or outcome.version != self._version:
            return ()
        alarms = [self._watch(outcome, source) for source in outcome.tally.by_source]
        return tuple(alarm for alarm in alarms if alarm is not None)

    def budgets(self, choice: Choice, request_ids: Sequence[str]) -> list[int]:
        """Nodes for each request, 0 to choice.budget_nodes."""
        return self.requests.budgets(choice, request_ids)

    def new_tally(self) -> StepTally:
        """An empty tally for the drafts of a step."""
        return StepTally(self._limits.max_depth)

    def chances(self, source: str) -> list[list[float]]:
        """[depth][rank]: measured chance of a node of the source, given that its parent is accepted."""
        return self.planner.part(source).chances()

    def take_record(self) -> SpeculationRecord:
        """What happened since it was last taken."""
        record, self._record = self._record, SpeculationRecord(max_depth=self._limits.max_depth)
        return record

    def suspended(self) -> tuple[str, ...]:
        """Sources that an alarm has turned off."""
        return tuple(sorted(source for source, watch in self._watches.items() if watch.is_suspended))

    def _see_version(self, version: int) -> None:
        if self._version is not None and version > self._version:
            for watch in self._watches.values():
                watch.begin_version()
            self.planner.weaken(self._config.carried_trials)
            self._exploration.rearm(self._step)
            self._is_stale = True
        if self._version is None or version > self._version:
            self._version = version

    def _decide_if_due(self, state: StepState) -> None:
        size = size_class(state.num_sequences + state.peer_sequences)
        last = self._decided_at
        if last is not None and not self._is_stale and last[1:] == (size, state.sources):
            if self._step - last[0] < self._interval:
                return
        if last is None or size != last[1]:
            self._exploration.resized(size, self._step)
        is_same = last is not None and not self._is_stale and last[1:] == (size, state.sources)
        self._decided_at, self._is_stale = (self._step, size, state.sources), False
        before = self._best
        self._decide(state)
        is_settled = is_same and before is not None and self._best is not None and _key(before) == _key(self._best)
        most = MAX_INTERVALS * self._config.decide_every
        # What stays as it is need not be looked at as often.
        if is_settled and self._exploration.trial is None:
            self._interval = min(2 * self._interval, most)
        else:
            self._interval = self._config.decide_every

    def _decide(self, state: StepState) -> None:
        suspended = self.suspended()
        healthy = _sets([s for s in state.sources if s not in suspended])
        plans = self.planner.plans(state, healthy + [(s,) for s in suspended if s in state.sources])
        off = plans[0]
        best = off
        allowed = set(healthy)
        present = self._best
        for plan in plans[1:]:
            is_present = present is not None and _key(plan) == _key(present)
            # A plan is judged at its cautious value, but what runs already is known by what it does.
            value = plan.gain if is_present else plan.gain * math.exp(-CAUTION * plan.error)
            is_known = is_present or plan.time_error <= KNOWN_ERROR
            if is_known and plan.sources in allowed and plan.gain > 1 and value > max(1.0, _value(best)):
                best = plan
        best = self._keep(best, plans, allowed)
        self._best = best
        self._choice = self._choice_of(best, max_requests=None, is_trial=False)
        suspected = [s for s in state.sources if s in self._watches and self._watches[s].is_suspected]
        self._exploration.plan(plans, best, allowed, self._step, suspected)

    def _keep(self, best: Plan, plans: Sequence[Plan], allowed: set[Sources]) -> Plan:
        """The present plan, unless the best one is better by the margin, or it does not pay any more."""
        if self._best is None:
            return best
        for plan in plans:
            if _key(plan) == _key(self._best):
                pays = plan.is_off or (plan.sources in allowed and plan.gain > 1)
                is_near = _value(best) <= plan.gain * (1 + self._config.switch_margin)
                return plan if pays and is_near else best
        return best

    def _trial(self, state: StepState) -> Choice | None:
        trial, best = self._exploration.trial, self._best
        if trial is None or best is None:
            return None
        plan, times = trial.plan, self.planner.times
        account = self._trials.of(state.num_sequences + state.peer_sequences)
        if plan.is_off:
            if not account.can_afford(loss_s(plan, best.gain, times, state, 0)):
                return None
            self._exploration.fired(1, self._step, is_full=True)
            return replace(OFF, is_trial=True)

        def afford(requests: int) -> bool:
            return account.can_afford(loss_s(plan, best.gain, times, state, requests))

        known = self.planner.acceptance(plan.sources).num_trials
        if trial.is_retry:  # what it was long ago must not outweigh what it is now
            self.planner.acceptance(plan.sources).weaken(RETRIED_TRIALS)
        requests = self._exploration.num_requests(state.num_sequences, known, best, afford)
        if not requests:
            return None
        self._exploration.fired(requests, self._step, is_full=requests >= state.num_sequences)
        return self._choice_of(plan, max_requests=requests if requests < state.num_sequences else None, is_trial=True)

    def _choice_of(self, plan: Plan, max_requests: int | None, is_trial: bool) -> Choice:
        if plan.is_off:
            return OFF
        budget = self.planner.budgets[plan.budget_index]
        return Choice(
            shares=self.planner.shares(plan),
            budget_nodes=budget,
            max_depth=plan.depth,
            max_width=plan.width,
            max_requests=max_requests,
            is_trial=is_trial,
            expected_tokens=1 + plan.accepted,
            expected_gain=plan.gain,
        )

    def _settle(self, outcome: StepOutcome, seconds: float) -> None:
        """Keep the accounts."""
        if outcome.has_prefill or not self.planner.times.num_steps:
            self._record.add_outcome(outcome, 0.0)
            return
        everybody = outcome.num_sequences + outcome.peer_sequences
        off_s = self.planner.base_s(everybody, outcome.context_tokens)
        passed_s = (1 + outcome.num_rested) * outcome.step_s
        guard, trials = self._guards.of(everybody), self._trials.of(everybody)
        guard.pass_time(passed_s, off_s)
        trials.pass_time(passed_s, off_s)
        # A choice without drafts yields what it yields, so that only drafts are charged for.
        worth_s = off_s * (outcome.num_tokens + outcome.peer_sequences) / everybody
        is_drafting = not outcome.choice.is_off
        if outcome.choice.is_trial and self._best is not None:
            trials.charge(seconds - worth_s / self._best.gain, off_s)
        elif is_drafting:
            guard.charge(seconds - worth_s, off_s)
            # Where drafts save much, something better would save more: it is looked for in earnest.
            trials.charge(-self._config.explore_gains * (worth_s - seconds), off_s)
        self._record.add_outcome(outcome, seconds - worth_s if is_drafting else 0.0)

    def _watch(self, outcome: StepOutcome, source: str) -> Alarm | None:
        assert outcome.tally is not None
        watch = self._watches.get(source)
        if watch is None:
            watch = self._watches[source] = SourceWatch(source, self._config)
        was_suspended = watch.is_suspended
        alarm = watch.learn(outcome.tally.by_source[source], outcome.version)
        if alarm is not None:
            logger.warning(
                "acceptance of %s fell from %.2f to %.2f with version %d (%d drafts); it is off",
                source,
                alarm.before,
                alarm.after,
                alarm.version,
                alarm.num_trials,
            )
            self._record.num_alarms[source] = self._record.num_alarms.get(source, 0) + 1
        if watch.is_suspended != was_suspended:
            self._is_stale = True
            self._exploration.trial = None
        return alarm


def _sets(sources: Sequence[str]) -> list[Sources]:
    """Each source alone, and all together."""
    alone: list[Sources] = [(source,) for source in sorted(set(sources))]
    return [*alone, tuple(s for (s,) in alone)] if len(alone) > 1 else alone


def _key(plan: Plan) -> tuple[Sources, int]:
    return plan.sources, plan.budget_index


def _value(plan: Plan) -> float:
    return plan.gain if plan.is_off else plan.gain * math.exp(-CAUTION * plan.error)
