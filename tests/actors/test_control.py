"""The line between an actor and its workers, over a real socket, without an engine."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import time
from multiprocessing.connection import Client, Connection

import pytest

from actors.vllm_plugin.control import NICENESS, ControlLine, ControlServer
from rollout.errors import EngineDead, SyncRefused


def refuse() -> None:
    raise SyncRefused("no")


def test_results_and_errors_come_back_in_their_own_class() -> None:
    line = ControlLine(*ControlServer({"add": lambda a, b: a + b, "refuse": refuse}).line, "worker 0")
    assert asyncio.run(line.call("add", 2, 3, timeout_s=10)) == 5
    with pytest.raises(SyncRefused, match="no"):
        asyncio.run(line.call("refuse", timeout_s=10))
    with pytest.raises(KeyError):
        asyncio.run(line.call("unknown", timeout_s=10))
    assert asyncio.run(line.call("add", 4, 5, timeout_s=10)) == 9, "the line goes on after errors"
    line.close()


def test_calls_do_not_wait_for_each_other_and_a_slow_one_times_out() -> None:
    gate = threading.Event()
    line = ControlLine(*ControlServer({"wait": gate.wait, "quick": lambda: 1}).line, "worker 0")

    async def both() -> None:
        slow = asyncio.create_task(line.call("wait", 60.0, timeout_s=0.2))
        assert await line.call("quick", timeout_s=10) == 1
        with pytest.raises(TimeoutError, match=r"no answer to wait within 0\.2 s"):
            await slow
        assert await line.call("quick", timeout_s=10) == 1

    asyncio.run(both())
    gate.set()
    line.close()


def test_bulk_work_has_a_low_priority_and_nothing_else() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    line = ControlLine(*ControlServer({"bulk": priority, "quick": priority}, bulk=("bulk",)).line, "worker 0")
    assert asyncio.run(line.call("quick", timeout_s=10)) == priority()
    assert asyncio.run(line.call("bulk", timeout_s=10)) == min(priority() + NICENESS, 19)  # the least there is
    line.close()


def test_a_stranger_without_the_key_is_turned_away() -> None:
    address, key = ControlServer({"quick": lambda: 1}).line
    with pytest.raises(multiprocessing.AuthenticationError):
        Client(address, "AF_UNIX", authkey=b"wrong")
    line = ControlLine(address, key, "worker 0")
    assert asyncio.run(line.call("quick", timeout_s=10)) == 1
    line.close()


def serve(sender: Connection) -> None:
    server = ControlServer({"die": lambda: os._exit(1)})
    sender.send(server.line)
    time.sleep(60)


def test_a_death_is_seen_at_once() -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=serve, args=(sender,), daemon=True)
    process.start()
    line = ControlLine(*receiver.recv(), "worker 0")
    began = time.monotonic()
    with pytest.raises(EngineDead, match="worker 0: its worker is gone"):
        asyncio.run(line.call("die", timeout_s=60))
    assert time.monotonic() - began < 30, "long before the time limit of the call"
    process.join()
    line.close()
