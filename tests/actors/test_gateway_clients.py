"""Clients that know nothing of Longroll, unmodified, against the running gateway: OpenAI's library, vLLM's benchmark,
lm-eval, Locust, and the trainers' examples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from launch.bench_locust import Options as LocustOptions
from launch.bench_locust import figures, run_locust
from launch.http_load import Target
from rollout.gateway.keys import Role
from tests.actors.conftest import Served

pytestmark = [pytest.mark.ray, pytest.mark.engine]
REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "models" / "tiny"
TIMEOUT_S = 600  # of a command whose imports alone take minutes on a machine that is busy with engines


def run(command: list[str], **environment: str) -> str:
    """Standard output of a command in the repository, which must succeed."""
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def api(served: Served) -> openai.OpenAI:
    return served.openai()


def live_version(served: Served) -> int:
    with served.http() as http:
        return int(http.get("/health").json()["live_version"])


def test_openai_streams_what_it_answers_whole(api: openai.OpenAI, served: Served) -> None:
    assert [model.id for model in api.models.list()] == [served.model]
    ask: dict[str, Any] = {
        "model": served.model,
        "messages": [{"role": "user", "content": "What is 3 + 4?\nPut the final answer in <answer></answer>."}],
        "max_completion_tokens": 48,
        "seed": 11,
    }
    whole = api.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
    text, logprobs = whole.choices[0].message.content, whole.choices[0].logprobs
    assert text and whole.usage is not None and logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == whole.usage.completion_tokens
    pieces, usage = [], None
    for event in api.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = event.usage or usage
        pieces += [choice.delta.content or "" for choice in event.choices]
    assert "".join(pieces) == text and usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_openai_errors_are_its_own(api: openai.OpenAI, served: Served) -> None:
    nobody = openai.OpenAI(base_url=f"{served.url}/v1", api_key="no", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        nobody.models.list()
    with pytest.raises(openai.NotFoundError):
        api.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError):
        api.completions.create(model=served.model, prompt="a", temperature=-1)


VLLM_BENCH_SERVE = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""What `vllm bench serve` runs. The command itself asks for a distribution named vllm, and the CPU build has another
name (vllm 0.32, entrypoints/cli/main.py); use it where the GPU build is installed."""


def test_vllm_bench_serve(served: Served, tmp_path: Path) -> None:
    command = [sys.executable, "-c", VLLM_BENCH_SERVE, "--backend", "openai"]
    command += ["--base-url", served.url, "--model", served.model, "--tokenizer", str(TINY)]
    command += [
        "--dataset-name",
        "random",
        "--random-input-len",
        "32",
        "--random-output-len",
        "16",
        "--num-prompts",
        "16",
    ]
    command += ["--request-rate", "inf", "--max-concurrency", "8", "--ignore-eos", "--disable-tqdm"]
    command += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    run(command, OPENAI_API_KEY=served.keys[Role.CLIENT])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 16 and result["failed"] == 0
    assert result["total_output_tokens"] == 16 * 16
    assert result["mean_ttft_ms"] > 0 and result["mean_tpot_ms"] > 0


CHOICES = """
task: choices
output_type: multiple_choice
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
"""
GENERATED = """
task: generated
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["</answer>"], max_gen_toks: 64, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def test_lm_eval_local_completions(served: Served, tmp_path: Path) -> None:
    """Answers scored by log-probabilities of prompts, and generated ones."""
    data = tmp_path / "sums.jsonl"
    problems = [
        {"question": f"{a} + {b} =", "choices": [f" {a + b}", f" {a + b + 1}"], "label": 0, "answer": str(a + b)}
        for a, b in ((1, 2), (3, 4), (2, 6))
    ]
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    for name, task in (("choices", CHOICES), ("generated", GENERATED)):
        (tmp_path / f"{name}.yaml").write_text(f'{common}doc_to_text: "{{{{question}}}}"{task}')
    arguments = f"model={served.model},base_url={served.url}/v1/completions,tokenizer={TINY},num_concurrent=4"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", "choices,generated", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    run(command, OPENAI_API_KEY=served.keys[Role.CLIENT], HF_HOME=str(tmp_path / "home"))
    (result,) = (tmp_path / "out").rglob("results*.json")
    scores = json.loads(result.read_text())["results"]
    assert 0 <= scores["choices"]["acc,none"] <= 1 and 0 <= scores["generated"]["exact_match,none"] <= 1


def test_locust(served: Served) -> None:
    target = Target(url=served.url, key=served.keys[Role.CLIENT], model=served.model)
    record = figures(run_locust(target, LocustOptions(users=4, duration_s=4, prompt_tokens=16, output_tokens=16)))
    assert record["num_failures"] == 0 and record["num_requests"] >= 4
    # Every answer has 16 tokens; one that ended as Locust stopped may be counted as a request alone.
    assert record["tokens_per_s"] >= 16 * (record["num_requests"] - 4) / record["duration_s"]
    assert 0 < record["ttft_ms"]["p50"] <= record["ttft_ms"]["p95"]


def test_verifiers_example(served: Served) -> None:
    example = REPOSITORY / "launch" / "examples" / "verifiers_environment.py"
    said = run([sys.executable, str(example), served.url, served.model, "4"], LONGROLL_API_KEY=served.keys[Role.CLIENT])
    assert "of 16 rollouts" in said


def test_trl_example_trains_and_is_served(served: Served, restored: None) -> None:
    example = REPOSITORY / "launch" / "examples" / "trl_grpo.py"
    weights = str(served.weights_root)
    before = live_version(served)
    said = run(
        [sys.executable, str(example), served.url, str(TINY), weights, "2"],
        LONGROLL_API_KEY=served.keys[Role.OPERATOR],
        TRL_EXPERIMENTAL_SILENCE="1",
    )
    assert said.count("serving") == 2
    assert live_version(served) == before + 2
    assert (served.weights_root / "step-2" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", sorted((REPOSITORY / "launch" / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60
