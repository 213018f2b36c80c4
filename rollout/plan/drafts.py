"""What speculation brings and costs, for a chain of drafts.

Owns the acceptance that is assumed, with its source, and the cost of a draft model. Knows nothing of hardware but
the bandwidth that reads the draft's weights. Token trees bring more than chains; how much more on a model of this
size nobody has published, so plans do not count on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from rollout.errors import InvalidRequest
from rollout.simulate.costs import BF16_BYTES, MoeShape

# arXiv 2604.26779 (speculation in NeMo-RL): EAGLE-3, drafts of 3 tokens, Qwen3-8B in reasoning RL at T = 1 gains 2.47
# tokens a step, and 2.05 when RL starts from a base model. No measured figure for Qwen3-235B-A22B in RL was found.
PUBLISHED_DRAFT = 3
PUBLISHED_ACCEPT_LENGTH = 2.47
LAUNCH_S = 2e-4  # of one pass of a one-layer draft model; assumed


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A chain of drafted tokens, verified in one step.

    Attributes:
        num_tokens: Drafted for each sequence; 0 = none.
        chance: That a token is accepted, if those before it were.
    """

    num_tokens: int = 0
    chance: float = 0.0

    def __post_init__(self) -> None:
        if self.num_tokens < 0 or not 0 <= self.chance <= 1:
            raise InvalidRequest("draft", f"{self.num_tokens} tokens, chance {self.chance}", "≥ 0, and within [0, 1]")

    @property
    def accept_length(self) -> float:
        """Mean tokens a sequence gains in a step, its own included."""
        return sum(self.chance**i for i in range(self.num_tokens + 1))

    def draft_s(self, rows: float, shape: MoeShape, bytes_per_s: float, flops: float) -> float:
        """Seconds that drafting takes for so many sequences: one layer and the head, once for each token."""
        params = shape.attention_params + 3 * shape.hidden**2 + shape.head_params
        once = max(params * BF16_BYTES / bytes_per_s, 2 * rows * params / flops) + LAUNCH_S
        return self.num_tokens * once


NO_DRAFT = Draft()


@cache
def chance_of(accept_length: float, num_tokens: int) -> float:
    """The chance at which a chain of `num_tokens` drafts gains `accept_length` tokens a step.

    Raises:
        InvalidRequest: No chance does.
    """
    if not 1 <= accept_length <= 1 + num_tokens:
        raise InvalidRequest("accept_length", accept_length, f"between 1 and 1 + {num_tokens} drafted tokens")
    low, high = 0.0, 1.0
    for _ in range(60):  # bisection: the length grows with the chance
        middle = (low + high) / 2
        is_short = Draft(num_tokens=num_tokens, chance=middle).accept_length < accept_length
        low, high = (middle, high) if is_short else (low, middle)
    return (low + high) / 2
