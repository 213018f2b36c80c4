"""The gateway in front of real engines, spoken to as its users do: the openai package, HTTP, malformed requests."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

from actors.gateway import start_gateway
from actors.gateway_app import GatewayOptions
from rollout.api_answers import Publication, Weights
from rollout.config import ModelConfig, SyncConfig
from rollout.gateway.keys import Role
from rollout.gateway_config import GatewayConfig
from rollout.types import SamplingParams
from tests.actors.conftest import TINY

pytestmark = [pytest.mark.ray, pytest.mark.engine]
PROMPT = (7, 21, 40, 3, 99)
# Prompt log-probabilities come from the engine's float32 forward, which differs from Hugging Face's by rounding only:
# 1e-6 was seen; a wrong position or temperature is off by more than 0.1.
LOGPROB_TOLERANCE = 1e-3


@pytest.fixture
def greedy(client):
    """What the service itself says, asked as a trainer asks it."""
    (group,) = client.rollout([PROMPT], 1, SamplingParams(max_tokens=24, temperature=0, ignore_eos=True))
    return group.trajectories[0]


def test_whole_streamed_and_direct_are_the_same_tokens(served, greedy):
    client = served.openai()
    assert [model.id for model in client.models.list()] == ["tiny"]
    options = {
        "model": "tiny",
        "prompt": list(PROMPT),
        "max_tokens": 24,
        "temperature": 0,
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }
    whole = client.completions.create(logprobs=0, **options)
    assert whole.choices[0].token_ids == greedy.token_ids
    assert whole.choices[0].logprobs.token_logprobs == pytest.approx(greedy.logprobs, abs=LOGPROB_TOLERANCE)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(PROMPT), 24)
    events = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    assert [token for event in events for choice in event.choices for token in choice.token_ids] == greedy.token_ids
    assert "".join(choice.text for event in events for choice in event.choices) == whole.choices[0].text
    assert events[-1].usage.completion_tokens == 24 and events[-2].choices[0].finish_reason == "length"


def test_seeds_choices_and_stops(served):
    client = served.openai()
    options = {"model": "tiny", "prompt": "12 + 30 =", "max_tokens": 48, "seed": 5, "temperature": 1.0}
    three = client.completions.create(n=3, **options)
    texts = [choice.text for choice in three.choices]
    assert len(set(texts)) == 3, "choices differ"
    assert client.completions.create(n=1, **options).choices[0].text == texts[0], "and depend on the seed alone"
    longest = max(texts, key=len)
    stop = longest[len(longest) // 2 :][:3]
    place = texts.index(longest)
    stopped = client.completions.create(n=3, stop=[stop], **options).choices[place]
    assert stopped.text == longest[: longest.find(stop)] and stopped.finish_reason == "stop"


def test_chat_with_logprobs(served):
    client = served.openai()
    options = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "what is 3 + 4?"}],
        "max_completion_tokens": 16,
        "seed": 1,
        "logprobs": True,
        "top_logprobs": 3,
    }
    whole = client.chat.completions.create(**options)
    tokens = whole.choices[0].logprobs.content
    assert len(tokens) == whole.usage.completion_tokens
    assert all(len(token.top_logprobs) == 3 for token in tokens)
    assert all(token.logprob <= max(top.logprob for top in token.top_logprobs) + LOGPROB_TOLERANCE for token in tokens)
    pieces = list(client.chat.completions.create(stream=True, **options))
    assert "".join(piece.choices[0].delta.content for piece in pieces) == whole.choices[0].message.content


def test_echo_scores_the_prompt_as_the_reference_does(served, reference):
    answer = served.openai().completions.create(
        model="tiny", prompt=list(PROMPT), max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    wanted = torch.log_softmax(reference.logits(PROMPT[:1], list(PROMPT[1:])), dim=-1)
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1 : len(PROMPT)] == pytest.approx(
        [float(row[token]) for row, token in zip(wanted, PROMPT[1:], strict=True)], abs=LOGPROB_TOLERANCE
    )
    for place, row in enumerate(wanted, 1):
        assert max(logprobs.top_logprobs[place].values()) == pytest.approx(float(row.max()), abs=LOGPROB_TOLERANCE)


def test_many_streams_at_once(served):
    client = served.openai()

    def one(seed):
        options = {"model": "tiny", "prompt": "1 + 1", "max_tokens": 32, "seed": seed}
        whole = client.completions.create(**options).choices[0].text
        events = client.completions.create(stream=True, **options)
        return whole, "".join(event.choices[0].text for event in events)

    with ThreadPoolExecutor(16) as pool:
        pairs = list(pool.map(one, range(32)))
    assert all(whole == streamed for whole, streamed in pairs)
    assert len({whole for whole, _ in pairs}) > 16


def test_a_client_that_leaves_stops_its_generation(served, client):
    with served.http() as http:
        body = {"prompt": list(PROMPT), "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            next(response.iter_bytes())
    deadline = time.monotonic() + 20
    while client.stats().num_running and time.monotonic() < deadline:
        time.sleep(0.1)
    assert client.stats().num_running == 0


def test_who_may_do_what(served):
    body = {"prompts": [{"token_ids": [5]}], "sampling": {"max_tokens": 4}}
    with served.http() as http:
        assert http.post("/v1/rollouts", json=body).status_code == 403
        assert http.get("/metrics").status_code == 403
        assert http.post("/v1/weights/rollback", json={"directory": "."}).status_code == 403
        assert http.get("/v1/models", headers={"Authorization": "Bearer x"}).status_code == 401
    with httpx.Client(base_url=served.gateway.url) as nobody:
        assert nobody.get("/health").json()["status"] == "ok"
        for path in ("/v1/models", "/v1/weights", "/metrics", "/dashboard/feed"):
            assert nobody.get(path).status_code == 401
        assert nobody.get("/dashboard").status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/../metrics", "/v1/models/../../etc/passwd", "/%2e%2e/health", "//v1//models", "/v1"]
)
def test_path_tricks_lead_nowhere(served, path):
    with served.http(Role.OPERATOR) as http:
        response = http.send(http.build_request("GET", served.gateway.url + path))
        assert response.status_code in (200, 404) and "root:" not in response.text
        for tricky in ("../..", "/etc", "..\\..", "%2e%2e", "\0"):
            assert http.post("/v1/weights/rollback", json={"directory": tricky}).status_code == 400


def test_sizes_are_limited(served):
    with served.http() as http:
        assert http.post("/v1/completions", content=b"x" * 100_001).status_code == 413
        response = http.post("/v1/completions", content=(b"x" * 10_000 for _ in range(20)))
        assert response.status_code == 413


def test_rollouts_of_ones_own(served):
    body = {
        "prompts": [{"token_ids": list(PROMPT)}, {"text": "1 + 2"}, {"messages": [{"role": "user", "content": "hi"}]}],
        "n_samples_per_prompt": 2,
        "sampling": {"max_tokens": 8},
        "run_seed": 3,
    }
    with served.http(Role.TRAINER) as http, served.http("other") as other:
        made = http.post("/v1/rollouts", json=body)
        assert made.status_code == 202
        handle = made.json()["id"]
        for call in (other.get, other.delete):
            assert call(f"/v1/rollouts/{handle}").status_code == 404
        assert other.get(f"/v1/rollouts/{handle}/results").status_code == 404
        lines = [json.loads(line) for line in http.get(f"/v1/rollouts/{handle}/results").text.splitlines()]
        assert {line["group_id"] for line in lines} == set(made.json()["group_ids"])
        assert all(len(line["trajectories"]) == 2 for line in lines)
        assert all(len(t["token_ids"]) == len(t["logprobs"]) for line in lines for t in line["trajectories"])
        again = [json.loads(line) for line in http.get(f"/v1/rollouts/{handle}/results").text.splitlines()]
        assert {line["group_id"] for line in again} == set(made.json()["group_ids"]), "until they are acknowledged"
        progress = http.get(f"/v1/rollouts/{handle}").json()
        assert (progress["num_groups_finished"], progress["num_pending"]) == (3, 0)
        ids = {"group_ids": made.json()["group_ids"]}
        assert http.post(f"/v1/rollouts/{handle}/acknowledge", json=ids).status_code == 200
        assert http.get(f"/v1/rollouts/{handle}").status_code == 404
        refused = http.post("/v1/rollouts", json=body | {"reward": "os:system"})
        assert refused.status_code == 400, "a reward's name would import code"
        long = body | {"sampling": {"max_tokens": 1500, "ignore_eos": True}}
        handle = http.post("/v1/rollouts", json=long).json()["id"]
        assert http.delete(f"/v1/rollouts/{handle}").status_code == 204
        lines = [json.loads(line) for line in http.get(f"/v1/rollouts/{handle}/results").text.splitlines()]
        assert {t["status"] for line in lines for t in line["trajectories"]} == {"aborted"}


def test_rollback_serves_other_weights_as_a_new_version(served, greedy, client):
    with served.http(Role.OPERATOR) as http:
        before = Weights.model_validate(http.get("/v1/weights").json())
        made = http.post("/v1/weights/rollback", json={"directory": "."})
        assert made.status_code == 200, made.text
        assert Publication.model_validate(made.json()).version == before.live_version + 1
        after = Weights.model_validate(http.get("/v1/weights").json())
        assert after.live_version == before.live_version + 1 and after.state == "idle"
        assert after.recent[-1].version == after.live_version
        metrics = http.get("/metrics").text
        assert f"longroll_live_version {float(after.live_version)}" in metrics
    (group,) = client.rollout([PROMPT], 1, SamplingParams(max_tokens=24, temperature=0, ignore_eos=True))
    assert group.trajectories[0].token_ids == greedy.token_ids
    assert group.trajectories[0].weight_versions[0].version == after.live_version


def test_malformed_requests_are_refused_and_nothing_breaks(served):
    """A taste of what `launch.fuzz_gateway` sends by the thousand."""
    from launch.fuzz_gateway import fuzz

    report = fuzz(served.gateway.url, served.keys[Role.OPERATOR], num_requests=300, seed=1)
    assert report.num_requests >= 300 and not report.faults
    assert report.by_status.get(400, 0) > 100
    with served.http() as http:
        assert http.get("/health").json()["status"] == "ok"


def test_draining_lets_streams_end_and_takes_no_new_ones(served):
    options = GatewayOptions(
        gateway=GatewayConfig(port=0),
        model=ModelConfig(path=str(TINY)),
        sync=SyncConfig(),
        model_name="tiny",
        keys_file=str(served.folder / "keys.json"),
        namespace="tests",
        application="draining",
    )
    gateway, ends, is_begun = start_gateway(options), [], threading.Event()

    def stream() -> None:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=served.keys[Role.CLIENT], max_retries=0) as client:
            asked = {"model": "tiny", "prompt": list(PROMPT), "max_tokens": 600, "extra_body": {"ignore_eos": True}}
            for event in client.completions.create(stream=True, **asked):
                is_begun.set()
                if event.choices[0].finish_reason is not None:
                    ends.append(event.choices[0].finish_reason)

    headers = {"Authorization": f"Bearer {served.keys[Role.CLIENT]}"}
    with ThreadPoolExecutor(2) as pool, httpx.Client(base_url=gateway.url, headers=headers, timeout=60) as http:
        streaming = pool.submit(stream)
        assert is_begun.wait(30)
        stopping = pool.submit(gateway.stop)
        deadline = time.monotonic() + 20
        while (status := http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code) == 200:
            assert time.monotonic() < deadline, "it still takes requests"
        assert status == 503
        assert not ends, "the stream was under way all the while"
        streaming.result(240)
        stopping.result(240)
    assert ends == ["length"]
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{gateway.url}/health")
