"""TRL's GRPOTrainer with rollouts from Longroll, and its weights back into Longroll after every step.

    LONGROLL_API_KEY=… python launch/examples/trl_grpo.py http://127.0.0.1:8000 models/tiny WEIGHTS STEPS

WEIGHTS is the service's gateway.weights_root; the key is an operator's, because only they may change what is served.
"""

import os
import sys
from pathlib import Path
from typing import Any

import httpx
from datasets import Dataset
from reasoning_gym.factory import create_dataset
from reasoning_gym.utils import extract_answer
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

url, model, weights, steps = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
longroll = httpx.Client(
    base_url=url, headers={"Authorization": f"Bearer {os.environ['LONGROLL_API_KEY']}"}, timeout=600
)
problems = create_dataset("chain_sum", seed=1, size=64, min_terms=2, max_terms=4, min_digits=1, max_digits=1)


def rollout(prompts: list, trainer: GRPOTrainer) -> dict:
    """A completion for each prompt: token ids both ways, with the log-probabilities they were sampled at."""
    render = trainer.processing_class.apply_chat_template
    ids = [render(prompt, add_generation_prompt=True, return_dict=False) for prompt in prompts]
    body = {"prompt": ids, "max_tokens": trainer.max_completion_length, "seed": trainer.state.global_step}
    answer = longroll.post("/v1/completions", json=body | {"logprobs": 0, "return_token_ids": True}).raise_for_status()
    choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
    logprobs = [choice["logprobs"]["token_logprobs"] for choice in choices]
    return {"prompt_ids": ids, "completion_ids": [c["token_ids"] for c in choices], "logprobs": logprobs}


def exact(completions: list, index: list[int], **_: object) -> list[float]:
    """1 for the right answer between its tags, else 0."""
    answers = [extract_answer(turn[0]["content"]) for turn in completions]
    return [float(a == problems[i]["answer"]) for a, i in zip(answers, index, strict=True)]


class Publish(TrainerCallback):
    """Longroll serves what was learned from the next rollout on."""

    def on_step_end(self, args, state, control, model=None, **_):  # type: ignore[no-untyped-def]
        model.save_pretrained(weights / f"step-{state.global_step}")
        body = {"directory": f"step-{state.global_step}"}
        print("serving", longroll.post("/v1/weights/rollback", json=body).raise_for_status().json())


ask = "{}\nPut the final answer in <answer></answer>."
chats = [[{"role": "user", "content": ask.format(problem["question"])}] for problem in problems]
dataset = Dataset.from_list([{"prompt": chat, "index": i} for i, chat in enumerate(chats)])
sizes: dict[str, Any] = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 128}
config = GRPOConfig(str(weights / "trl"), max_steps=steps, **sizes, learning_rate=1e-4, report_to="none", use_cpu=True)
GRPOTrainer(model, exact, config, dataset, rollout_func=rollout, callbacks=[Publish()]).train()
