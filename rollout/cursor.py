"""Where a run stands, apart from the weights: what a resumed run needs to repeat the rest exactly.

Owns the record and its JSON form; knows nothing of what its owner puts into `extras`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Saved with every checkpoint and handed back on resume.

    Attributes:
        step: Training steps finished.
        version: Weight version of the checkpoint.
        data_cursor: Index of the next problem to use.
        rng_state: State of whatever random generator the main loop owns, as text; None without one.
        wandb_run_id: W&B run to continue.
        extras: Numbers to carry over (evaluation before training, totals so far).
    """

    step: int
    version: int
    data_cursor: int
    rng_state: str | None = None
    wandb_run_id: str | None = None
    extras: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Cursor:
        """Raises ValueError or TypeError when the text is not a cursor."""
        return Cursor(**json.loads(text))
