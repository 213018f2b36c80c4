"""Calls of one actor to another over a line, instead of through Ray, where somebody waits for every millisecond.

A call goes over the line to its actor if there is one, and through Ray until it is open or if it cannot be. Calls over
one line begin in the order in which they were made. A line that breaks takes its calls with it; whether the actor is
gone as well is asked of Ray, whose error is then the call's. Frames are pickled tuples.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import pickle
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from actors.line import connect, read_frame, write_frame
from rollout.errors import LongrollError

logger = logging.getLogger(__name__)
CALLS = "calls"  # what the line is called at an actor
RETRY_S = 30.0


class LineBroken(LongrollError):
    """A line to an actor that lives on broke, and the answer to a call with it."""


class CallServer:
    """The called actor's end; a handler of its line server.

    Args:
        methods: What may be called, by name.
    """

    def __init__(self, methods: Mapping[str, Callable[..., Awaitable[Any]]]) -> None:
        self._methods = dict(methods)
        self._under_way: set[asyncio.Task[None]] = set()  # a call goes on when its caller is gone, as one through Ray

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            number, method, arguments = pickle.loads(await read_frame(reader))
            task = asyncio.create_task(self._answer(writer, number, method, arguments))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def _answer(self, writer: asyncio.StreamWriter, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            answer = (number, True, await self._methods[method](*arguments))
        except LongrollError as error:
            answer = (number, False, error)
        except Exception as error:  # whatever it is, it belongs to the caller
            logger.exception("call of %s failed", method)
            answer = (number, False, LongrollError(f"{type(error).__name__}: {error}"))
        if not writer.is_closing():
            write_frame(writer, pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))


class _CallLine:
    """An open line."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self.task = asyncio.create_task(self._receive(reader))

    async def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        number = next(self._numbers)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        write_frame(self._writer, pickle.dumps((number, method, arguments), pickle.HIGHEST_PROTOCOL))
        try:
            return await future
        finally:
            self._waiting.pop(number, None)

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        reason = "closed"
        try:
            while True:
                number, is_good, answer = pickle.loads(await read_frame(reader))
                future = self._waiting.get(number)
                if future is None or future.done():
                    continue
                if is_good:
                    future.set_result(answer)
                else:
                    future.set_exception(answer)
        except (OSError, EOFError) as error:
            reason = f"{type(error).__name__}: {error}"
        finally:
            self._writer.close()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(LineBroken(f"a line to an actor broke: {reason}"))


class CallLines:
    """The calling actor's end: a line to every actor that it has called."""

    def __init__(self) -> None:
        self._lines: dict[Any, _CallLine] = {}
        self._opening: dict[Any, asyncio.Task[None]] = {}
        self._failed_at: dict[Any, float] = {}

    @property
    def num_open(self) -> int:
        """Lines that calls go over."""
        return sum(not line.task.done() for line in self._lines.values())

    async def call(self, actor: Any, method: str, *arguments: Any) -> Any:
        """Call a method of an actor. Raises what it raised, or Ray's errors, or LineBroken."""
        line = self._lines.get(actor)
        if line is not None and not line.task.done():
            try:
                return await line.call(method, arguments)
            except LineBroken:
                await actor.line_address.remote()  # raises what Ray knows of an actor that is gone
                raise
        if actor not in self._opening and time.monotonic() - self._failed_at.get(actor, -RETRY_S) >= RETRY_S:
            self._opening[actor] = asyncio.create_task(self._open(actor))
        return await getattr(actor, method).remote(*arguments)

    def close(self) -> None:
        """End all lines."""
        for task in (*self._opening.values(), *(line.task for line in self._lines.values())):
            task.cancel()

    async def _open(self, actor: Any) -> None:
        for gone in [other for other, line in self._lines.items() if line.task.done()]:
            del self._lines[gone]
        try:
            reader, writer = await connect(await actor.line_address.remote(), CALLS)
            self._lines[actor] = _CallLine(reader, writer)
            self._failed_at.pop(actor, None)
        except Exception as error:  # calls go on through Ray
            self._failed_at[actor] = time.monotonic()
            logger.warning("no line to %r, calls go through Ray: %r", actor, error)
        finally:
            del self._opening[actor]
