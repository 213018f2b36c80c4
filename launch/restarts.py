"""What becomes of a run whose trainer ranks die: they are started anew, unless that gets nowhere.

Owns the counts of this process; the run's progress is its history's. Starts nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from launch.history import History
from launch.monitor import Monitor
from rollout.config import SupervisorConfig
from rollout.errors import TrainerDead

Q = TypeVar("Q")
A = TypeVar("A")
MAX_FUTILE = 3  # starts in a row without a step: what kills the ranks is not chance


class Once(Generic[Q, A]):
    """A question that is asked once, and answered the same from then on."""

    def __init__(self, answer: Callable[[Q], A]) -> None:
        self._answer = answer
        self._known: list[A] = []

    def ask(self, question: Q) -> A:
        if not self._known:
            self._known.append(self._answer(question))
        return self._known[0]

    @property
    def value(self) -> A:
        """The answer; it must have been asked."""
        return self._known[0]


class TrainerDeaths:
    """Counts deaths of the trainer ranks and says when to give up.

    Args:
        config: Whether anything is started anew at all.
        history: Of the run; its length is its progress.
        monitor: Told of every death.
    """

    def __init__(self, config: SupervisorConfig, history: History, monitor: Monitor) -> None:
        self._config, self._history, self._monitor = config, history, monitor
        self.num_restarts = 0
        self._num_futile = 0
        self._furthest = 0

    def note(self, error: TrainerDead) -> None:
        """The ranks are dead. Returns if they are to be started anew.

        Raises:
            TrainerDead: They are not: nothing is supervised, or they died over and over without a step between.
        """
        step = self._history.steps[-1].step if self._history.steps else 0
        self._num_futile = 0 if step > self._furthest else self._num_futile + 1
        self._furthest = max(self._furthest, step)
        if not self._config.enabled or self._num_futile > MAX_FUTILE:
            raise error
        self.num_restarts += 1
        self._monitor.say(f"the trainer is dead, starting its ranks anew from the newest checkpoint: {error}")
