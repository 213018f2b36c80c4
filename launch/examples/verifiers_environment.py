"""An environment of the `verifiers` library, evaluated on Longroll through its OpenAI-compatible API.

    LONGROLL_API_KEY=… python launch/examples/verifiers_environment.py http://127.0.0.1:8000 MODEL_NAME NUM_PROBLEMS

The environment knows nothing of Longroll: any other of the library's takes its place.
"""

import os
import sys

import verifiers as vf
from datasets import Dataset
from openai import AsyncOpenAI
from reasoning_gym.factory import create_dataset

url, model, num_problems = sys.argv[1], sys.argv[2], int(sys.argv[3])
problems = create_dataset("chain_sum", seed=1, size=num_problems, min_terms=2, max_terms=4, min_digits=1, max_digits=1)
parser = vf.XMLParser(["answer"], answer_field="answer")


def exact(completion: vf.Messages, answer: str, parser: vf.Parser, **_: object) -> float:
    """1 for the right answer between its tags, else 0."""
    return float(parser.parse_answer(completion) == answer)


environment = vf.SingleTurnEnv(
    eval_dataset=Dataset.from_list(
        [
            {"question": f"{p['question']}\nPut the final answer in <answer></answer>.", "answer": p["answer"]}
            for p in problems
        ]
    ),
    parser=parser,
    rubric=vf.Rubric(funcs=[exact], parser=parser),
)
outputs = environment.evaluate_sync(
    client=AsyncOpenAI(base_url=f"{url}/v1", api_key=os.environ["LONGROLL_API_KEY"]),
    model=model,
    sampling_args={"max_tokens": 256, "temperature": 1.0},  # no seed: it would make all rollouts of a problem the same
    rollouts_per_example=4,
    max_concurrent=32,
)
rewards = [rollout["reward"] for rollout in outputs["outputs"]]
print(f"mean reward {sum(rewards) / len(rewards):.3f} of {len(rewards)} rollouts")
