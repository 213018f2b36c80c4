"""The benchmarks' client and arithmetic: against a small HTTP server that answers as told, without a gateway."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from launch.bench_locust import figures
from launch.bench_parallel import Cell, Options, parse_lengths, record_of
from launch.bench_serving import capacity_of
from launch.http_load import Ask, EventReader, Outcome, Target, random_asks
from launch.load_runs import arrivals, closed_loop, open_loop
from launch.load_statistics import Targets, quantile, summarise, variation
from rollout.errors import InvalidRequest, LongrollError

ASK = Ask(prompt_token_ids=(5, 6), max_tokens=3, seed=1)
GOOD = Outcome(planned_s=1.0, sent_s=1.0, first_s=1.1, last_s=1.2, end_s=1.2, num_tokens=3, wanted_tokens=3, status=200)
REFUSED = Outcome(planned_s=0.0, sent_s=0.0, end_s=0.1, wanted_tokens=3, status=429, retry_after_s=1.0)


def event(**record: object) -> bytes:
    return f"data: {json.dumps(record)}\n\n".encode()


TOKEN = event(id="a", choices=[{"index": 0, "text": "x", "logprobs": None, "finish_reason": None}])
USAGE = event(id="a", choices=[], usage={"prompt_tokens": 2, "completion_tokens": 3})
DONE = b"data: [DONE]\n\n"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def outcomes_of(handler: Handler, num: int, concurrency: int) -> list[Outcome]:
    """Of as many equal requests to a server that answers with `handler`."""
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        return await closed_loop(Target(url=f"http://{host}:{port}", key="k", model="m"), [ASK] * num, concurrency)
    finally:
        await runner.cleanup()


def answering(*pieces: bytes, pause_s: float = 0.0) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(pause_s)
        return response

    return answer


@given(st.lists(st.text(alphabet="ab{}é", min_size=1), max_size=8), st.data())
def test_events_may_be_cut_anywhere(texts: list[str], data: st.DataObject) -> None:
    stream = b"".join(f"data: {text}\n\n".encode() for text in texts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    reader, got = EventReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += reader.feed(stream[start:end])
    assert got == [text.encode() for text in texts]


def test_times_a_stream_and_sends_what_was_asked() -> None:
    seen: list[dict[str, object]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        seen.append(await request.json() | {"key": request.headers["Authorization"]})
        return await answering(TOKEN, TOKEN + TOKEN, USAGE + DONE, pause_s=0.02)(request)

    (outcome,) = asyncio.run(outcomes_of(answer, 1, 1))
    assert outcome.is_good and outcome.num_tokens == 3
    assert outcome.first_s is not None and outcome.last_s is not None and outcome.ttft_s is not None
    assert 0 < outcome.ttft_s and 0.02 <= outcome.last_s - outcome.first_s < outcome.end_s - outcome.sent_s
    assert outcome.tpot_s == (outcome.last_s - outcome.first_s) / 2
    (body,) = seen
    assert body["prompt"] == [5, 6] and body["max_tokens"] == 3 and body["ignore_eos"] is True
    assert body["key"] == "Bearer k" and body["model"] == "m" and body["seed"] == 1


async def _refuse(request: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {"message": "full"}}, status=429, headers={"Retry-After": "0"})


async def _break(request: web.Request) -> web.StreamResponse:
    return web.Response(status=500, text="no")


BAD = (
    (_break, 500, "no"),
    (answering(TOKEN, event(error={"message": "engine died"}), DONE), 200, "engine died"),
    (answering(TOKEN, USAGE), 200, "done = False"),
    (answering(TOKEN, event(id="a", choices=[], usage={"completion_tokens": 2}), DONE), 200, "got 2 tokens"),
    (answering(b'data: {"choices":[{"text":"x"}]}\n\n'), 200, "written as the gateway writes"),
)


@pytest.mark.parametrize(("handler", "status", "message"), BAD)
def test_every_failure_is_an_error(handler: Handler, status: int, message: str) -> None:
    (outcome,) = asyncio.run(outcomes_of(handler, 1, 1))
    assert outcome.status == status and not outcome.is_good and not outcome.is_refused
    assert message in (outcome.error or "")


def test_refusal_is_no_error_and_says_when() -> None:
    (outcome,) = asyncio.run(outcomes_of(_refuse, 1, 1))
    assert outcome.is_refused and outcome.error is None and outcome.retry_after_s == 0.0


def test_nobody_there_is_an_error() -> None:
    (outcome,) = asyncio.run(closed_loop(Target(url="http://127.0.0.1:9", key="k", model="m"), [ASK], 1))
    assert outcome.status is None and outcome.error is not None


def test_closed_loop_keeps_to_its_concurrency() -> None:
    under_way = most = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        response = await answering(TOKEN, USAGE + DONE, pause_s=0.01)(request)
        under_way -= 1
        return response

    assert len(asyncio.run(outcomes_of(answer, 9, 3))) == 9
    assert most == 3


def test_open_loop_does_not_wait_for_answers() -> None:
    times = [0.0, 0.01, 0.02]
    outcomes = asyncio.run(open_loop(Target(url="http://127.0.0.1:9", key="k", model="m"), [ASK] * 3, times))
    assert [one.planned_s for one in outcomes] == times
    assert all(one.sent_s >= one.planned_s for one in outcomes)


@pytest.mark.parametrize("cv", [0.0, 1.0, 3.0])
def test_arrivals_have_their_rate_and_irregularity(cv: float) -> None:
    times = arrivals(50.0, 400.0, cv, seed=3)
    gaps = [b - a for a, b in pairwise(times)]
    assert times == sorted(times) and 0 <= times[0] and times[-1] < 400.0
    # Of n gaps the mean strays by cv / √n of itself, its cv by about (1 + cv²) / √(2 n) · cv: four times that.
    num = 50.0 * 400.0
    assert statistics.mean(gaps) == pytest.approx(1 / 50.0, rel=4 * cv / math.sqrt(num) + 1e-4)
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(
        cv, abs=4 * cv * (1 + cv**2) / math.sqrt(2 * num) + 1e-9
    )


def test_arrivals_refuse_nonsense() -> None:
    for rate, duration_s, cv in ((0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, -1.0)):
        with pytest.raises(InvalidRequest):
            arrivals(rate, duration_s, cv, 0)


def test_prompts_share_no_beginning() -> None:
    asks = random_asks(200, 16, 4, seed="a")
    assert len({ask.prompt_token_ids[:4] for ask in asks}) > 190  # 496⁴ beginnings: a repetition is one in a billion
    assert asks == random_asks(200, 16, 4, seed="a") and not set(asks) & set(random_asks(200, 16, 4, seed="b"))


def test_share_within_counts_what_was_admitted() -> None:
    late = replace(GOOD, first_s=1.3, last_s=1.35)
    slow = replace(GOOD, last_s=1.1 + 2 * 0.06, end_s=1.3)
    broken = replace(GOOD, error="gone")
    summary = summarise([GOOD, late, slow, broken, REFUSED, REFUSED], Targets())
    assert summary.share_within == 1 / 4 and summary.error_rate == 1 / 4
    assert (summary.num_good, summary.num_refused, summary.num_errors) == (3, 2, 1)
    assert summary.share_with_retry_after == 1.0 and summary.errors == ("gone",)
    assert summary.tokens_per_s == pytest.approx(9 / summary.duration_s)


def test_static_benchmark_counts_a_refusal_as_missed() -> None:
    cell = Cell(prompt_tokens=2, output_tokens=3, concurrency=1, summary=summarise([GOOD, REFUSED], Targets()))
    record = record_of(Options(), [cell], [GOOD, REFUSED])
    assert (record["share_within"], record["num_requests"], record["num_refused"]) == (0.5, 2, 1)


def test_one_token_has_no_time_per_token() -> None:
    one = replace(GOOD, num_tokens=1, wanted_tokens=1, last_s=GOOD.first_s)
    assert one.tpot_s is None and Targets().are_met(one)


def test_quantile_is_a_value_that_was_seen() -> None:
    values = [float(v) for v in range(1, 101)]
    assert [quantile(values, share) for share in (0.5, 0.95, 0.99, 1.0)] == [50.0, 95.0, 99.0, 100.0]
    assert math.isnan(quantile([], 0.5))


def test_variation_looks_at_whole_windows() -> None:
    steady = [i * 0.5 for i in range(200)]
    assert variation(steady, 100.0, 10.0) == 0.0
    doubled = steady + [t for t in steady if 10 <= t < 20]
    assert variation(doubled, 100.0, 10.0) == pytest.approx(20 * 0.3 / (20 * 1.1))  # one window of ten twice as full
    assert variation([*steady, 101.0], 105.0, 10.0) == 0.0
    assert variation(steady, 25.0, 10.0) is None


def test_capacity_is_where_targets_still_hold() -> None:
    def loop(rate: float, within: float, refused: int = 0):  # type: ignore[no-untyped-def]
        return replace(summarise([GOOD], Targets()), requests_per_s=rate, share_within=within, num_refused=refused)

    assert capacity_of({4: loop(4, 1.0), 8: loop(7, 0.96), 16: loop(9, 0.5)}) == 7
    assert capacity_of({4: loop(4, 1.0), 8: loop(7, 1.0, refused=1)}) == 4
    assert capacity_of({4: loop(4, 0.2), 8: loop(7, 0.1)}) == 7


def test_lengths_are_two_numbers() -> None:
    assert parse_lengths("64:128") == (64, 128)
    for text in ("64", "64:", "a:b", "0:4"):
        with pytest.raises(InvalidRequest):
            parse_lengths(text)


def locust_entry(name: str, times: dict[str, int], length: int = 0, failures: int = 0) -> dict[str, object]:
    return {
        "name": name,
        "num_requests": sum(times.values()),
        "num_failures": failures,
        "start_time": 100.0,
        "last_request_timestamp": 110.0,
        "total_content_length": length,
        "response_times": times,
    }


def test_locust_figures_are_rates_and_quantiles() -> None:
    times = {"20": 90, "30": 6, "900": 4}
    names = ("/v1/completions", "TTFT", "TPOT")
    record = figures([*(locust_entry(name, times) for name in names), locust_entry("tokens", times, length=6400)])
    assert (record["tokens_per_s"], record["requests_per_s"], record["num_failures"]) == (640.0, 10.0, 0)
    assert record["ttft_ms"] == {"p50": 20.0, "p95": 30.0, "p99": 900.0}
    with pytest.raises(LongrollError, match="expected completed answers"):
        figures([locust_entry("/v1/completions", times, failures=100)])
