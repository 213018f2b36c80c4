"""What speculation brings and costs, for a chain of drafts.

Owns the cost of a draft model; what is accepted is `rollout.simulate.speculation`'s. Knows nothing of hardware but
the bandwidth that reads the draft's weights. Token trees bring more than chains; how much more on a model of this
size nobody has published, so plans do not count on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from rollout.errors import InvalidRequest
from rollout.simulate.costs import BF16_BYTES, MoeShape
from rollout.simulate.speculation import expected_tokens

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
        return expected_tokens(self.chance, self.num_tokens)

    def draft_s(self, rows: float, shape: MoeShape, bytes_per_s: float, flops: float) -> float:
        """Seconds that drafting takes for so many sequences: one layer and the head, once for each token."""
        params = shape.attention_params + 3 * shape.hidden**2 + shape.head_params
        once = max(params * BF16_BYTES / bytes_per_s, 2 * rows * params / flops) + LAUNCH_S
        return self.num_tokens * once


NO_DRAFT = Draft()
