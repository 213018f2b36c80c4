"""The gateway's application over a service that is not there: what is answered to what."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from actors.gateway_app import GatewayApp, GatewayOptions
from actors.gateway_backend import Backend
from actors.gateway_tokenizer import Tokenizer
from rollout.api_answers import ChatCompletion, ChatCompletionChunk, ErrorAnswer, ModelList, TextCompletion
from rollout.config import ModelConfig, SyncConfig
from rollout.errors import EngineDead
from rollout.gateway.keys import KeyFile, Role
from rollout.gateway_config import GatewayConfig
from tests.actors.gateway_fakes import FakeController, Remote

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
TEXT = "the answer is 42, naïvely"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(ModelConfig(path=str(TINY)))


class Client:
    """An application with its fake service and a key of each role."""

    def __init__(self, tokenizer, folder, **options):
        keys = KeyFile(folder / "keys.json")
        self.keys = {role: keys.add(role.value, role) for role in Role}
        self.controller = FakeController(answer=tokenizer.encode(TEXT, False))
        backend = Backend(Remote(self.controller), lambda: None, 0.01, 64)
        told = GatewayOptions(
            gateway=GatewayConfig(**options),
            model=ModelConfig(path=str(TINY)),
            sync=SyncConfig(),
            model_name="tiny",
            keys_file=str(folder / "keys.json"),
            namespace="none",
        )
        self.app = GatewayApp(told, backend, tokenizer)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app.asgi), base_url="http://gateway")

    async def post(self, path, body, role=Role.CLIENT, **headers):
        sent = {"Authorization": f"Bearer {self.keys[role]}"} | headers
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.http.post(path, content=content, headers={"Content-Type": "application/json"} | sent)

    async def get(self, path, role=Role.CLIENT):
        return await self.http.get(path, headers={"Authorization": f"Bearer {self.keys[role]}"})


@pytest.fixture
def make(tokenizer, tmp_path):
    return lambda **options: Client(tokenizer, tmp_path, **options)


def events_of(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def run(work):
    return asyncio.run(asyncio.wait_for(work, 20))


def test_a_completion_whole_and_streamed_says_the_same(make):
    async def work():
        client = make()
        body = {"model": "tiny", "prompt": "a question", "max_tokens": 64, "seed": 3}
        whole = await client.post("/v1/completions", body)
        assert whole.status_code == 200, whole.text
        answer = TextCompletion.model_validate_json(whole.content)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (TEXT, "stop")
        assert answer.usage.completion_tokens == len(client.controller.answer) + 1
        streamed = await client.post(
            "/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}}
        )
        events = [TextCompletion.model_validate(event) for event in events_of(streamed)]
        assert "".join(event.choices[0].text for event in events[:-1]) == TEXT
        assert len(events) > 2, "it came in pieces"
        assert events[-1].choices == [] and events[-1].usage == answer.usage
        first, second = client.controller.requests
        assert first.run_seed == second.run_seed == 3 and first.stream is None and second.stream is not None

    run(work())


def test_chat(make):
    async def work():
        client = make()
        body = {"messages": [{"role": "user", "content": "hello"}], "logprobs": True, "top_logprobs": 1, "n": 2}
        whole = ChatCompletion.model_validate_json((await client.post("/v1/chat/completions", body)).content)
        assert [choice.message.content for choice in whole.choices] == [TEXT, TEXT]
        assert len(whole.choices[0].logprobs.content) == len(client.controller.answer) + 1
        streamed = await client.post("/v1/chat/completions", body | {"stream": True})
        chunks = [ChatCompletionChunk.model_validate(event) for event in events_of(streamed)]
        for index in (0, 1):
            mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
            assert "".join(choice.delta.content for choice in mine) == TEXT
            assert [choice.delta.role for choice in mine] == ["assistant", *[None] * (len(mine) - 1)]

    run(work())


def test_echo_with_logprobs_scores_the_prompt(make):
    async def work():
        client = make()
        prompt = [7, 8, 9]
        body = {"prompt": prompt, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
        answer = TextCompletion.model_validate_json((await client.post("/v1/completions", body)).content)
        logprobs = answer.choices[0].logprobs
        assert logprobs.token_logprobs == [None, -2.0, -2.0, -0.5]
        assert logprobs.top_logprobs[0] is None and max(logprobs.top_logprobs[1].values()) == -2.0
        alone = TextCompletion.model_validate_json(
            (await client.post("/v1/completions", body | {"max_tokens": 0})).content
        )
        assert alone.choices[0].logprobs.token_logprobs == [None, -2.0, -2.0] and alone.usage.completion_tokens == 0

    run(work())


def test_a_stream_ends_with_its_tokens_and_not_with_the_record(make):
    async def work():
        client = make()
        client.controller.late = asyncio.Event()
        body = {"prompt": "a", "max_tokens": 64, "stream": True, "stream_options": {"include_usage": True}}
        *pieces, usage = events_of(await client.post("/v1/completions", body))
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == TEXT
        assert pieces[-1]["choices"][0]["finish_reason"] == "stop"
        assert usage["usage"]["completion_tokens"] == len(client.controller.answer) + 1
        assert usage["usage"]["prompt_tokens_details"]["cached_tokens"] == 1
        client.controller.late.set()
        await asyncio.sleep(0.01)
        assert not any(gone.is_set() for gone in client.controller.aborted.values()), "nothing was left to abort"

    run(work())


def test_stop_strings_end_a_choice_and_its_generation(make):
    async def work():
        client = make()
        client.controller.hold = asyncio.Event()
        body = {"prompt": "a", "max_tokens": 64, "stop": ["42", "never"], "return_token_ids": True}
        answer = TextCompletion.model_validate_json((await client.post("/v1/completions", body)).content)
        choice = answer.choices[0]
        assert (choice.text, choice.finish_reason, choice.stop_reason) == ("the answer is ", "stop", "42")
        assert choice.token_ids == client.controller.answer[: len(choice.token_ids)]
        async with asyncio.timeout(10):
            await asyncio.gather(*(gone.wait() for gone in client.controller.aborted.values()))

    run(work())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": "a", "presence_penalty": 1.0}, "presence_penalty"),
        ({"prompt": "a", "tools": [{"type": "function"}]}, "tools"),
        ({"prompt": "a", "nonsense": 1}, "nonsense"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [600]}, "600"),
        ({"prompt": [2**40], "echo": True}, "prompt 0 token id"),
        ({"prompt": "a", "max_tokens": 1000}, "max_model_len"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "stream": True, "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b"{", "JSON"),
        (b"[" * 100_000, "body"),
        (b"\xff\xfe", ""),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_reason(make, body, said):
    async def work():
        response = await make().post("/v1/completions", body)
        assert response.status_code == 400, response.text
        assert said in ErrorAnswer.model_validate_json(response.content).error.message

    run(work())


def test_keys_and_roles(make):
    async def work():
        client = make()
        nobody = await client.http.get("/v1/models")
        assert nobody.status_code == 401 and nobody.headers["www-authenticate"] == "Bearer"
        wrong = await client.http.get("/v1/models", headers={"Authorization": "Bearer lr_000000000000_" + "x" * 43})
        assert wrong.status_code == 401
        assert (await client.get("/metrics")).status_code == 403
        assert ModelList.model_validate_json((await client.get("/v1/models")).content).data[0].id == "tiny"
        metrics = await client.get("/metrics", Role.OPERATOR)
        assert 'longroll_failed_total{reason="stale"} 1.0' in metrics.text
        assert (await client.http.get("/health")).json() == {"status": "ok", "live_version": 7}

    run(work())


def test_choices_of_a_request_are_let_in_together(make):
    async def work():
        client = make(max_wait_s=0.3)
        await client.post("/v1/completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": 8})
        await client.post("/v1/completions", {"prompt": "a", "max_tokens": 8})
        *many, one = client.controller.requests
        assert len(many) == 4 and len({request.ticket for request in many}) == 1
        assert (many[0].ticket.num_choices, one.ticket.num_choices) == (4, 1) and many[0].ticket != one.ticket
        assert {request.max_wait_s for request in [*many, one]} == {0.3}

    run(work())


def test_the_controller_is_told_when_streams_began(make):
    async def work():
        client = make()
        body = {"prompt": "a", "max_tokens": 8}
        await client.post("/v1/completions", body)
        await asyncio.gather(*(client.post("/v1/completions", body | {"stream": True}) for _ in range(3)))
        while not client.controller.first_tokens:
            await asyncio.sleep(0.05)
        assert len(client.controller.first_tokens) == 3, "nobody sees the first token of what is not streamed"
        assert all(0 < one.ttft_s <= one.age_s for one in client.controller.first_tokens)

    run(work())


def test_overload_tells_when_to_come_back(make):
    async def work():
        client = make()
        client.controller.is_full = True
        for stream in (False, True):
            response = await client.post("/v1/completions", {"prompt": "a", "stream": stream})
            assert response.status_code == 429 and response.headers["retry-after"] == "3"
        client.controller.is_full, client.controller.error = False, EngineDead("gone")
        assert (await client.post("/v1/completions", {"prompt": "a"})).status_code == 503
        many = await client.post("/v1/completions", {"prompt": ["a"] * 65})
        assert many.status_code == 429, "more than may be under way"

    run(work())


def test_a_fault_of_ours_is_told_without_its_reason(make, caplog):
    async def work():
        client = make()
        client.controller.error = RuntimeError("a secret")
        transport = httpx.ASGITransport(client.app.asgi, raise_app_exceptions=False)
        headers = {"Authorization": f"Bearer {client.keys[Role.CLIENT]}", "x-request-id": "mine"}
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as http:
            response = await http.post("/v1/completions", json={"prompt": "a"})
        assert response.status_code == 500 and response.headers["x-request-id"] == "mine"
        assert "secret" not in ErrorAnswer.model_validate_json(response.content).error.message
        assert "a secret" in caplog.text and "mine" in caplog.text

    run(work())


def test_sizes_and_rates(make):
    async def work():
        client = make(max_body_bytes=1000, requests_per_s=0.001, burst_requests=2)
        assert (await client.post("/v1/completions", b"x" * 1001, Role.OPERATOR)).status_code == 413

        async def pieces():
            for _ in range(20):
                yield b"x" * 100

        headers = {"Authorization": f"Bearer {client.keys[Role.TRAINER]}", "Content-Type": "application/json"}
        assert (await client.http.post("/v1/completions", content=pieces(), headers=headers)).status_code == 413
        answers = [await client.get("/v1/models") for _ in range(3)]
        assert [one.status_code for one in answers] == [200, 200, 429]
        assert int(answers[-1].headers["retry-after"]) > 1
        assert (await client.get("/v1/models", Role.TRAINER)).status_code == 200, "each key has its own limit"

    run(work())


def test_idempotency_keys(make):
    async def work():
        client = make()
        body, key = {"prompt": "a", "max_tokens": 8}, {"Idempotency-Key": "once"}
        first = await client.post("/v1/completions", body, **key)
        again = await client.post("/v1/completions", body, **key)
        assert again.content == first.content and again.headers["idempotency-replayed"] == "true"
        assert (await client.post("/v1/completions", body | {"n": 2}, **key)).status_code == 409
        other = await client.post("/v1/completions", body | {"n": 2}, Role.TRAINER, **key)
        assert other.status_code == 200, "another caller's key is another key"
        assert len(client.controller.requests) == 3
        stream = body | {"stream": True}
        pair = [await client.post("/v1/completions", stream, **{"Idempotency-Key": "s"}) for _ in range(2)]
        assert pair[0].content == pair[1].content and len(client.controller.requests) == 4

    run(work())


def test_requests_have_names(make, caplog):
    async def work():
        client = make()
        named = await client.http.get("/health", headers={"x-request-id": "mine-1"})
        assert named.headers["x-request-id"] == "mine-1"
        forged = await client.http.get("/health", headers={"x-request-id": "a b\tc" * 50})
        assert forged.headers["x-request-id"].isalnum()
        with caplog.at_level("INFO", logger="longroll.gateway"):
            await client.get("/v1/models")
        assert "GET /v1/models 200" in caplog.text and "request=" in caplog.text
        assert client.keys[Role.CLIENT] not in caplog.text

    run(work())


def test_a_client_that_leaves_ends_its_generation(make):
    async def work():
        client = make()
        client.controller.hold = asyncio.Event()
        for stream in (False, True):
            before = set(client.controller.aborted)
            waiting = asyncio.ensure_future(_leave(client, stream))
            await waiting
            for _ in range(100):
                await asyncio.sleep(0.01)
                new = [gone for handle, gone in client.controller.aborted.items() if handle not in before]
                if new and all(gone.is_set() for gone in new):
                    break
            assert new and all(gone.is_set() for gone in new)

    run(work())


async def _leave(client, stream):
    """An ASGI client that disconnects once its request is under way."""
    body = json.dumps({"prompt": "a", "max_tokens": 64, "stream": stream}).encode()
    headers = [
        (b"authorization", f"Bearer {client.keys[Role.CLIENT]}".encode()),
        (b"content-type", b"application/json"),
    ]
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    is_begun = asyncio.Event()

    async def receive():
        if messages:
            return messages.pop(0)
        if not stream:
            while not client.controller.aborted:
                await asyncio.sleep(0.01)
        else:
            await is_begun.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        is_begun.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": headers,
        "scheme": "http",
        "server": ("gateway", 80),
        "client": ("test", 1),
        "root_path": "",
    }
    await client.app.asgi(scope, receive, send)
