"""Turns of threads: taken where the kernel knows them, and only by the thread that asks."""

import ctypes
import os
import platform
import struct
import sys
import threading

import pytest

from actors.vllm_plugin.turns import LONGEST_TURN_S, take_long_turns

_SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}


def turn_s() -> float:
    """Of the calling thread, as the kernel says; 0 before Linux 6.12."""
    got = ctypes.create_string_buffer(48)
    assert ctypes.CDLL(None).syscall(_SCHED_GETATTR[platform.machine()], 0, got, 48, 0) == 0
    return float(struct.unpack("<IIQiIQQQ", got.raw)[5]) / 1e9


def in_a_thread(work: object) -> list[object]:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(work()))  # type: ignore[operator]
    thread.start()
    thread.join()
    return found


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in _SCHED_GETATTR, reason="not Linux")
def test_a_thread_takes_long_turns_for_itself_and_keeps_its_priority() -> None:
    before = turn_s()

    def taken() -> tuple[bool, float, int]:
        priority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), priority + 1)
        done = take_long_turns()
        return done, turn_s(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) - priority

    ((done, turn, change),) = in_a_thread(taken)
    if not done:
        pytest.skip("a sandbox forbids it")
    assert change == 1
    assert turn in (pytest.approx(LONGEST_TURN_S), 0.0)
    assert turn_s() == before


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "pdp11")
    assert not take_long_turns()
