"""Operational failures, as a small tree of exceptions that survive pickling between processes.

A caller's mistake is a `ValueError` (here `InvalidRequest`, which names what was wrong, what was
got and what was expected). Everything else that can go wrong while serving is a `LongrollError`.
"""

from __future__ import annotations


class LongrollError(Exception):
    """Root of the operational errors."""


class InvalidRequest(LongrollError, ValueError):
    """The caller asked for something impossible; nothing was queued or changed.

    Args:
        what: The field or object that is wrong.
        got: What was received (its repr is shown, shortened).
        expected: What would have been accepted.
    """

    def __init__(self, what: str, got: object, expected: str) -> None:
        super().__init__(what, got, expected)
        self.what, self.got, self.expected = what, got, expected

    def __str__(self) -> str:
        got = self.got if isinstance(self.got, str) else repr(self.got)
        got = got if len(got) <= 200 else got[:197] + "..."
        return f"{self.what}: got {got}, expected {self.expected}"


def check_positive(section: str, **values: float) -> None:
    """Raise InvalidRequest for the first option of a configuration section that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise InvalidRequest(f"{section}.{name}", value, "a number > 0")


class QueueFull(LongrollError):
    """A submission would put more trajectories under way than allowed, or wait too long; nothing was queued.

    Args:
        message: What was asked for, and what is allowed.
        retry_after_s: When there may be room; None if nobody can tell.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class EngineDead(LongrollError):
    """An inference engine of the fleet is gone; its requests must go elsewhere."""


class ServiceLost(LongrollError):
    """The rollout service itself is gone or cannot be reached."""


class SyncRefused(LongrollError):
    """A weight publication was refused; the old version goes on serving."""


class RewardFailed(LongrollError):
    """A reward function raised or ran out of time; the trajectory is failed with this reason."""


class UnknownHandle(LongrollError, KeyError):
    """A rollout handle that this controller does not hold (never issued, closed or expired)."""

    def __str__(self) -> str:
        return f"rollout handle: got {self.args[0]!r}, expected one returned by submit() and not closed"


class CheckpointBroken(LongrollError):
    """The newest checkpoint is incomplete, damaged, or of another number of ranks; nothing was loaded."""


class TrainerDead(LongrollError):
    """A trainer rank died, failed or fell silent; the group was stopped and must be started again."""


class RoutingBroken(LongrollError):
    """Recorded expert routing is damaged, or not that of the tokens it is kept for."""


class MismatchOverBudget(LongrollError):
    """Sampling and training disagree by more than the configured budget, and the run is to stop for it."""
