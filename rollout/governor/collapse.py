"""The alarm: acceptance of a source that fell at a weight sync.

For each source and version a sequential test (Wald, 1945) of two rates of first-layer acceptance, both as shares of
what was seen before the sync: the least that is tolerated against a collapse. Its likelihood ratio is, for every rate
from the tolerated one up, a non-negative supermartingale that starts at 1, so by Ville's inequality

    P(it ever reaches 1 / alarm_probability) ≤ alarm_probability,

however long one looks. Requests of a step, and steps in a row, are not independent: the ratio's logarithm is divided
by the dispersion of earlier blocks over the binomial one, which keeps the bound where they are independent (a power
below 1 of a martingale is a supermartingale) and restores it, to second order, where they are not. The rate before is
taken at its lower confidence bound. What is expected of a trial follows its number of siblings.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from rollout.governor.config import GovernorConfig
from rollout.governor.records import Alarm
from rollout.governor.tally import Tally
from rollout.speculation_config import MAX_WIDTH

MIN_BEFORE = 64.0  # trials before a sync, without which there is nothing to compare with
CONFIDENCE = 2.0  # standard errors below what was seen before
BLOCK_STEPS = 16  # whose sums show how dependent trials are
BLOCK_MEMORY = 32.0  # blocks
MAX_BLOCK = 16.0  # a single block's squared deviation counts at most so much
MAX_TESTED = 4096.0  # trials after which a version has passed
RECOVERY_TRIALS = 48  # latest trials that must be as good as tolerated


class SourceWatch:
    """Owns one source's acceptance before and after the latest sync.

    Args:
        source: Its name.
        memory_trials: Trials that make up "before".
    """

    def __init__(self, source: str, config: GovernorConfig) -> None:
        self.source, self._config = source, config
        self._trials, self._hits = np.zeros(MAX_WIDTH), np.zeros(MAX_WIDTH)  # of the first layer, by rank; decaying
        self._before = np.zeros(MAX_WIDTH)  # chances by rank, at the lower bound, when the test began
        self._seen_before = 0.0  # the same together, not lowered
        self._dispersion = 1.0
        self._block = np.zeros(3)  # trials, expected hits, hits
        self._block_steps = 0
        self._is_testing = False
        self._log_ratio = 0.0
        self._tested = np.zeros(2)  # trials, hits
        self._latest: deque[tuple[float, float, float]] = deque()  # after an alarm: trials, expected hits, hits
        self.is_suspended = False

    @property
    def is_suspected(self) -> bool:
        """Whether what was seen since the sync speaks for a collapse, and not yet clearly enough."""
        return self._is_testing and self._log_ratio > 0

    def begin_version(self) -> None:
        """The weights changed. A source that was off is given another chance, judged by what it was before it fell."""
        if not self.is_suspended and self._trials[0] >= MIN_BEFORE:
            chances = self._hits / np.maximum(self._trials, 1.0)
            rate = float(chances.sum())
            error = math.sqrt(max(rate * (1 - rate), 0.0) / self._trials[0])
            lowered = max(0.0, 1 - CONFIDENCE * error / rate) if rate > 0 else 0.0
            self._before, self._seen_before = chances * lowered, rate
        self.is_suspended = False
        self._latest.clear()
        self._is_testing = float(self._before.sum()) > 0
        self._log_ratio = 0.0
        self._tested = np.zeros(2)

    def learn(self, tally: Tally, version: int) -> Alarm | None:
        """One step's drafts of the source."""
        trials, hits = tally.trials[0], tally.hits[0]
        num_trials, num_hits = float(trials[0]), float(hits.sum())
        if not num_trials:
            return None
        if self.is_suspended:
            self._try_recovery(num_trials, float(trials @ self._before), num_hits)
            return None
        alarm = None
        if self._is_testing:
            alarm = self._test(num_trials, float(trials @ self._before) / num_trials, num_hits, version)
        if alarm is None:
            self._remember(trials, hits)
        return alarm

    def _test(self, num_trials: float, before: float, num_hits: float, version: int) -> Alarm | None:
        tolerated = min(before * self._config.tolerated_drop, 0.999)
        collapsed = before * self._config.collapsed_drop
        if not 0 < collapsed:
            return None
        ratio = num_hits * math.log(collapsed / tolerated)
        ratio += (num_trials - num_hits) * math.log((1 - collapsed) / (1 - tolerated))
        self._log_ratio += ratio / self._dispersion
        self._tested += (num_trials, num_hits)
        if self._log_ratio >= -math.log(self._config.alarm_probability):
            self.is_suspended, self._is_testing = True, False
            # What is known from before stays the yardstick; the fallen source starts to be known anew.
            self._trials[:] = self._hits[:] = 0
            self._block[:] = self._block_steps = 0
            return Alarm(
                source=self.source,
                version=version,
                before=self._seen_before,
                after=float(self._tested[1] / self._tested[0]),
                num_trials=int(self._tested[0]),
            )
        self._is_testing = self._tested[0] < MAX_TESTED
        return None

    def _try_recovery(self, num_trials: float, expected: float, num_hits: float) -> None:
        self._latest.append((num_trials, expected, num_hits))
        while sum(trials for trials, _, _ in self._latest) - self._latest[0][0] >= RECOVERY_TRIALS:
            self._latest.popleft()
        trials, expected, hits = (sum(column) for column in zip(*self._latest, strict=True))
        if trials >= RECOVERY_TRIALS and hits >= self._config.tolerated_drop * expected:
            self.is_suspended = False
            self._latest.clear()

    def _remember(self, trials: np.ndarray, hits: np.ndarray) -> None:
        if self._trials[0] >= MIN_BEFORE:
            chances = self._hits / np.maximum(self._trials, 1.0)
            self._block += (trials[0], float(trials @ chances), hits.sum())
            self._block_steps += 1
            if self._block_steps == BLOCK_STEPS:
                self._close_block()
        decay = math.exp(-float(trials[0]) / self._config.memory_trials)
        self._trials *= decay
        self._trials += trials
        self._hits *= decay
        self._hits += hits

    def _close_block(self) -> None:
        num_trials, expected, num_hits = (float(x) for x in self._block)
        rate = expected / num_trials
        variance = expected * (1 - rate)
        if variance > 0:
            squared = min((num_hits - expected) ** 2 / variance, MAX_BLOCK)
            # Never below 1: fewer surprises than a binomial's are no reason to be quicker.
            self._dispersion = max(1.0, self._dispersion + (squared - self._dispersion) / BLOCK_MEMORY)
        self._block[:] = 0
        self._block_steps = 0
