"""A private line from a shard's actor to its workers, beside vLLM's engine loop.

vLLM's remote calls run between two steps and hold the loop until they return, so staging through them
would cost a step for every message. Here each worker listens on a Unix socket in threads of its own; the
actor calls methods of one object by name. A worker that dies closes its end, which the actor sees at once.
Knows nothing of what the methods do.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from rollout.errors import EngineDead, LongrollError

logger = logging.getLogger(__name__)
KEY_BYTES = 32
MAX_CALLS = 8  # at once to one worker; more wait
NICENESS = 10  # added in the thread that does bulk work: on a CPU it shares a core with the forward, which comes first


class ControlServer:
    """The worker's end: serves calls until the process ends, each connection in a daemon thread.

    Args:
        methods: What may be called, by name. Must be safe to call from several threads.
        bulk: Names of those that take long and hold nothing that a forward waits for. They run one after another in
            a thread of low priority. The others keep the process's: one that holds a lock of the forward and is not
            given a core would stall it for as long as others compute.
    """

    def __init__(self, methods: Mapping[str, Callable[..., Any]], bulk: Collection[str] = ()) -> None:
        self._methods, self._bulk = dict(methods), frozenset(bulk)
        self._patient = ThreadPoolExecutor(1, thread_name_prefix="longroll-bulk", initializer=_lower_priority)
        self._key = secrets.token_bytes(KEY_BYTES)
        self._listener = Listener(None, "AF_UNIX", backlog=MAX_CALLS, authkey=self._key)
        threading.Thread(target=self._accept, name="longroll-control", daemon=True).start()

    @property
    def line(self) -> tuple[str, str]:
        """Address and key (hexadecimal), for `ControlLine`."""
        return str(self._listener.address), self._key.hex()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except Exception:  # a stranger without the key, or a caller that died while it connected
                logger.info("control line: refused a connection", exc_info=True)
                continue
            threading.Thread(target=self._serve, args=(connection,), name="longroll-control", daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        with connection:
            while True:
                try:
                    method, arguments = connection.recv()
                except (EOFError, OSError):
                    return
                try:
                    answer = (True, self._do(method, arguments))
                except Exception as error:  # whatever it is, it belongs to the caller
                    if not isinstance(error, LongrollError):
                        logger.exception("control call %s failed", method)
                    answer = (False, error)
                connection.send(answer)

    def _do(self, method: str, arguments: tuple[Any, ...]) -> Any:
        if method in self._bulk:
            return self._patient.submit(self._methods[method], *arguments).result()
        return self._methods[method](*arguments)


def _lower_priority() -> None:
    if sys.platform == "linux":  # where a thread has a priority of its own
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)


class ControlLine:
    """The actor's end of the line to one worker; up to `MAX_CALLS` calls at once.

    Args:
        address: Where the worker listens.
        key: Its key, hexadecimal.
        who: Names the worker in errors.
    """

    def __init__(self, address: str, key: str, who: str) -> None:
        self._address, self._key, self._who = address, bytes.fromhex(key), who
        self._threads = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="longroll-line")
        self._local = threading.local()

    async def call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Call a method of the worker.

        Raises:
            EngineDead: The worker is gone.
            TimeoutError: It did not answer in time, which it may do yet.
            Exception: Whatever the method raised.
        """
        running = asyncio.get_running_loop().run_in_executor(self._threads, self._call, method, arguments)
        try:
            return await asyncio.wait_for(running, timeout_s)
        except TimeoutError:
            raise TimeoutError(f"{self._who}: no answer to {method} within {timeout_s:g} s") from None

    def _call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        try:
            connection = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = Client(self._address, "AF_UNIX", authkey=self._key)
            connection.send((method, arguments))
            is_good, answer = connection.recv()
        except (EOFError, OSError) as error:
            self._local.connection = None
            raise EngineDead(f"{self._who}: its worker is gone ({type(error).__name__})") from error
        if is_good:
            return answer
        raise answer

    def close(self) -> None:
        """Make no more calls; those under way end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)
