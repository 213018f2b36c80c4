"""How much of a data sheet engines reach: fitted to published speeds, with the error that is left.

Owns the fit. A few factors, common to all accelerators and engines, and for each engine what a step costs it at
least. Factors that the figures do not tell apart stay near what was assumed. The error is told with each source left
out in turn, for a fit always looks better on what it was fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy.optimize import least_squares

from rollout.errors import InvalidRequest
from rollout.plan.candidate import Candidate
from rollout.plan.published import PUBLISHED, Published
from rollout.plan.steady import steady
from rollout.plan.workload import Workload, fixed
from rollout.simulate.accelerators import ACCELERATORS
from rollout.simulate.costs import QWEN3_235B_A22B, Efficiency, RooflineCosts

CHUNK = 8192  # of the engines in the published figures; none states another that matters
MEMORY_SHARE, WORKSPACE_BYTES = 0.90, 6e9  # theirs as well: TensorRT-LLM takes 0.90 to 0.95 of what is free
# Factors that are fitted: what is assumed of each (Efficiency's, but for the host's, which it leaves out), and bounds.
ASSUMED = {"memory": 0.8, "kv": 0.7, "compute": 0.5, "collective_s": 2e-5, "row_s": 2e-5}
BOUNDS = {
    "memory": (0.2, 1.0),
    "kv": (0.2, 1.0),
    "compute": (0.1, 0.9),
    "collective_s": (3e-6, 1e-4),
    "row_s": (1e-6, 2e-4),
}
STEP_BOUNDS_S = (2e-4, 3e-2)
PULL = 0.15  # of a factor e away from what was assumed, against an error of 100 % in one figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A published figure, what the fit gives for it, and what a fit without its source gives."""

    published: Published
    computed: float
    held_out: float

    @property
    def error(self) -> float:
        """Computed speed by the published one, less 1; above 0 the plan is too hopeful."""
        return _speed(self.published, self.computed) - 1

    @property
    def held_out_error(self) -> float:
        return _speed(self.published, self.held_out) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Fitted efficiencies.

    Attributes:
        efficiency: For plans: the factors, and the step of the slowest engine.
        step_s: What a step costs at least, by engine.
        error: Root mean square of the logarithms of computed by published speed: 0.1 is a tenth off, either way.
    """

    efficiency: Efficiency
    step_s: dict[str, float]
    error: float


@cache
def calibrated() -> Calibration:
    """The fit to all published figures."""
    efficiency, steps = fit(PUBLISHED)
    errors = [_speed(row, compute(row, replace(efficiency, step_s=steps[row.engine]))) for row in PUBLISHED]
    return Calibration(
        efficiency=replace(efficiency, step_s=max(steps.values())), step_s=steps, error=root_mean_square(errors)
    )


def root_mean_square(ratios: Sequence[float]) -> float:
    """Of the logarithms of ratios."""
    return math.sqrt(sum(math.log(ratio) ** 2 for ratio in ratios) / len(ratios))


def compare() -> list[Compared]:
    """Every published figure; takes a fit for each source, which is left out in turn."""
    own = calibrated()
    without = {source: fit([r for r in PUBLISHED if r.source != source]) for source in {r.source for r in PUBLISHED}}
    compared = []
    for row in PUBLISHED:
        factors, steps = without[row.source]
        # What a step costs an engine cannot be known without it: the slowest of the others is taken.
        unknown = replace(factors, step_s=max(steps.values()))
        known = replace(own.efficiency, step_s=own.step_s[row.engine])
        compared.append(Compared(published=row, computed=compute(row, known), held_out=compute(row, unknown)))
    return compared


def fit(rows: Sequence[Published]) -> tuple[Efficiency, dict[str, float]]:
    """Least squares on logarithms of speeds, drawn towards Efficiency's defaults.

    Returns:
        The factors, and each engine's step.
    """
    engines = sorted({row.engine for row in rows})
    start = Efficiency()
    names = [*ASSUMED, *(f"step of {engine}" for engine in engines)]
    assumed = np.log([*ASSUMED.values(), *(start.step_s for _ in engines)])
    bounds = np.log([*(BOUNDS[name] for name in ASSUMED), *(STEP_BOUNDS_S for _ in engines)]).T

    def unpack(logs: np.ndarray) -> tuple[Efficiency, dict[str, float]]:
        values = dict(zip(names, np.exp(logs).tolist(), strict=True))
        factors = replace(start, **{name: values[name] for name in ASSUMED})
        return factors, {engine: values[f"step of {engine}"] for engine in engines}

    def residuals(logs: np.ndarray) -> np.ndarray:
        factors, steps = unpack(logs)
        errors = [math.log(compute(row, replace(factors, step_s=steps[row.engine])) / row.figure) for row in rows]
        return np.concatenate([errors, PULL * (logs - assumed)])

    return unpack(least_squares(residuals, assumed, bounds=bounds, ftol=1e-5).x)


def compute(row: Published, efficiency: Efficiency) -> float:
    """The figure that the model gives: seconds a token, or tokens per second of a GPU."""
    batch = row.concurrency
    workload = fixed("published", row.prompt_tokens, row.output_tokens)
    if batch is None:
        return _offline(row, workload, efficiency)
    return _step_s(row, workload, batch * row.tensor_ranks / row.ranks, efficiency)


def _speed(row: Published, computed: float) -> float:
    """Of the model's by the published one."""
    return row.figure / computed if row.tpot_s is not None else computed / row.figure


def _offline(row: Published, workload: Workload, efficiency: Efficiency) -> float:
    """Requests that are all alike run in waves, as many at once as have KV to their ends; the last is smaller."""
    assert row.num_requests is not None
    gpu = ACCELERATORS[row.accelerator]
    costs = RooflineCosts(row.ranks, gpu, QWEN3_235B_A22B, efficiency, _candidate(row, 1).layout())
    room = costs.kv_tokens(MEMORY_SHARE, WORKSPACE_BYTES) // (row.prompt_tokens + row.output_tokens)
    left = row.num_requests / row.ranks
    if room < 1:
        raise InvalidRequest("published", row, "KV for one request at least")
    tokens, seconds = left * row.output_tokens, 0.0
    while left > 0:
        wave = min(left, room)
        seconds += row.output_tokens * _step_s(row, workload, wave, efficiency)
        left -= wave
    return tokens / seconds


def _step_s(row: Published, workload: Workload, batch: float, efficiency: Efficiency) -> float:
    gpu = ACCELERATORS[row.accelerator]
    is_aligned = row.concurrency is None
    found = steady(_candidate(row, batch), workload, gpu, QWEN3_235B_A22B, efficiency, is_aligned=is_aligned)
    if found is None:
        raise InvalidRequest("published", row, f"prefills that keep up in chunks of {CHUNK}")
    return found.step_s


def _candidate(row: Published, batch: float) -> Candidate:
    return Candidate(
        ranks=row.ranks,
        tensor_ranks=row.tensor_ranks,
        batch=batch,  # type: ignore[arg-type]
        chunk=CHUNK,
        precision=row.precision,
    )
