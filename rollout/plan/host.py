"""The planner on engines that can be timed: a device of measured bandwidth and arithmetic, three steps to calibrate.

Owns what three steps tell of a device: what a step costs at least, what each sequence adds, and how fast KV is read.
Everything else is the cost model's. With it the model's form is tested, where all of its steps can be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rollout.errors import InvalidRequest
from rollout.simulate.accelerators import Accelerator
from rollout.simulate.costs import Efficiency, Layout, MoeShape, RooflineCosts
from rollout.simulate.measured import MeasuredStep

# The data sheet here is a measurement, so all of it is reached.
REACHED = Efficiency(memory=1.0, kv=1.0, compute=1.0, link=1.0, collective_s=0.0, step_s=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """A decoding step, measured and computed."""

    step: MeasuredStep
    computed_s: float
    is_calibration: bool

    @property
    def error(self) -> float:
        """Computed by measured, less 1."""
        return self.computed_s / self.step.step_s - 1


def calibrate(steps: Sequence[MeasuredStep], device: Accelerator, shape: MoeShape, layout: Layout) -> Efficiency:
    """Factors under which the model gives three measured steps exactly.

    Args:
        steps: Three decoding steps of one engine, of two batches and of two contexts a sequence.
        device: Its bandwidth and arithmetic.
        shape, layout: Of the model, in one process.

    Raises:
        InvalidRequest: Steps that do not tell the factors apart, or a negative one.
    """
    costs = RooflineCosts(1, device, shape, REACHED, layout)
    unknowns = np.array([(1.0, s.batch, costs.context_token_s * s.context_tokens) for s in steps])
    rest = np.array([s.step_s - costs.terms(s.batch, 0, 0, 0, s.batch).total_s for s in steps])
    expected = "three steps of two batches and two contexts, on a machine that does nothing else"
    if len(steps) != 3 or np.linalg.matrix_rank(unknowns / np.abs(unknowns).max(axis=0)) < 3:
        raise InvalidRequest("calibration steps", list(steps), expected)
    fixed, row, kv = np.linalg.solve(unknowns, rest)
    if min(fixed, row, kv) <= 0:
        raise InvalidRequest("calibrated factors", f"step {fixed}, row {row}, KV {kv}", f"above 0: {expected}")
    return replace(REACHED, step_s=float(fixed), row_s=float(row), kv=float(1 / kv))


def predict(
    steps: Sequence[MeasuredStep], device: Accelerator, shape: MoeShape, layout: Layout
) -> tuple[Efficiency, list[Predicted]]:
    """Calibrate on the extremes of decoding steps, and compute all of them.

    Args:
        steps: Decoding steps of a grid of batches and contexts.

    Raises:
        InvalidRequest: No two batches, or no two contexts of the largest.
    """
    decoding = [s for s in steps if s.batch and not s.prefill_tokens]
    batches = sorted({s.batch for s in decoding})
    if len(batches) < 2:
        raise InvalidRequest("steps", f"batches {batches}", "two at least")
    few = min((s for s in decoding if s.batch == batches[0]), key=lambda s: s.context_tokens)
    many = sorted((s for s in decoding if s.batch == batches[-1]), key=lambda s: s.context_tokens)
    chosen = [few, many[0], many[-1]]
    efficiency = calibrate(chosen, device, shape, layout)
    costs = RooflineCosts(1, device, shape, efficiency, layout)
    predicted = [
        Predicted(
            step=step,
            computed_s=costs.terms(step.batch, step.context_tokens, 0, 0, step.batch).total_s,
            is_calibration=any(step is one for one in chosen),
        )
        for step in decoding
    ]
    return efficiency, predicted
