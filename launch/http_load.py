"""One streamed completion over HTTP, and when its tokens came: what the benchmarks of the gateway send and keep.

Owns the request, the reading of server-sent events and the record of one request. Knows nothing of rates, runs or
targets.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import aiohttp

FIRST_TOKEN, LAST_TOKEN = 5, 500
"""Prompts are drawn from these ids: ordinary tokens of every vocabulary used here."""
TIMEOUT_S = 600.0
DONE = b"[DONE]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A running gateway. `model` is the name it serves under, `key` an API key of the role client."""

    url: str
    key: str
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One completion: token ids of the prompt, and how many tokens to generate, the model's end token ignored."""

    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one request; times in seconds from the beginning of the run.

    Attributes:
        planned_s, sent_s: When it should have been sent, and when it was.
        first_s, last_s: When its first and its last token came; None where none came.
        num_tokens: Generated, as the answer's usage says.
        wanted_tokens: That were asked for.
        status: Of HTTP; None where no answer came.
        retry_after_s: What a refusal said about when to come again.
        error: Why it failed; None for what was answered in full or refused with 429.
    """

    planned_s: float
    sent_s: float
    end_s: float
    first_s: float | None = None
    last_s: float | None = None
    num_tokens: int = 0
    wanted_tokens: int
    status: int | None = None
    retry_after_s: float | None = None
    error: str | None = None

    @property
    def is_refused(self) -> bool:
        return self.status == 429

    @property
    def is_good(self) -> bool:
        """Answered in full."""
        return self.status == 200 and self.error is None

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from sending."""
        return None if self.first_s is None else self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first, as vLLM's benchmark client defines it."""
        if self.first_s is None or self.last_s is None or self.num_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_tokens - 1)


class EventReader:
    """Server-sent events out of chunks of bytes that may end anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of every event that is complete now."""
        *whole, self._rest = (self._rest + chunk).split(b"\n\n")
        return [event[6:] for event in whole if event.startswith(b"data: ")]


@dataclass(slots=True)
class Progress:
    """What the events of one answer have said so far; times as the caller counts them."""

    first_s: float | None = None
    last_s: float | None = None
    num_tokens: int = 0
    error: str | None = None
    is_done: bool = False

    def take(self, data: bytes, now_s: float) -> None:
        """Take in an event's data. Raises ValueError if it is none of the gateway's."""
        # Tokens come in events by the thousand and are told apart without reading them: the client shares its machine.
        if data == DONE:
            self.is_done = True
        elif b'"choices": [{' in data:
            self.first_s = now_s if self.first_s is None else self.first_s
            self.last_s = now_s
        else:
            self._take_rest(data)

    def _take_rest(self, data: bytes) -> None:
        record = json.loads(data)
        if record.get("error"):
            self.error = str(record["error"].get("message", record["error"]))
        elif record.get("choices"):
            raise ValueError(f"event: got {data[:80]!r}, expected choices written as the gateway writes them")
        elif record.get("usage"):
            self.num_tokens = int(record["usage"]["completion_tokens"])


def ask_stream(prompt_tokens: int, max_tokens: int, seed: str) -> Iterator[Ask]:
    """Requests without end whose prompts have nothing in common, so that no prefix is cached. Seeds must differ too."""
    draw = random.Random(f"{seed}/{prompt_tokens}/{max_tokens}")
    while True:
        prompt = tuple(draw.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(prompt_tokens))
        yield Ask(prompt_token_ids=prompt, max_tokens=max_tokens, seed=draw.randrange(2**31))


def random_asks(num: int, prompt_tokens: int, max_tokens: int, seed: str) -> list[Ask]:
    """The first so many of `ask_stream`."""
    return list(islice(ask_stream(prompt_tokens, max_tokens, seed), num))


def session() -> aiohttp.ClientSession:
    """For one run; as many connections as there are requests."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)
    )


async def send(
    http: aiohttp.ClientSession, target: Target, ask: Ask, now: Callable[[], float], planned_s: float | None = None
) -> Outcome:
    """Send one request and read its answer to the end. Never raises: what went wrong is in the outcome.

    Args:
        now: Seconds from the beginning of the run.
        planned_s: When it should have been sent; None: whenever there was room.
    """
    body = {
        "model": target.model,
        "prompt": list(ask.prompt_token_ids),
        "max_tokens": ask.max_tokens,
        "seed": ask.seed,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Authorization": f"Bearer {target.key}"}
    sent_s, status, retry_after, stream = now(), None, None, Progress()
    try:
        async with http.post(f"{target.url}/v1/completions", json=body, headers=headers) as answer:
            status, retry_after = answer.status, answer.headers.get("Retry-After")
            if status == 200:
                reader = EventReader()
                async for chunk in answer.content.iter_any():
                    now_s = now()
                    for data in reader.feed(chunk):
                        stream.take(data, now_s)
            elif status != 429:
                stream.error = (await answer.text())[:200]
    except (TimeoutError, aiohttp.ClientError, ValueError) as error:
        stream.error = f"{type(error).__name__}: {error}"
    if status == 200 and stream.error is None and (not stream.is_done or stream.num_tokens != ask.max_tokens):
        stream.error = f"answer: got {stream.num_tokens} tokens, done = {stream.is_done}, expected {ask.max_tokens}"
    return Outcome(
        planned_s=sent_s if planned_s is None else planned_s,
        sent_s=sent_s,
        end_s=now(),
        first_s=stream.first_s,
        last_s=stream.last_s,
        num_tokens=stream.num_tokens,
        wanted_tokens=ask.max_tokens,
        status=status,
        retry_after_s=None if retry_after is None else float(retry_after),
        error=stream.error,
    )
