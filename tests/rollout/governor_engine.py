"""An engine that is not there: true step times, true chances of drafts, and noise, for tests of the governor."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from rollout.governor.governor import Governor
from rollout.governor.records import Alarm, Choice, SourceShare, StepOutcome, StepState
from rollout.governor.tally import StepTally, Tally

MAX_DEPTH, MAX_WIDTH = 8, 4


def cpu_s(sequences, rows, context):
    """About what the embedded model takes on a CPU: a line in the rows."""
    return 12e-3 + 30e-6 * sequences + 175e-6 * rows + 2e-9 * context


def roofline_s(sequences, rows, context):
    """Reading weights hides arithmetic up to 128 rows."""
    return 4e-3 + max(16e-3, 125e-6 * rows) + 20e-6 * sequences + 1e-9 * context


def experts_s(sequences, rows, context):
    """Each of 128 experts is read once it is touched by one of the rows, each of which picks 8."""
    return 5e-3 + 30e-3 * (1 - (1 - 8 / 128) ** rows) + 60e-6 * rows + 1e-9 * context


CURVES = {"cpu": cpu_s, "roofline": roofline_s, "experts": experts_s}


def chances(first: float, fall: float = 0.95, ranks=(1.0, 0.2, 0.08, 0.04)) -> np.ndarray:
    """[depth][rank]: the first rank is right with probability `first`, which falls by a factor with each layer."""
    return np.array([[first * fall**depth * rank for rank in ranks] for depth in range(MAX_DEPTH)])


def choice_of(drafters, budget: int, depth: int = MAX_DEPTH, width: int = MAX_WIDTH) -> Choice:
    shares = tuple(SourceShare(source=name, num_nodes=budget) for name in drafters)
    return Choice(shares=shares, budget_nodes=budget, max_depth=depth, max_width=width)


@dataclass(slots=True)
class Source:
    """A drafter: its chances, how often it offers anything, and what it costs.

    Attributes:
        layer_s, layer_sequence_s: For each layer, and for each layer and request.
        prepare_s: Once, for each request that it did not draft for in the step before.
    """

    chances: np.ndarray
    offer: float = 1.0
    layer_s: float = 0.0
    layer_sequence_s: float = 0.0
    prepare_s: float = 0.0
    _trees: dict[tuple[int, int, int], list[Children]] = field(default_factory=dict)

    def tree(self, budget: int, max_depth: int, max_width: int) -> list[Children]:
        """The best tree under these limits, row by row: nodes of greatest path probability, layer by layer."""
        key = (budget, max_depth, max_width)
        if key not in self._trees:
            self._trees[key] = grow(self.chances[:max_depth], budget, max_width)
        return self._trees[key]

    def num_nodes(self, budget: int, max_depth: int, max_width: int) -> int:
        return len(self.tree(budget, max_depth, max_width)) - 1

    def expected(self, budget: int, max_depth: int, max_width: int) -> float:
        """Tokens that a tree brings a request."""
        tree = self.tree(budget, max_depth, max_width)
        reach = [1.0] + [0.0] * (len(tree) - 1)
        for row, children in enumerate(tree):
            for rank, child in children.by_rank:
                reach[child] = reach[row] * self.chances[children.depth, rank]
        return self.offer * sum(reach[1:])


@dataclass(slots=True)
class Children:
    """Of one row: its depth, and (rank, row) of its children."""

    depth: int
    by_rank: list[tuple[int, int]] = field(default_factory=list)


def grow(chances: np.ndarray, budget: int, max_width: int) -> list[Children]:
    layers = [[(1.0, None, 0)]]  # probability, index of the parent in the layer above, rank
    for layer in chances:
        offers = [(p * c, i, rank) for i, (p, _, _) in enumerate(layers[-1]) for rank, c in enumerate(layer)]
        layers.append(sorted(offers, key=lambda offer: -offer[0])[:max_width])
    nodes = [(p, depth, i) for depth, layer in enumerate(layers) for i, (p, _, _) in enumerate(layer) if depth]
    kept = sorted(nodes, key=lambda node: (-node[0], node[1]))[:budget]
    tree, row_of = [Children(0)], {(0, 0): 0}
    for _, depth, i in sorted(kept, key=lambda node: node[1:]):
        _, parent, rank = layers[depth][i]
        row_of[depth, i] = len(tree)
        tree[row_of[depth - 1, parent]].by_rank.append((rank, len(tree)))
        tree.append(Children(depth))
    return tree


@dataclass(slots=True)
class Engine:
    """Runs steps, with the best tree of each source.

    Attributes:
        after_drafts: How much longer a step without drafts takes that follows one with.
    """

    curve: Callable[[int, int, int], float]
    sources: dict[str, Source]
    rng: np.random.Generator
    noise: float = 0.05
    outliers: float = 0.01
    after_drafts: float = 1.0
    _asked: tuple[str, ...] = ()
    _worth: dict[tuple, tuple[float, float]] = field(default_factory=dict)

    def step(self, choice: Choice, sequences: int, context: int, version: int = 0) -> StepOutcome:
        tally, nodes, accepted, asked = None, 0, 0, 0
        if not choice.is_off:
            asked = min(sequences, choice.max_requests or sequences)
            tally, nodes = self._draft(choice, asked)
            accepted = tally.together.accepted
        draft = self.draft_s(choice, asked)
        prepare_s = asked * sum(self.sources[name].prepare_s for name in choice.sources if name not in self._asked)
        follows_drafts = bool(self._asked)
        self._asked = choice.sources
        factor = self.rng.lognormal(0, self.noise) * (4 if self.rng.random() < self.outliers else 1)
        factor *= self.after_drafts if follows_drafts and choice.is_off else 1
        return StepOutcome(
            choice=choice,
            num_sequences=sequences,
            context_tokens=context,
            version=version,
            rows=sequences + nodes,
            num_tokens=sequences + accepted,
            step_s=(self.curve(sequences, sequences + nodes, context) + sum(draft.values()) + prepare_s) * factor,
            prepare_s=prepare_s * factor,
            draft_s=tuple((name, spent * factor) for name, spent in draft.items() if spent),
            tally=tally,
            follows_drafts=follows_drafts or not choice.is_off,
        )

    def draft_s(self, choice: Choice, asked: int) -> dict[str, float]:
        parts = {name: self.sources[name] for name in choice.sources}
        return {name: choice.max_depth * (s.layer_s + asked * s.layer_sequence_s) for name, s in parts.items()}

    def worth(self, choice: Choice, sequences: int, context: int) -> tuple[float, float]:
        """Expected tokens and expected seconds of a step; exact but for who is offered drafts, which is drawn."""
        shape = (choice.budget_nodes, choice.max_depth, choice.max_width)
        key = (choice.sources, *shape, choice.max_requests, sequences, context)
        if key in self._worth:
            return self._worth[key]
        rng = np.random.default_rng(0)
        asked = 0 if choice.is_off else min(sequences, choice.max_requests or sequences)
        left = np.full(64 if any(self.sources[name].offer < 1 for name in choice.sources) else 1, asked)
        tokens, rows, missed = float(sequences), np.full(len(left), sequences), 1.0
        for name in self._in_order(choice):
            source = self.sources[name]
            tokens += asked * missed * source.expected(*shape)
            missed *= 1 - source.offer
            offered = rng.binomial(left, source.offer)
            rows, left = rows + offered * source.num_nodes(*shape), left - offered
        seconds = float(np.mean([self.curve(sequences, int(r), context) for r in rows]))
        seconds += sum(self.draft_s(choice, asked).values())
        self._worth[key] = (tokens, seconds)
        return self._worth[key]

    def best_fixed(self, budgets, sequences: int, context: int) -> tuple[float, Choice]:
        """The greatest expected tokens per second of any fixed choice, and that choice."""
        names = sorted(self.sources)
        options = [Choice()]
        for drafters in {(name,) for name in names} | {tuple(names)}:
            for budget, depth, width in itertools.product(budgets, range(1, MAX_DEPTH + 1), range(1, MAX_WIDTH + 1)):
                options.append(choice_of(drafters, budget, depth, width))
        speeds = [tokens / seconds for tokens, seconds in (self.worth(o, sequences, context) for o in options)]
        return max(speeds), options[int(np.argmax(speeds))]

    def _in_order(self, choice: Choice) -> list[str]:
        """Of several sources the first one that offers drafts is used for a request: the one that seldom does."""
        return sorted(choice.sources, key=lambda name: self.sources[name].offer)

    def _draft(self, choice: Choice, asked: int) -> tuple[StepTally, int]:
        result = StepTally(MAX_DEPTH)
        left = asked
        total = 0
        for name in self._in_order(choice):
            offered = int(self.rng.binomial(left, self.sources[name].offer))
            tally, nodes = self._walk(name, choice, offered)
            tally.asked = asked
            result.by_source[name] = tally
            result.together.add(tally)
            left -= offered
            total += nodes
        result.together.asked = asked
        return result, total

    def _walk(self, name: str, choice: Choice, requests: int) -> tuple[Tally, int]:
        source = self.sources[name]
        tree = source.tree(choice.budget_nodes, choice.max_depth, choice.max_width)
        tally = Tally.empty(MAX_DEPTH)
        walking = [requests] + [0] * (len(tree) - 1)
        for row, children in enumerate(tree):
            if not walking[row] or not children.by_rank:
                continue
            right = source.chances[children.depth, [rank for rank, _ in children.by_rank]]
            hits = self.rng.multinomial(walking[row], [*right, 1 - right.sum()])
            for place, (_, child) in enumerate(children.by_rank):  # ranks are places among the children there are
                tally.trials[children.depth, place] += walking[row]
                tally.hits[children.depth, place] += hits[place]
                walking[child] = int(hits[place])
        tally.accepted = sum(walking[1:])
        tally.offered = requests
        tally.nodes = requests * (len(tree) - 1)
        return tally, tally.nodes


@dataclass(slots=True)
class Run:
    """What a stretch of steps came to, by expected tokens and seconds of what was chosen: noise has no part in it.

    Attributes:
        plain_s: Seconds for the same tokens without speculation.
        alarms: (step, alarm).
    """

    seconds: float = 0.0
    tokens: float = 0.0
    plain_s: float = 0.0
    choices: list[Choice] = field(default_factory=list)
    alarms: list[tuple[int, Alarm]] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Throughput, of none."""
        return self.plain_s / self.seconds

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def run(
    governor: Governor, engine: Engine, steps: int, sequences: int, version: int = 0, sources=None, into=None
) -> Run:
    """So many steps at a batch, with 1,300 tokens of context each."""
    result = into or Run()
    context = 1300 * sequences
    offered = tuple(engine.sources) if sources is None else tuple(sources)
    for _ in range(steps):
        state = StepState(num_sequences=sequences, context_tokens=context, sources=offered, version=version)
        choice = governor.choose(state)
        alarms = governor.observe(engine.step(choice, sequences, context, version))
        result.alarms += [(len(result.choices), alarm) for alarm in alarms]
        tokens, seconds = engine.worth(choice, sequences, context)
        result.tokens += tokens
        result.seconds += seconds
        result.plain_s += engine.curve(sequences, sequences, context) * tokens / sequences
        result.choices.append(choice)
    return result
