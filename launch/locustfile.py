"""Locust's users of the gateway: streamed completions, with TTFT, TPOT and tokens as figures of their own.

    LONGROLL_API_KEY=… locust -f launch/locustfile.py --host http://127.0.0.1:8000 --users 32 --spawn-rate 32

Every user sends one completion after another. Beside the request itself, whose response time is that of the whole
answer, Locust shows "TTFT" and "TPOT" in milliseconds, and "tokens" with the number of generated tokens as its length.
`launch.bench_locust` runs it and writes a record.
"""

from __future__ import annotations

import os
import random
import time
from typing import Any

import gevent
from locust import HttpUser, events, task

from launch.http_load import DONE, FIRST_TOKEN, LAST_TOKEN, EventReader, Progress

PATH = "/v1/completions"


@events.init_command_line_parser.add_listener
def add_options(parser: Any, **_: Any) -> None:
    """What Locust does not know of: lengths, in tokens."""
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens of every prompt")
    parser.add_argument("--output-tokens", type=int, default=64, help="tokens of every answer")


@events.init.add_listener
def wind_the_clock(**_: Any) -> None:
    """gevent's clock stood still while modules were imported, and --run-time would count from before that."""
    gevent.get_hub().loop.update_now()


class Completions(HttpUser):
    """One stream after another, without a pause."""

    def on_start(self) -> None:
        self.client.headers["Authorization"] = f"Bearer {os.environ['LONGROLL_API_KEY']}"
        self._model = self.client.get("/v1/models").json()["data"][0]["id"]
        self._options = self.environment.parsed_options

    @task
    def complete(self) -> None:
        body = {
            "model": self._model,
            "prompt": [random.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(self._options.prompt_tokens)],
            "max_tokens": self._options.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began, progress = time.perf_counter(), Progress()
        with self.client.post(PATH, json=body, stream=True, catch_response=True) as answer:
            if answer.status_code != 200:
                answer.failure(f"HTTP {answer.status_code}: {answer.text[:200]}")
                return
            reader = EventReader()
            for chunk in answer.iter_content(chunk_size=None):
                now_s = time.perf_counter() - began
                for data in reader.feed(chunk):
                    progress.take(data, now_s)
            if progress.error is not None or not progress.is_done or progress.first_s is None:
                answer.failure(progress.error or f"the stream ended without {DONE.decode()}")
                return
            answer.success()
        assert progress.last_s is not None, "a stream with a first token has a last one"
        self._tell("TTFT", 1e3 * progress.first_s)
        if progress.num_tokens > 1:
            self._tell("TPOT", 1e3 * (progress.last_s - progress.first_s) / (progress.num_tokens - 1))
        self._tell("tokens", 1e3 * progress.last_s, progress.num_tokens)

    def _tell(self, name: str, milliseconds: float, length: int = 0) -> None:
        self.environment.events.request.fire(
            request_type="stream",
            name=name,
            response_time=milliseconds,
            response_length=length,
            exception=None,
            context={},
        )
