"""Malformed requests by the thousand against a running gateway, which must refuse them all and go on serving.

    LONGROLL_API_KEY=… python -m launch.fuzz_gateway url=http://127.0.0.1:8000 requests=10000 seed=1

Half are drawn by schemathesis from the gateway's own OpenAPI document so as to break it; half are bytes that no
document describes: damaged JSON, endless nesting, odd paths, methods and headers. A fault is an answer of 500 or
above, an error that is not in OpenAI's form, one that holds a text which it must not, or no answer. Exit code 0 if
there is none and the gateway is healthy afterwards.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from launch.arguments import split_arguments
from rollout.errors import InvalidRequest, LongrollError

KEY_VARIABLE = "LONGROLL_API_KEY"
TIMEOUT_S = 60.0
MAX_SHOWN = 20
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "NONSENSE")
PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/rollouts",
    "/v1/rollouts/lease",
    "/v1/rollouts/replay",
    "/v1/rollouts/../../metrics",
    "/v1/rollouts/%00",
    "/v1/rollouts/0-00000000000000000000000000000000",
    "/v1/models/%2e%2e/%2e%2e/etc/passwd",
    "/v1/weights/rollback",
    "/dashboard/feed?order=nonsense&cell=-1",
    "/dashboard/assets/..%2f..%2fgateway.py",
    "//",
    "/%ff%fe",
)
BODY = {"prompt": [1, 2, 3], "max_tokens": 1, "messages": [{"role": "user", "content": "a"}], "group_ids": ["a"]}


@dataclass(slots=True)
class FuzzReport:
    """What came back. `faults` says of each what was sent and what was wrong."""

    num_requests: int = 0
    by_status: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def take(self, sent: str, answer: httpx.Response, forbidden: Sequence[str]) -> None:
        """Look at an answer."""
        self.num_requests += 1
        self.by_status[answer.status_code] += 1
        if answer.status_code >= 500:
            self.faults.append(f"{sent}: got {answer.status_code} {answer.text[:200]}")
        elif any(text in answer.text for text in forbidden):
            self.faults.append(f"{sent}: got an answer that tells what it must not")
        elif answer.status_code >= 400 and answer.request.method != "HEAD" and not _is_error_object(answer):
            self.faults.append(
                f"{sent}: got {answer.status_code} {answer.text[:200]!r}, expected OpenAI's error object"
            )


def _is_error_object(answer: httpx.Response) -> bool:
    if not answer.headers.get("x-request-id"):
        return answer.text.startswith("Invalid HTTP request")  # the server's own word on what is not HTTP
    try:
        return set(answer.json()["error"]) == {"message", "type", "param", "code"}
    except (ValueError, LookupError, TypeError):
        return False


def fuzz(url: str, key: str, num_requests: int, seed: int, forbidden: Sequence[str] = ()) -> FuzzReport:
    """Send so many malformed requests, one after another.

    Args:
        url: Of the gateway.
        key: An API key of the role operator, so that no request ends at the door.
        num_requests: At least so many.
        seed: Of everything that is drawn.
        forbidden: Texts that no answer may hold.
    """
    report = FuzzReport()
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S) as http:
        document = http.get("/openapi.json").json()
        _send_drawn(http, document, num_requests // 2, seed, report, forbidden)
        draw = random.Random(seed)
        while report.num_requests < num_requests:
            _send_raw(http, draw, report, forbidden)
    return report


def _send_drawn(
    http: httpx.Client,
    document: dict[str, Any],
    num_requests: int,
    seed: int,
    report: FuzzReport,
    forbidden: Sequence[str],
) -> None:
    """Requests that break the document, as many for each operation that can be broken."""
    import schemathesis
    from schemathesis.core.result import Ok
    from schemathesis.generation.modes import GenerationMode

    schema = schemathesis.openapi.from_dict(document)
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    open_to_malice = [o for o in operations if o.body or o.path_parameters or o.query]
    for operation in open_to_malice:
        strategy = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
        examples = settings(
            max_examples=max(1, num_requests // len(open_to_malice)),
            phases=(Phase.generate,),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        seeded(seed)(examples(given(case=strategy)(_sender(http, operation.label, report, forbidden))))()


def _sender(http: httpx.Client, label: str, report: FuzzReport, forbidden: Sequence[str]) -> Callable[[Any], None]:
    """Sends the cases that are drawn for one operation."""

    def send(case: Any) -> None:
        request = _for_httpx(case.as_transport_kwargs(base_url=str(http.base_url)))
        _send(http, label, report, forbidden, lambda: http.request(**request))

    return send


def _for_httpx(request: dict[str, Any]) -> dict[str, Any]:
    """A request as schemathesis makes it for `requests`, for httpx; the caller's key stays."""
    headers = {n: v for n, v in (request.get("headers") or {}).items() if n.lower() != "authorization"}
    found = {"method": request["method"], "url": request["url"], "headers": headers}
    found |= {name: request[name] for name in ("params", "json") if request.get(name) is not None}
    if request.get("data") is not None:
        data = request["data"]
        found["content"] = data if isinstance(data, (bytes, str)) else json.dumps(data, default=str)
    return found


def _send_raw(http: httpx.Client, draw: random.Random, report: FuzzReport, forbidden: Sequence[str]) -> None:
    method, path, body = draw.choice(METHODS), draw.choice(PATHS), next(_bodies(draw))
    headers = {"Content-Type": draw.choice(("application/json", "text/plain", "application/json; charset=utf-7", ""))}
    if draw.random() < 0.2:
        headers["Idempotency-Key"] = draw.choice(("", "k", "k" * 300))
    if draw.random() < 0.1:
        headers["x-request-id"] = draw.choice(("a b", "x" * 5000, "%0d%0a"))
    sent = f"{method} {path} {body[:60]!r}"
    _send(http, sent, report, forbidden, lambda: http.request(method, path, content=body, headers=headers))


def _bodies(draw: random.Random) -> Iterator[bytes]:
    """Bodies that are nearly right."""
    text = json.dumps(BODY | {draw.choice(list(BODY)): _odd_value(draw)}).encode()
    while True:
        kind = draw.randrange(5)
        if kind == 0:
            yield text
        elif kind == 1:
            yield text[: draw.randrange(len(text))]
        elif kind == 2:
            place = draw.randrange(len(text))
            yield text[:place] + bytes([draw.randrange(256)]) + text[place + 1 :]
        elif kind == 3:
            yield b"[" * draw.choice((10, 1000, 50_000))
        else:
            yield draw.randbytes(draw.randrange(200))


def _odd_value(draw: random.Random) -> Any:
    return draw.choice(
        (
            None,
            True,
            -1,
            2**63,
            10**400,
            1e308,
            float("nan"),
            "",
            "\0",
            "\ud800",
            "é" * 1000,
            [],
            [[]],
            [-1],
            [2**31],
            [1.5],
            {"a": {}},
            [{"role": "root", "content": None}],
            [{"role": "user", "content": [{"type": "image_url"}]}],
        )
    )


def _send(
    http: httpx.Client, sent: str, report: FuzzReport, forbidden: Sequence[str], send: Callable[[], httpx.Response]
) -> None:
    try:
        report.take(sent, send(), forbidden)
    except (httpx.InvalidURL, httpx.LocalProtocolError, UnicodeError, TypeError, ValueError):
        return  # the client itself refuses to send it
    except httpx.HTTPError as error:
        report.num_requests += 1
        report.faults.append(f"{sent}: got {type(error).__name__}: {error}, expected an answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is sent where.

    Attributes:
        url: Of the gateway.
        requests: How many.
        seed: Of everything that is drawn.
    """

    url: str = "http://127.0.0.1:8000"
    requests: int = 10_000
    seed: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, rest = split_arguments(Options, arguments)
        key = os.environ.get(KEY_VARIABLE)
        if rest or not key:
            raise InvalidRequest("arguments", rest or f"no {KEY_VARIABLE}", f"url, requests, seed, and {KEY_VARIABLE}")
        report = fuzz(options.url, key, options.requests, options.seed)
        is_healthy = httpx.get(f"{options.url}/health", timeout=TIMEOUT_S).status_code == 200
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    counts = ", ".join(f"{status}: {number}" for status, number in sorted(report.by_status.items()))
    print(f"{report.num_requests} requests ({counts}), {len(report.faults)} faults, healthy: {is_healthy}")
    print("\n".join(report.faults[:MAX_SHOWN]))
    return 0 if is_healthy and not report.faults else 1


if __name__ == "__main__":
    sys.exit(main())
