"""Seconds that an engine step takes, fitted to measured steps.

    step = fixed + per_row · rows + per_context_token · context + per_prefill_token · prefilled

Owns the fit and its error. Knows nothing of who measured. Steps with drafts have a row for every token they
accepted on average, so that speculation costs what it was measured to cost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from rollout.errors import InvalidRequest

NUM_TERMS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """One step, or the mean of several alike.

    Attributes:
        batch: Sequences decoded.
        context_tokens: Sum of their contexts.
        prefill_tokens: Prefilled in the step.
        step_s: Its duration.
        spec: Mean tokens accepted for each sequence; 1 without speculation.
    """

    batch: int
    context_tokens: int
    step_s: float
    prefill_tokens: int = 0
    spec: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FitError:
    """How far the fitted steps are from the measured ones, as shares of the measured duration."""

    num_steps: int
    mean_relative: float
    p95_relative: float


class MeasuredCosts:
    """The fit, by least squares on relative errors; no coefficient is below 0.

    Raises:
        InvalidRequest: Too few steps, a step that took no time, or all of them alike.
    """

    def __init__(self, steps: Sequence[MeasuredStep]) -> None:
        if len(steps) < 2 * NUM_TERMS:
            raise InvalidRequest("measured steps", f"{len(steps)} steps", f"at least {2 * NUM_TERMS}")
        seconds = np.array([s.step_s for s in steps])
        terms = np.array([(1.0, s.batch * s.spec, s.context_tokens, s.prefill_tokens) for s in steps])
        if not np.isfinite(terms).all() or not (seconds > 0).all() or (terms < 0).any():
            raise InvalidRequest("measured steps", "a negative or missing figure", "step_s > 0 and counts >= 0")
        self._weights = _non_negative(terms, seconds)
        off = np.abs(terms @ self._weights - seconds) / seconds
        self.error = FitError(
            num_steps=len(steps), mean_relative=float(off.mean()), p95_relative=float(np.percentile(off, 95))
        )
        self.context_token_s = float(self._weights[2])

    def local_s(self, decode_rows: int, prefill_tokens: int, prefill_reads: float) -> float:
        return float(self._weights @ (1.0, decode_rows, 0.0, prefill_tokens))

    def shared_s(self, rows: int) -> float:
        return 0.0

    def step_s(self, step: MeasuredStep) -> float:
        """What the fit says of a step."""
        terms = (1.0, step.batch * step.spec, step.context_tokens, step.prefill_tokens)
        return float(self._weights @ terms)

    def scaled(self, factor: float) -> MeasuredCosts:
        """The same on a machine that takes so many times as long."""
        other = copy(self)
        other._weights = factor * self._weights
        other.context_token_s = factor * self.context_token_s
        return other


def _non_negative(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Least squares on relative errors, leaving out, one by one, the term that would become most negative."""
    scale = np.maximum(terms.max(axis=0), 1.0)
    rows = terms / scale / seconds[:, None]
    kept = [i for i in range(terms.shape[1]) if terms[:, i].any()]
    while True:
        found, *_ = np.linalg.lstsq(rows[:, kept], np.ones(len(seconds)), rcond=None)
        if found.min() >= 0:
            break
        del kept[int(found.argmin())]
    if not kept:
        raise InvalidRequest("measured steps", "steps that no sum of costs explains", "steps of several batches")
    weights = np.zeros(terms.shape[1])
    weights[kept] = found / scale[kept]
    return weights


def read_steps(path: Path) -> list[MeasuredStep]:
    """Read a JSON list of measured steps.

    Raises:
        InvalidRequest: No such file, no JSON, or rows of another form.
    """
    names = {f.name for f in fields(MeasuredStep)}
    expected = f"a JSON list of objects with {', '.join(sorted(names))}"
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"measured steps in {path}", str(error), expected) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InvalidRequest(f"measured steps in {path}", type(rows).__name__, expected)
    try:
        steps = [MeasuredStep(**row) for row in rows]
    except TypeError as error:
        raise InvalidRequest(f"measured steps in {path}", str(error), expected) from error
    if not all(isinstance(v, int | float) for s in steps for v in (s.batch, s.context_tokens, s.step_s, s.spec)):
        raise InvalidRequest(f"measured steps in {path}", "a figure that is no number", expected)
    return steps
