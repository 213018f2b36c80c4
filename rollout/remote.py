"""Errors that crossed a process border, back in their own class, without importing Ray.

Ray raises a `RayTaskError` that also inherits from the cause and prints the whole remote traceback.
Callers want the cause: `except InvalidRequest` works either way, its message only this way.
"""

from __future__ import annotations

from rollout.errors import ServiceLost


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


def _class_names(error: BaseException) -> set[str]:
    return {cls.__name__ for cls in type(error).__mro__}
