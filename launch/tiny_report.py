"""Measures the embedded model on problems only evaluation sees.

    python -m launch.tiny_report --model models/tiny

Samples with Hugging Face transformers from the shipped bf16 weights, so the figures hold without any engine of ours.
"""

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from launch.tiny_corpus import chain_sum_options
from rollout.tasks import EVAL_SEED, Task, make_task, render


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answered problem.

    Attributes:
        num_terms: terms in the expression.
        num_tokens: completion length, EOS included.
        is_worked: whether the completion wrote anything before the answer tag.
        is_truncated: whether the token limit ended it.
        is_exact: whether the verifier gave the full score.
    """

    num_terms: int
    num_tokens: int
    is_worked: bool
    is_truncated: bool
    is_exact: bool


@torch.inference_mode()
def sample(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    batch: int,
    temperature: float,
    limit: int,
) -> tuple[list[Sample], list[str]]:
    """Answers every problem of a task once.

    Args:
        model: a causal language model with generate().
        tokenizer: its tokenizer.
        task: the problems.
        batch: problems answered side by side.
        temperature: 0 for greedy decoding.
        limit: completion tokens at most.

    Returns:
        One sample a problem, and the completions.
    """
    samples, texts = [], []
    for start in range(0, len(task), batch):
        problems = [task.problem(index) for index in range(start, min(start + batch, len(task)))]
        prompts = [render(problem, tokenizer) for problem in problems]
        padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        decoding = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        output = model.generate(**padded, **decoding, max_new_tokens=limit)
        for problem, row in zip(problems, output[:, padded["input_ids"].shape[1] :].tolist(), strict=True):
            finished = tokenizer.eos_token_id in row
            completion = row[: row.index(tokenizer.eos_token_id) + 1] if finished else row
            text = tokenizer.decode(completion, skip_special_tokens=True)
            texts.append(text)
            samples.append(
                Sample(
                    num_terms=problem.metadata["num_terms"],
                    num_tokens=len(completion),
                    is_worked=not text.startswith("<answer>"),
                    is_truncated=not finished,
                    is_exact=task.verify(problem.index, text).exact,
                )
            )
    return samples, texts


def summary(samples: list[Sample]) -> dict[str, object]:
    """Aggregates samples: shares in [0, 1], lengths in tokens."""
    worked = [one for one in samples if one.is_worked]
    guessed = [one for one in samples if not one.is_worked]
    lengths = sorted(one.num_tokens for one in samples)
    return {
        "num_problems": len(samples),
        "worked_share": _share([one.is_worked for one in samples]),
        "exact": _share([one.is_exact for one in samples]),
        "exact_worked": _share([one.is_exact for one in worked]),
        "exact_guess": _share([one.is_exact for one in guessed]),
        "truncated": _share([one.is_truncated for one in samples]),
        "mean_tokens": round(statistics.mean(lengths), 1),
        "mean_tokens_worked": round(statistics.mean([one.num_tokens for one in worked] or [0]), 1),
        "percentile_tokens": {p: lengths[min(len(lengths) - 1, len(lengths) * p // 100)] for p in (10, 50, 90, 99)},
        "max_tokens": lengths[-1],
        "exact_worked_by_terms": _by_terms(worked),
        "exact_guess_by_terms": _by_terms(guessed),
    }


def _share(flags: list[bool]) -> float | None:
    return round(sum(flags) / len(flags), 3) if flags else None


def _by_terms(samples: list[Sample]) -> dict[int, float | None]:
    terms = sorted({one.num_terms for one in samples})
    return {number: _share([one.is_exact for one in samples if one.num_terms == number]) for number in terms}


def main() -> None:
    """Prints the summary as JSON, and a few completions."""
    parser = argparse.ArgumentParser(description="Measures the embedded model.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--problems", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--limit", type=int, default=320, help="completion tokens at most")
    parser.add_argument("--seed", type=int, default=0, help="sampling seed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", type=int, default=0, help="completions to print")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").eval()
    task = make_task("chain_sum", seed=EVAL_SEED, size=arguments.problems, options=chain_sum_options())
    samples, texts = sample(
        model, tokenizer, task, batch=arguments.batch, temperature=arguments.temperature, limit=arguments.limit
    )
    for index, text in enumerate(texts[: arguments.show]):
        print(json.dumps(asdict(samples[index])), task.problem(index).question, text, sep="\n")
    print(json.dumps(summary(samples), indent=1))


if __name__ == "__main__":
    main()
