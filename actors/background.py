"""Work in a thread that may never come back: a collective whose peer died, a call whose answer is lost.

Unlike an executor's, these threads hold nobody up: not the caller, not the end of the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(name: str, action: Callable[[], T]) -> Future[T]:
    """Run an action in a daemon thread of its own; the future carries what it returns or raises."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            result = action()
        except BaseException as error:  # it belongs to whoever asks the future
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future
