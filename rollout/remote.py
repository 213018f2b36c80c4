"""Errors that crossed a process border, back in their own class, without importing Ray.

Ray raises a `RayTaskError` that also inherits from the cause and prints the whole remote traceback.
Callers want the cause: `except InvalidRequest` works either way, its message only this way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from rollout.errors import ServiceLost

PATIENCE_S = 180.0  # a controller that hangs is only found after supervisor.hang_timeout_s
POLL_S = 0.5


def original_error(error: BaseException) -> BaseException:
    """Return what was raised remotely; any other exception is returned as it is."""
    cause = getattr(error, "cause", None)
    if "RayTaskError" in _class_names(error) and isinstance(cause, BaseException):
        return original_error(cause)
    return error


def client_error(error: BaseException) -> BaseException:
    """Like `original_error`; the death of the actor that was called becomes `ServiceLost`."""
    error = original_error(error)
    if "RayActorError" in _class_names(error):
        return ServiceLost(f"the rollout service is gone: {error}")
    return error


def find_again(find: Callable[[], Any], lost: Any, error: BaseException, patience_s: float = PATIENCE_S) -> Any:
    """Wait for an actor that takes the place of one that was lost.

    Args:
        find: Returns the actor of that name; raises ValueError while there is none.
        lost: The one that is gone.
        error: Raised when nobody has taken its place in time.
        patience_s: Longest wait.
    """
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        with contextlib.suppress(ValueError):
            found = find()
            if found != lost:
                return found
        time.sleep(POLL_S)
    raise error


def _class_names(error: BaseException) -> set[str]:
    return {cls.__name__ for cls in type(error).__mro__}
