"""Where a run stands, apart from the weights: what a resumed run needs to repeat the rest exactly.

Owns the record and its JSON form. Random state is not part of it: every seed derives from the run
seed and the step or version (rollout.seeds, TrainerRank.train_step).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rollout.mismatch import Knobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Saved with every checkpoint and handed back on resume.

    Attributes:
        step: Training steps finished.
        version: Weight version of the checkpoint.
        data_cursor: Index of the next problem to use.
        leftover: Groups that were asked for and not used, as (group id, problem): over-sampling. They go on first.
        learned: Ids of the groups that the checkpoint has learned from and the one before had not.
        knobs: What a mismatch budget has tightened by then; the trainer adds it. None: nothing known of it.
    """

    step: int
    version: int
    data_cursor: int
    leftover: tuple[tuple[str, int], ...] = ()
    learned: tuple[str, ...] = ()
    knobs: Knobs | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Cursor:
        """Raises ValueError or TypeError when the text is not a cursor."""
        values = json.loads(text)
        if values.get("knobs") is not None:
            values["knobs"] = Knobs(**values["knobs"])
        values["leftover"] = tuple((group_id, problem) for group_id, problem in values.get("leftover", ()))
        values["learned"] = tuple(values.get("learned", ()))
        return Cursor(**values)
