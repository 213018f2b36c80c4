"""The gateway of a benchmark: what a started one says, and what is refused before anything starts."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from launch import bench_locust, bench_parallel, bench_serving, device_memory, first_token
from launch.serving_target import KEY_VARIABLE, _wait_until_it_serves, served_model, serving
from rollout.errors import InvalidRequest, LongrollError

KEY = "lr_0123456789ab_" + "x" * 43
SAYS = f"""
import time
print("API key of the operator, shown this once: {KEY}", flush=True)
print("serving models/tiny on http://127.0.0.1:18000", flush=True)
for _ in range(100_000):
    print("more than a pipe holds", flush=True)
"""


def started(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_finds_address_and_key_and_keeps_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    process = started(SAYS)
    assert _wait_until_it_serves(process) == ("http://127.0.0.1:18000", KEY)
    assert process.wait(timeout=30) == 0


def test_a_service_that_does_not_start_says_why() -> None:
    with pytest.raises(LongrollError, match="no GPU to be had"):
        _wait_until_it_serves(started("print('error: no GPU to be had'); raise SystemExit(1)"))


class Models(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        is_fit = self.path == "/v1/models" and self.headers["Authorization"] == "Bearer k"
        self.send_response(200 if is_fit else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "tiny"}]} if is_fit else {}).encode())

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def gateway() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Models) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_running_gateway_is_asked_for_its_model(gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "k")
    with serving(gateway, [], pid=5) as served:
        assert (served.target.model, served.target.key, served.pid) == ("tiny", "k", 5)
    for url, key in ((gateway, "wrong"), ("http://127.0.0.1:9", "k")):
        with pytest.raises(LongrollError, match="expected a list of models"):
            served_model(url, key)


def test_a_running_gateway_needs_a_key_and_takes_no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "k")
    with pytest.raises(InvalidRequest, match="overrides"), serving("http://127.0.0.1:9", ["engine.num_shards=1"]):
        pass
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(InvalidRequest, match=KEY_VARIABLE), serving("http://127.0.0.1:9", []):
        pass


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (bench_parallel, ["lengths=64"]),
        (bench_parallel, ["url=http://127.0.0.1:9", "concurrency=a"]),
        (bench_serving, ["lengths=64:64:64"]),
        (bench_serving, ["durations=3"]),
        (bench_locust, ["users=many"]),
        (device_memory, ["pid=4194305"]),  # above the largest pid of Linux
        (device_memory, ["interval=1", "no=such"]),
        (first_token, ["repeats=x"]),
    ],
)
def test_bad_arguments_end_before_anything_starts(command, arguments, capsys) -> None:  # type: ignore[no-untyped-def]
    assert command.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")
