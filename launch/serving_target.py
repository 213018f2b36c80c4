"""The gateway that a benchmark talks to: one that runs already, or one that is started for it.

Owns the process that it started, and ends it. Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.http_load import Target
from rollout.errors import InvalidRequest, LongrollError

REPOSITORY = Path(__file__).resolve().parent.parent
KEY_VARIABLE = "LONGROLL_API_KEY"
NO_TARGETS = {"scheduler.admission.ttft_target_s": "null", "scheduler.admission.tpot_target_s": "null"}
STOP_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 30.0
_KEY = re.compile(r"\blr_[0-9a-f]{12}_[A-Za-z0-9_-]+")
_URL = re.compile(r"^serving .* on (http\S+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A gateway, and the process whose children serve behind it; pid 0: not known."""

    target: Target
    pid: int


@contextmanager
def serving(url: str | None, overrides: Sequence[str], pid: int = 0, *, has_targets: bool = True) -> Iterator[Served]:
    """The gateway at `url`, or one of the overrides' service, which is stopped afterwards.

    Args:
        url: Of a running gateway, whose key is in LONGROLL_API_KEY; None = start one.
        overrides: Of the service that is started, in Hydra's syntax.
        pid: Of the process that started the running one.
        has_targets: False starts a service that refuses nothing for the sake of targets, as overrides may do as well.

    Raises:
        InvalidRequest: A url without a key, or with overrides.
        LongrollError: It does not answer, or does not start.
    """
    if url is None:
        with _started(overrides, {} if has_targets else NO_TARGETS) as served:
            yield served
        return
    if overrides:
        raise InvalidRequest("argument", overrides[0], "no overrides for a gateway that runs already (url=…)")
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        raise InvalidRequest(KEY_VARIABLE, "nothing", f"an API key for {url}")
    yield Served(target=Target(url=url, key=key, model=served_model(url, key)), pid=pid)


def served_model(url: str, key: str) -> str:
    """Name of the first model that a gateway serves. Raises LongrollError if it does not say."""
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, ValueError, LookupError) as error:
        raise LongrollError(f"gateway at {url}: got {error!r}, expected a list of models") from error


@contextmanager
def _started(overrides: Sequence[str], more: Mapping[str, str]) -> Iterator[Served]:
    given = {override.partition("=")[0] for override in overrides}
    with tempfile.TemporaryDirectory(prefix="longroll-serving-") as folder:
        defaults = {"experiment": "tiny_grpo", "run_dir": folder, "gateway.port": "0", **more}
        arguments = [f"{name}={value}" for name, value in defaults.items() if name not in given]
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.serve", *arguments, *overrides],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            url, key = _wait_until_it_serves(process)
            yield Served(target=Target(url=url, key=key, model=served_model(url, key)), pid=process.pid)
        finally:
            _stop(process)


def _wait_until_it_serves(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Its URL and the key that it printed. Its own start has a limit (engine.start_timeout_s), so this needs none."""
    assert process.stdout is not None, "Popen was given a pipe"
    key, said = os.environ.get(KEY_VARIABLE, ""), deque[str](maxlen=20)
    for line in process.stdout:
        said.append(line)
        if found := _KEY.search(line):
            key = found.group()
        if serves := _URL.match(line.strip()):
            _read_on(process)
            return serves.group(1), key
    raise LongrollError("launch.serve: got an end before it served, expected it to start; it said:\n" + "".join(said))


def _read_on(process: subprocess.Popen[str]) -> None:
    """Let whatever it says further go, so that a full pipe never stops it."""
    threading.Thread(target=lambda: deque(process.stdout or (), maxlen=0), daemon=True).start()


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if process.poll() is None:
        process.kill()
        process.wait()
