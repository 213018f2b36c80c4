"""Which problems a step trains on and which ones evaluation sees, as prompts.

Owns the numbering of problems and groups, so that a resumed run asks for the same rollouts. Knows
nothing of the service or the trainer.
"""

from __future__ import annotations

from typing import Any

from rollout.config import ModelConfig, WorkloadConfig
from rollout.tasks import EVAL_SEED, SEED_SPACING, TRAIN_SEED, Task, make_task, render
from rollout.types import Prompt

MAX_TRAIN_PROBLEMS = SEED_SPACING


class Workload:
    """Training and held-out problems of one task; the two never share a problem.

    Args:
        config: The task and its options.
        model: Whose tokenizer and chat template render the prompts.
        seed: Run seed; it shifts where training starts among the problems, never the held-out ones.
    """

    def __init__(self, config: WorkloadConfig, model: ModelConfig, seed: int) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
        options = dict(config.task_options)
        self._train = make_task(config.task, seed=TRAIN_SEED, size=MAX_TRAIN_PROBLEMS, options=options)
        self._eval = make_task(config.task, seed=EVAL_SEED, size=config.eval_problems, options=options)
        self._offset = seed * 1_000_003 % MAX_TRAIN_PROBLEMS

    def batch(self, start: int, num_prompts: int) -> list[Prompt]:
        """Training prompts number start, start + 1, … of the run."""
        return [self.problem(number) for number in range(start, start + num_prompts)]

    def problem(self, number: int) -> Prompt:
        """Training prompt number `number` of the run."""
        return self._prompt(self._train, (self._offset + number) % MAX_TRAIN_PROBLEMS)

    def held_out(self) -> list[Prompt]:
        """The evaluation prompts, always the same."""
        return [self._prompt(self._eval, i) for i in range(len(self._eval))]

    def _prompt(self, task: Task, index: int) -> Prompt:
        problem = task.problem(index)
        return Prompt(
            token_ids=tuple(render(problem, self._tokenizer)),
            prompt_id=problem.key,
            metadata={"task": task.spec, "index": index},
        )
