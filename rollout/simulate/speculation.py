"""What speculation brings on a simulated engine, and how far it goes in each step.

Owns the acceptance that is assumed and the governor's rule: the number of drafts that brings the most tokens a second
at the batch and context of the moment, none where none pays. Knows nothing of draft models. The live governor
(`rollout/governor`) has to learn acceptance and step times, and gives away up to its guard share doing so; here both
are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from rollout.errors import InvalidRequest
from rollout.simulate.costs import StepCosts

BISECTIONS = 60  # halvings of [0, 1]: beyond float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """What somebody measured: mean tokens a step with a chain of `num_drafts`, and where it says so."""

    name: str
    accept_length: float
    num_drafts: int
    source: str


IN_RL = Acceptance(
    name="eagle3-rl",
    accept_length=2.47,
    num_drafts=3,
    source="EAGLE-3 on Qwen3-8B in reasoning RL at T = 1, arXiv 2604.26779",
)
"""None was found of a large model in RL. The same paper has 2.05 where RL starts from a base model."""
PUBLISHED = (
    IN_RL,
    Acceptance(
        name="eagle3-235b",
        accept_length=3.77,
        num_drafts=7,
        source="EAGLE-3 on Qwen3-235B-A22B-Instruct-2507 at T = 1, mean of MT-bench, HumanEval, GSM8K; the figure "
        "without LK losses of arXiv 2602.23881's model card",
    ),
    Acceptance(
        name="clover2-tiny",
        accept_length=4.75,
        num_drafts=5,
        source="Clover-2, width 1, on this project's embedded model at T = 1 (docs/log.md), which is surer of itself "
        "than a large model",
    ),
)


def expected_tokens(chance: float, num_drafts: int) -> float:
    """Mean tokens a step, its own included, of a chain whose drafts are accepted with `chance` if all before were."""
    return sum(chance**n for n in range(num_drafts + 1))


@cache
def chance_of(accept_length: float, num_drafts: int) -> float:
    """The chance at which a chain of `num_drafts` brings `accept_length` tokens a step.

    Raises:
        InvalidRequest: No chance does.
    """
    if not 1 <= accept_length <= 1 + num_drafts:
        raise InvalidRequest("accept_length", accept_length, f"between 1 and 1 + {num_drafts} drafted tokens")
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):  # the length grows with the chance
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, num_drafts) < accept_length else (low, middle)
    return high


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One rank of a group in a step: sequences that decode, and the sum of their contexts in tokens."""

    num_decoding: int
    context_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """A chain of drafts for every sequence.

    Attributes:
        tokens: Mean tokens that a sequence gains in a step with 0, 1, 2, … drafts; the first is 1.
        draft_s: Seconds of drafting for each draft of a chain, however many sequences.
    """

    tokens: tuple[float, ...] = (1.0,)
    draft_s: float = 0.0

    @classmethod
    def chain(cls, accept_length: float, num_drafts: int, draft_s: float) -> Speculation:
        """A chain whose drafts are accepted with the same chance each, if all before them were.

        Args:
            accept_length: Mean tokens a step with `num_drafts` drafts, as papers give it.
            num_drafts: The longest chain.
            draft_s: Seconds for each draft.

        Raises:
            InvalidRequest: An accept_length that so many drafts cannot bring.
        """
        chance = chance_of(accept_length, num_drafts)
        tokens = [expected_tokens(chance, n) for n in range(num_drafts)]
        return cls(tokens=(*tokens, accept_length) if num_drafts else (1.0,), draft_s=draft_s)

    def best(self, ranks: Sequence[Load], costs: StepCosts, max_rows: int) -> int:
        """Drafts for each sequence of a group's next step.

        Args:
            ranks: The group.
            costs: Prices a step.
            max_rows: Of a step of one rank.
        """
        most = max((load.num_decoding for load in ranks), default=0)
        if most == 0:
            return 0
        choices = range(min(len(self.tokens), max_rows // most))
        return max(choices, key=lambda n: (self.tokens[n] / self._step_s(n, ranks, costs), -n), default=0)

    def _step_s(self, num_drafts: int, ranks: Sequence[Load], costs: StepCosts) -> float:
        rows = [load.num_decoding * (1 + num_drafts) for load in ranks]
        local_s = max(
            costs.local_s(own, 0, 0.0) + costs.context_token_s * load.context_tokens
            for own, load in zip(rows, ranks, strict=True)
        )
        return local_s + costs.shared_s(sum(rows)) + num_drafts * self.draft_s
