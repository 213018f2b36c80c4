"""Seconds as a function of (calls, rows, context), learned from steps as they run.

Owns cells: on a logarithmic grid over calls and rows per call each remembers the level of the times seen there. A sum
with non-negative coefficients,

    seconds = fixed + per_call · calls + per_row · rows + per_token · context + touched · (1 − exp(−rows / 16)),

is fitted to the cells, each weighing about the same however often it was visited. It carries a cell's level to other
points, and to cells that nothing is known of. The last term is for experts that are read once a row picks them. So a
curve of another shape (a roofline, padding to graph sizes) is followed where it is visited. A slow common factor
(another process, clocks) is followed apart, so that it does not pass for a difference between cells.

For the verifying step calls are sequences; for a draft model they are its passes, and rows those of all passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import nnls

MAX_CELLS = 192  # the longest unvisited is forgotten
CALLS_PER_OCTAVE, ROWS_PER_OCTAVE = 2, 3  # of the grid; tree sizes 1, 2, 3, 4, 6, 8, 12, 16 … have cells of their own
FIRST = 5  # times of which a new cell takes the median: the first at a new shape may include compiling
SETTLED = 32  # times after which a cell's level moves as slowly as it ever does
STALE_STEPS = 128  # without a visit, after which a time that surprises says that the cell has become another
DRIFT_GAIN = 0.02  # of the common factor; follows a change within some 50 steps
NOISE_GAIN = 0.05
MIN_NOISE = 0.03  # relative; cells are not trusted beyond it, since their grid is coarse
MAX_NOISE = 0.5
CLIP = 3.0  # deviations beyond so many times the noise count as that much
PRIOR_SIGMA = 0.25  # relative error of the line where nothing was seen, once it was fitted to a few cells
BLIND_SIGMA = 0.5  # before that
FITTED_CELLS = 3
KNOWN_WEIGHT = 8.0  # visits from which a cell needs no neighbours
NEIGHBOUR_WEIGHT = 0.25  # of a visit to a neighbouring cell
HALF_LIFE_STEPS = 4096.0  # of a cell's weight while it is not visited
REFIT_EVERY = 64  # steps, and whenever a cell is new
SCALE = np.array([1.0, 64.0, 64.0, 65_536.0, 1.0])  # of the terms, so that the fit is well conditioned
TOUCHING_ROWS = 16.0  # experts over experts of a token, for the usual sparse models
RIDGE = 1e-3  # of relative error; only decides between terms that the data cannot tell apart


@dataclass(slots=True)
class Cell:
    """What was seen around one point of the grid. Owned by TimeModel."""

    count: int = 0
    level: float = 0.0  # log seconds without the common factor, at the mean point below
    calls: float = 0.0
    rows: float = 0.0
    context: float = 0.0
    last_step: int = 0
    first: list[float] = field(default_factory=list)
    deviation: float = 0.0  # level minus the line's


class TimeModel:
    """Learns from every step; knows how well it knows."""

    def __init__(self) -> None:
        self._cells: dict[tuple[int, int], Cell] = {}
        self._line = (0.0, 0.0, 0.0, 0.0, 0.0)  # fixed, per call, per row, per token, touched
        self._drift = 0.0
        self._noise = 0.1
        self._step = 0
        self._fitted_at = 0

    @property
    def num_steps(self) -> int:
        return self._step

    def learn(self, calls: int, rows: int, context: int, seconds: float) -> float:
        """A step ran.

        Returns:
            Its seconds, an outlier brought back to where it still counts.
        """
        self._step += 1
        cell = self._visited(_cell_of(calls, rows))
        expected = self._log_s(calls, rows, context) if cell.count >= FIRST else None
        seen = math.log(seconds)
        is_stale = self._step - cell.last_step > STALE_STEPS
        if expected is not None and is_stale and abs(seen - expected) > CLIP * self._noise:
            cell.count, expected = 0, None
            cell.first.clear()
        if expected is not None:
            innovation = seen - expected
            limit = CLIP * self._noise
            innovation = min(max(innovation, -limit), limit)
            self._noise += NOISE_GAIN * (1.25 * abs(innovation) - self._noise)  # 1.25 mean |x| = σ of a Gaussian
            self._noise = min(max(self._noise, MIN_NOISE), MAX_NOISE)
            if cell.count >= SETTLED:  # before that the cell itself may be what is wrong
                self._drift += DRIFT_GAIN * innovation
            seen = expected + innovation
        self._move(cell, calls, rows, context, seen - self._drift)
        if cell.count <= FIRST or self._step - self._fitted_at >= REFIT_EVERY:
            self._fit()
        else:
            cell.deviation = cell.level - self._line_log(cell.calls, cell.rows, cell.context)
        return math.exp(seen)

    def predict(self, calls: float, rows: float, context: float) -> tuple[float, float]:
        """Expected seconds of a step, and their relative standard error.

        Raises:
            ValueError: Nothing was learned yet.
        """
        if not self._cells:
            raise ValueError("time model: got a question before any step, expected learn() first")
        at_calls, at_rows = _cell_of(calls, rows)
        own = self._cells.get((at_calls, at_rows))
        weight = 0.0 if own is None else self._weight(own)
        if own is not None and weight >= KNOWN_WEIGHT:
            known_s = math.exp(self._line_log(calls, rows, context) + own.deviation + self._drift)
            return known_s, self._noise / math.sqrt(weight)
        near_weight = near_sum = 0.0
        for key in (
            (at_calls - 1, at_rows),
            (at_calls + 1, at_rows),
            (at_calls, at_rows - 1),
            (at_calls, at_rows + 1),
        ):
            cell = self._cells.get(key)
            # The cell of steps without drafts has a shape of its own: no neighbour to those with drafts.
            if cell is not None and (key[1] == 0) == (at_rows == 0):
                share = NEIGHBOUR_WEIGHT * self._weight(cell)
                near_weight += share
                near_sum += share * cell.deviation
        prior = PRIOR_SIGMA if len(self._cells) >= FITTED_CELLS else BLIND_SIGMA
        # Neighbours tell of the place, not of the point: they never count for more than one visit of each.
        near_shift = near_sum / (near_weight + NEIGHBOUR_WEIGHT) if near_weight else 0.0
        near_sigma = prior / math.sqrt(1 + min(near_weight, 4 * NEIGHBOUR_WEIGHT) * 3)
        if own is None:
            return math.exp(self._line_log(calls, rows, context) + near_shift + self._drift), near_sigma
        information = weight * (near_sigma / self._noise) ** 2
        shift = (information * own.deviation + near_shift) / (information + 1)
        sigma = near_sigma / math.sqrt(1 + information)
        return math.exp(self._line_log(calls, rows, context) + shift + self._drift), sigma

    def worst(self, calls: float, rows: float, context: float) -> float:
        """Seconds that a step may take at most, where time grows with the rows no more than in proportion.

        Reckoned from the most rows up to these that were seen with about as many calls.
        """
        seen = self.reach(calls, rows)
        seconds, sigma = self.predict(calls, min(seen, rows), context)
        return seconds * math.exp(2 * sigma) * max(1.0, rows / seen)

    def reach(self, calls: float, rows: float) -> float:
        """The most rows up to these that were seen with about as many calls; as many as calls where none were."""
        at_calls, at_rows = _cell_of(calls, rows)
        for place in range(at_rows, 0, -1):
            cell = self._cells.get((at_calls, place))
            if cell is not None:
                return max(calls, cell.rows * calls / cell.calls)
        return calls

    def _log_s(self, calls: float, rows: float, context: float) -> float:
        return math.log(self.predict(calls, rows, context)[0])

    def _line_log(self, calls: float, rows: float, context: float) -> float:
        fixed, per_call, per_row, per_token, touched = self._line
        seconds = fixed + per_call * calls + per_row * rows + per_token * context
        return math.log(max(seconds - touched * math.expm1(-rows / TOUCHING_ROWS), 1e-9))

    def _weight(self, cell: Cell) -> float:
        """Visits that still count."""
        age = self._step - cell.last_step
        return min(cell.count, SETTLED) * 0.5 ** (age / HALF_LIFE_STEPS)

    def _visited(self, key: tuple[int, int]) -> Cell:
        cell = self._cells.pop(key, None)
        if cell is None:
            cell = Cell()
            if len(self._cells) >= MAX_CELLS:
                del self._cells[next(iter(self._cells))]
        self._cells[key] = cell  # at the end: the first is the longest unvisited
        return cell

    def _move(self, cell: Cell, calls: int, rows: int, context: int, seen: float) -> None:
        cell.count += 1
        cell.last_step = self._step
        gain = 1 / min(cell.count, SETTLED)
        cell.calls += gain * (calls - cell.calls)
        cell.rows += gain * (rows - cell.rows)
        cell.context += gain * (context - cell.context)
        if cell.count <= FIRST:
            cell.first.append(seen)
            cell.level = sorted(cell.first)[(cell.count - 1) // 2]  # the lower one of two: outliers are slow
        else:
            cell.first.clear()
            cell.level += gain * (seen - cell.level)

    def _fit(self) -> None:
        """The line of least relative errors over the cells."""
        self._fitted_at = self._step
        cells = list(self._cells.values())
        points = np.array([(1.0, c.calls, c.rows, c.context, -math.expm1(-c.rows / TOUCHING_ROWS)) for c in cells])
        points /= SCALE
        seconds = np.exp([c.level for c in cells])
        weights = np.sqrt([min(self._weight(c), FIRST) for c in cells])
        scaled = points * (weights / seconds)[:, None]
        # Without the ridge, rows and calls would be told apart by chance before anything was drafted.
        ridge = np.eye(len(SCALE)) * (RIDGE * np.linalg.norm(scaled, axis=0).max())
        line, _ = nnls(np.vstack([scaled, ridge]), np.concatenate([weights, np.zeros(len(SCALE))]))
        self._line = tuple(float(w) for w in line / SCALE)  # type: ignore[assignment]
        for c in cells:
            c.deviation = c.level - self._line_log(c.calls, c.rows, c.context)


def _cell_of(calls: float, rows: float) -> tuple[int, int]:
    """Steps without drafts (as many rows as calls) have a row of cells of their own."""
    ratio = rows / calls
    return round(CALLS_PER_OCTAVE * math.log2(calls)), (
        0 if rows <= calls else 1 + round(ROWS_PER_OCTAVE * math.log2(ratio))
    )
