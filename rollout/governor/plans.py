"""Everything that could be chosen for a step, priced: expected tokens per second against no speculation.

Owns what is known of step times, drafting times and acceptance. Decides nothing: `governor.py` does.

    gain = (tokens of the step, peers' included) / (its seconds) ÷ the same without speculation

Ranks of an expert-parallel group run their forwards together, so a rank that drafts makes its peers wait: their
tokens are in the numerator, and their rows among those that are priced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rollout.governor.acceptance import PRIOR_TRIALS, Acceptance
from rollout.governor.config import GovernorConfig
from rollout.governor.expected_tree import best_nodes
from rollout.governor.records import SourceShare, StepOutcome, StepState
from rollout.governor.time_model import TimeModel
from rollout.speculation_config import SpeculationConfig

BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # nodes of a request that are considered, up to the limit
FREE_SHARE = 0.02  # of a step without drafts: if all layers beyond the first take no longer, depth costs nothing
NEAR = 2.5  # times the rows seen, up to which a larger step may be tried
FEW = 6  # requests, up to which it is reckoned with who is offered a tree
DEAR = 2.0  # times the cheapest source's drafting time, from which a source of a set is not asked where others do
SURE_OFFER = 0.95  # chance of an offer from which everybody is taken to get one
MAX_SETS = 32  # sets of sources that are remembered
Sources = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One way to speculate in a step, or, without sources, none.

    Attributes:
        budget_index: In Planner.budgets; meaningless without sources.
        nodes: That a request is expected to get.
        accepted: Tokens that these are expected to bring a request.
        accepted_error: Its standard error.
        step_s: Expected, drafting included.
        draft_s: Drafting's part of it.
        time_error: Relative standard error of that.
        gain: Expected tokens per second, of those without speculation.
        is_near: So many rows, or nearly, were seen before with about as many sequences.
    """

    sources: Sources
    budget_index: int
    depth: int
    width: int
    nodes: float
    accepted: float
    accepted_error: float
    step_s: float
    draft_s: float
    time_error: float
    gain: float
    is_near: bool

    @property
    def is_off(self) -> bool:
        return not self.sources

    @property
    def error(self) -> float:
        """Relative standard error of the gain."""
        return math.hypot(self.time_error, self.accepted_error / (1 + self.accepted))


class Planner:
    """Owns the estimates; told outcomes, prices plans."""

    def __init__(self, limits: SpeculationConfig, config: GovernorConfig) -> None:
        self._limits, self._config = limits, config
        largest = limits.budget_nodes
        self.budgets = tuple(sorted({b for b in BUDGETS if b < largest} | {largest}))
        self.times = TimeModel()
        self._draft_times: dict[str, TimeModel] = {}
        self._sets: dict[Sources, Acceptance] = {}  # drafting together, whoever drafted a node
        self._parts: dict[str, Acceptance] = {}  # each source's own nodes, whoever else drafted
        self._asked: dict[tuple[Sources, str], tuple[float, float]] = {}  # requests: that it was asked for; all

    def acceptance(self, sources: Sources) -> Acceptance:
        """Of a set of sources."""
        known = self._sets.get(sources)
        if known is None:
            if len(self._sets) >= MAX_SETS:
                del self._sets[next(iter(self._sets))]
            known = self._sets[sources] = self._unknown()
        return known

    def part(self, source: str) -> Acceptance:
        """Of a source's own nodes, alone or among others."""
        known = self._parts.get(source)
        if known is None:
            known = self._parts[source] = self._unknown()
        return known

    def _unknown(self) -> Acceptance:
        limits = self._limits
        return Acceptance(self.budgets, limits.max_depth, limits.max_width, self._config.memory_trials)

    def weaken(self, max_trials: float) -> None:
        """The weights changed: acceptance is not to be relied on as before."""
        for known in (*self._sets.values(), *self._parts.values()):
            known.weaken(max_trials)

    def base_s(self, sequences: int, context_tokens: int) -> float:
        """Expected seconds of a step without drafts."""
        return self.times.predict(sequences, sequences, context_tokens)[0]

    def worst_s(self, outcome: StepOutcome) -> float:
        """Seconds that such a step plausibly takes at most, going by those before; infinite at the very first."""
        if not self.times.num_steps:
            return math.inf
        sequences, rows = outcome.num_sequences + outcome.peer_sequences, outcome.rows + outcome.peer_rows
        draft_s = sum(spent_s for _, spent_s in outcome.draft_s)
        return self.times.worst(sequences, rows, outcome.context_tokens) + draft_s + outcome.prepare_s

    def learn(self, outcome: StepOutcome) -> float:
        """A step ran.

        Returns:
            Its seconds without what makes it an outlier.
        """
        seconds = outcome.step_s
        choice = outcome.choice
        if not outcome.has_prefill:
            draft_s = 0.0
            for source, spent_s in outcome.draft_s:
                draft_s += spent_s
                if spent_s > 0 and choice.max_depth:
                    model = self._draft_times.setdefault(source, TimeModel())
                    model.learn(choice.max_depth, choice.max_depth * _drafted_for(outcome, source), 0, spent_s)
            # What a source takes once to catch up with a request is paid for, but says nothing about later steps.
            verify_s = max(outcome.step_s - draft_s - outcome.prepare_s, 1e-6)
            sequences = outcome.num_sequences + outcome.peer_sequences
            rows = outcome.rows + outcome.peer_rows
            if rows > sequences or not outcome.follows_drafts:
                verify_s = self.times.learn(sequences, rows, outcome.context_tokens, verify_s)
            seconds = verify_s + draft_s + outcome.prepare_s
        if outcome.tally is not None and not choice.is_off:
            index = self.budgets.index(choice.budget_nodes)
            self.acceptance(choice.sources).learn(outcome.tally.together, index, choice.max_depth)
            for source, tally in outcome.tally.by_source.items():
                self.part(source).learn(tally, index, choice.max_depth)
            for source in choice.sources if len(choice.sources) > 1 else ():
                asked = outcome.tally.by_source[source].asked if source in outcome.tally.by_source else 0
                self._count_asked(choice.sources, source, asked, outcome.tally.together.asked)
        return seconds

    def _count_asked(self, sources: Sources, source: str, asked: int, of: int) -> None:
        mine, everybody = self._asked.get((sources, source), (0.0, 0.0))
        kept = math.exp(-of / self._config.memory_trials)
        if len(self._asked) >= MAX_SETS and (sources, source) not in self._asked:
            del self._asked[next(iter(self._asked))]
        self._asked[sources, source] = mine * kept + asked, everybody * kept + of

    def shares(self, plan: Plan) -> tuple[SourceShare, ...]:
        """Whose nodes a tree of the plan would be made of, if all were offered."""
        budget = self.budgets[plan.budget_index]
        if len(plan.sources) == 1:
            return (SourceShare(source=plan.sources[0], num_nodes=budget),)
        offers = [
            (node[0] * part.estimate().offer, source)
            for source in plan.sources
            for part in (self.part(source),)
            for node in best_nodes(part.chances(), self._limits.max_width)[:budget]
        ]
        best = sorted(offers, key=lambda offer: -offer[0])[:budget]
        counts = {source: sum(source == name for _, name in best) for source in plan.sources}
        return tuple(
            SourceShare(source=source, num_nodes=max(1, count), enough_tokens=self._enough_tokens(plan, source))
            for source, count in counts.items()
        )

    def _enough_tokens(self, plan: Plan, source: str) -> float:
        """What the cheap sources of a plan must expect to bring so that a dear one is not asked: what it brings."""
        seconds = [self._draft_times[s].predict(plan.depth, plan.depth, 0)[0] for s in plan.sources if self._knows(s)]
        if not self._knows(source) or len(seconds) < 2:
            return math.inf
        if self._draft_times[source].predict(plan.depth, plan.depth, 0)[0] < DEAR * min(seconds):
            return math.inf
        return self.part(source).estimate().accepted[plan.depth - 1][plan.budget_index]

    def _knows(self, source: str) -> bool:
        return source in self._draft_times

    def plans(self, state: StepState, sets: Sequence[Sources]) -> list[Plan]:
        """No speculation, then every way to speculate with these sets of sources."""
        sequences = state.num_sequences + state.peer_sequences
        base_s, base_error = self.times.predict(sequences, sequences, state.context_tokens)
        off = Plan(
            sources=(),
            budget_index=0,
            depth=0,
            width=0,
            nodes=0.0,
            accepted=0.0,
            accepted_error=0.0,
            step_s=base_s,
            draft_s=0.0,
            time_error=base_error,
            gain=1.0,
            is_near=True,
        )
        result = [off]
        for drafters in sets:
            result += self._plans_of(drafters, state, off)
        return result

    def _plans_of(self, drafters: Sources, state: StepState, off: Plan) -> list[Plan]:
        """For each budget the best depth."""
        limits, mine, peers = self._limits, state.num_sequences, state.peer_sequences
        everybody, other_rows = mine + peers, max(state.peer_rows, peers)
        estimate = self.acceptance(drafters).estimate()
        draft_s = self._draft_s_by_depth(drafters, mine)
        # Where layers cost next to nothing, depth is left to the drafter, which knows more than averages.
        is_free = draft_s[-1] - draft_s[0] <= FREE_SHARE * off.step_s
        priced: dict[float, tuple[float, float]] = {}
        result = []
        for index in range(len(self.budgets)):
            best = (0.0, 0, 0.0, 0.0)
            deepest = min(limits.max_depth, self.budgets[index])
            for layer in range(deepest - 1 if is_free else 0, deepest):
                nodes = round(estimate.nodes[layer][index], 2)
                if nodes not in priced:
                    priced[nodes] = self._verify_s(state, nodes, estimate.offer)
                verify_s, time_error = priced[nodes]
                step_s = max(verify_s, off.step_s) + draft_s[layer]  # more rows never take less time
                gain = (mine * (1 + estimate.accepted[layer][index]) + peers) * off.step_s / (step_s * everybody)
                if gain > best[0]:
                    best = (gain, layer, step_s, time_error)
            gain, layer, step_s, time_error = best
            nodes, accepted = estimate.nodes[layer][index], estimate.accepted[layer][index]
            rows = mine * (1 + nodes) + other_rows
            result.append(
                Plan(
                    sources=drafters,
                    budget_index=index,
                    depth=layer + 1,
                    # One more than is best on average: a drafter that knows better can, and later ranks stay known.
                    width=min(limits.max_width, estimate.width[layer][index] + 1),
                    nodes=nodes,
                    accepted=accepted,
                    accepted_error=accepted * estimate.relative_error[index],
                    step_s=step_s,
                    draft_s=draft_s[layer],
                    time_error=time_error,
                    gain=gain,
                    is_near=rows <= NEAR * self.times.reach(everybody, rows),
                )
            )
        return result

    def _verify_s(self, state: StepState, nodes: float, offer: float) -> tuple[float, float]:
        """Seconds of a step in which requests have so many nodes on average, and their relative standard error.

        Of few requests all, some or none may be offered a tree, and time is no line in the rows: the mean is taken
        over how many are.
        """
        mine, peers = state.num_sequences, state.peer_sequences
        rows, context = mine + max(state.peer_rows, peers), state.context_tokens
        if mine > FEW or offer > SURE_OFFER:
            return self.times.predict(mine + peers, rows + mine * nodes, context)
        mean_s = error_s = 0.0
        for k in range(mine + 1):
            chance = math.comb(mine, k) * offer**k * (1 - offer) ** (mine - k)
            seconds, error = self.times.predict(mine + peers, rows + k * nodes / offer, context)
            mean_s += chance * seconds
            error_s += chance * seconds * error
        return mean_s, error_s / mean_s

    def _draft_s_by_depth(self, drafters: Sources, sequences: int) -> list[float]:
        depths = range(1, self._limits.max_depth + 1)
        result = [0.0] * len(depths)
        for source in filter(self._knows, drafters):
            for number, chance in self._numbers_asked(drafters, source, sequences):
                for layer, depth in enumerate(depths):
                    result[layer] += chance * self._draft_times[source].predict(depth, depth * number, 0)[0]
        return result

    def _numbers_asked(self, drafters: Sources, source: str, sequences: int) -> list[tuple[float, float]]:
        """For how many of the sequences a source of the set will be asked, with the chances of these numbers."""
        asked, of = self._asked.get((drafters, source), (0.0, 0.0))
        share = (asked + PRIOR_TRIALS) / (of + PRIOR_TRIALS)
        if share > SURE_OFFER:
            return [(sequences, 1.0)]
        if sequences > FEW:
            return [(sequences * share, 1.0)]
        return [
            (number, math.comb(sequences, number) * share**number * (1 - share) ** (sequences - number))
            for number in range(1, sequences + 1)
        ]

    def break_even_tokens(self, sequences: int, nodes: int, context_tokens: int) -> float:
        """Tokens of a step and sequence from which trees of so many nodes pay, drafting time apart."""
        verify_s = self.times.predict(sequences, sequences * (1 + nodes), context_tokens)[0]
        return max(1.0, verify_s / self.base_s(sequences, context_tokens))

    def break_even_sequences(self, tokens: float, nodes: int, context_per_sequence: int, most: int) -> int:
        """The largest batch up to `most` at which trees of so many nodes that bring so many tokens a step pay; 0: none.

        Found by halving: break-even tokens do not fall as the batch grows, on hardware that fills up.
        """
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.break_even_tokens(middle, nodes, middle * context_per_sequence) < tokens:
                low = middle
            else:
                high = middle - 1
        return low


def _drafted_for(outcome: StepOutcome, source: str) -> int:
    """Requests that the source was asked for."""
    if outcome.tally is None or not outcome.tally.together.asked:
        return max(1, outcome.num_sequences)
    tally = outcome.tally.by_source.get(source)
    return max(1, outcome.tally.together.asked if tally is None else tally.asked)
