"""lm-eval tasks answered by the service, for accuracy regressions on real models.

Only tasks that generate: a task that scores given continuations needs their log-probabilities, which the
service does not offer. `lm-eval` is an extra package (pip install "lm-eval==0.4.13"), imported on use.
"""

from __future__ import annotations

import time
from typing import Any

from launch.evaluation import Evaluation
from rollout.client import RolloutClient
from rollout.config import RunConfig
from rollout.errors import InvalidRequest
from rollout.types import SamplingParams, Status, Trajectory

PREFERRED_METRICS = ("exact_match", "acc", "pass@1", "prompt_level_strict_acc")
RUN_SEED = 0


def evaluate_tasks(config: RunConfig, client: RolloutClient, tasks: tuple[str, ...]) -> Evaluation:
    """Answer every problem of the tasks once, with the same seeds every time.

    Raises:
        InvalidRequest: lm-eval is not installed, or a task does not exist or needs log-probabilities.
    """
    try:
        import lm_eval
    except ImportError:
        raise InvalidRequest("tasks", ",".join(tasks), 'the package lm-eval (pip install "lm-eval==0.4.13")') from None
    began = time.monotonic()
    model = _service_model(config, client)
    try:
        found = lm_eval.simple_evaluate(model=model, tasks=list(tasks), bootstrap_iters=0, log_samples=True)
    except (KeyError, NotImplementedError) as error:
        raise InvalidRequest("tasks", ",".join(tasks), f"tasks that generate ({error})") from error
    samples = [
        s for task in sorted(found["samples"]) for s in sorted(found["samples"][task], key=lambda s: s["doc_id"])
    ]
    scores = [_score(sample) for sample in samples]
    return Evaluation(
        rewards=tuple(scores),
        exact=tuple(score >= 1.0 for score in scores),
        lengths=tuple(model.lengths),
        version=client.stats().live_version,
        duration_s=time.monotonic() - began,
    )


def _score(sample: dict[str, Any]) -> float:
    """A sample's figure under the first metric that says right or wrong."""
    names = [name for name in PREFERRED_METRICS if name in sample] or list(sample.get("metrics", ()))
    if not names:
        raise InvalidRequest("tasks", f"metrics {sorted(sample)}", f"one of {', '.join(PREFERRED_METRICS)}")
    return float(sample[names[0]])


def _service_model(config: RunConfig, client: RolloutClient) -> Any:
    """An lm-eval model; its class can be made only where lm-eval is installed."""
    from lm_eval.api.model import LM
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(config.model.path, trust_remote_code=config.model.trust_remote_code)

    class ServiceModel(LM):
        """Answers `generate_until`; the request's place in the list is its seed."""

        def __init__(self) -> None:
            super().__init__()
            self.lengths: list[int] = []

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            prompts = [tuple(tokenizer.encode(request.args[0])) for request in requests]
            max_tokens = config.workload.eval_max_tokens or config.sampling.max_tokens
            groups = client.rollout(
                prompts,
                1,
                SamplingParams(max_tokens=max_tokens, temperature=config.sampling.temperature),
                run_seed=RUN_SEED,
                group_ids=[f"lm-eval/{i:06d}" for i in range(len(prompts))],
                reward="none",
            )
            answers = [group.trajectories[0] for group in groups]
            self.lengths += [len(answer.token_ids) for answer in answers]
            return [
                _cut(_text(tokenizer, a), r.args[1].get("until", ())) for a, r in zip(answers, requests, strict=True)
            ]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            raise NotImplementedError("log-probabilities of given continuations")

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            raise NotImplementedError("log-probabilities of given texts")

    return ServiceModel()


def _text(tokenizer: Any, answer: Trajectory) -> str:
    return "" if answer.status is Status.FAILED else str(tokenizer.decode(answer.token_ids, skip_special_tokens=True))


def _cut(text: str, until: Any) -> str:
    """The text before the first of the strings that end it."""
    stops = [until] if isinstance(until, str) else list(until)
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text
