"""From estimated to measured chances of a drafted token, learned while tokens come in.

Owns the counts. Knows nothing of where estimates come from.
"""

from __future__ import annotations

NUM_BINS = 16
PRIOR_TRIALS = 8.0
"""Events for which an estimate is taken at its word, before any were counted."""
MAX_TRIALS = 512.0
"""Counts of a bin are halved when it has seen as many, so that it follows a policy that learns."""


class Calibration:
    """For each kind of evidence and each bin of estimates: how often what was estimated came true.

    An answer is the estimate times the bin's ratio of true events to those it had estimated, so answers vary
    smoothly within a bin.

    Args:
        num_kinds: Kinds of evidence, which are calibrated apart.
    """

    def __init__(self, num_kinds: int) -> None:
        centres = [(place + 0.5) / NUM_BINS for place in range(NUM_BINS)] * num_kinds
        self._hits = [PRIOR_TRIALS * centre for centre in centres]
        self._expected = list(self._hits)
        self._trials = [PRIOR_TRIALS] * len(centres)
        self._ratios = [1.0] * len(centres)

    def chance(self, kind: int, estimate: float) -> float:
        """The measured chance of an event whose estimate is in [0, 1)."""
        return min(1.0, estimate * self._ratios[kind * NUM_BINS + int(estimate * NUM_BINS)])

    def observe(self, kind: int, estimate: float, is_hit: bool) -> None:
        """Count one event that had this estimate."""
        place = kind * NUM_BINS + int(estimate * NUM_BINS)
        for counts, one in ((self._trials, 1.0), (self._hits, float(is_hit)), (self._expected, estimate)):
            counts[place] += one
        if self._trials[place] >= MAX_TRIALS:
            for counts in (self._trials, self._hits, self._expected):
                counts[place] /= 2
        self._ratios[place] = self._hits[place] / self._expected[place]
