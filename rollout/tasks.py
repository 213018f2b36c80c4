"""Problems and verdicts: reasoning-gym data sets behind plain, picklable values.

Owns the way from (data set, seed, index) to a question, to prompt tokens, and from a completion to a reward. It does
not know who generates the completion, how rewards become advantages, or which process it runs in: a worker rebuilds
everything it needs from a TaskSpec and an index.

Seeds. reasoning-gym seeds the problem at index i with seed + i, so seeds s and s+1 yield shifted copies of the same
problems. The default seeds below therefore stand SEED_SPACING apart, and a data set may not be longer than that.
"""

import dataclasses
import difflib
import functools
import logging
from dataclasses import dataclass
from typing import Any, Protocol

from reasoning_gym.factory import DATASETS, create_dataset
from reasoning_gym.utils import extract_answer

logger = logging.getLogger(__name__)

SEED_SPACING = 100_000_000
WARM_START_SEED = 100_000_000
"""First seed of the problems a model is trained on before RL."""
TRAIN_SEED = 200_000_000
"""First seed of the problems RL samples from."""
EVAL_SEED = 300_000_000
"""First seed of the problems only evaluation sees."""

ANSWER_INSTRUCTION = "Put the final answer in <answer></answer>."
"""Appended to every question, because the verifier reads nothing outside the tags."""

FULL_SCORE = 1.0


class ChatTokenizer(Protocol):
    """The one tokenizer method that rendering needs."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool, return_dict: bool
    ) -> list[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """Everything a worker process needs to rebuild a task; hashable and picklable.

    Attributes:
        name: reasoning-gym data set name, e.g. "chain_sum".
        seed: seed of the problem at index 0; the problem at index i uses seed + i.
        size: number of problems.
        options: (field, value) pairs of the data set's own configuration, sorted by field.
    """

    name: str
    seed: int
    size: int
    options: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question.

    Attributes:
        question: the library's question text, without the answer instruction.
        answer: the library's reference answer.
        index: position in the task, 0-based.
        key: identifies the problem across processes and runs.
        metadata: the library's description of the problem (difficulty and parts), for reports only.
    """

    question: str
    answer: str
    index: int
    key: str
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the verifier says about one completion.

    Attributes:
        reward: 1.0 for the library's full score, else 0.0.
        exact: whether the library gave its full score.
        answer: text of the last <answer></answer> pair; None when there is none.
        raw_score: the library's own score in [0, 1]. It pays for an answer that merely contains the right one, which
            a policy would learn to exploit, so it is reported and never used as the reward.
        error: what the library's scorer raised on this answer; None when it scored it.
    """

    reward: float
    exact: bool
    answer: str | None
    raw_score: float
    error: str | None = None


class Task:
    """A reasoning-gym data set with one seed, one size and fixed options; reads only, so it may be shared."""

    __slots__ = ("spec", "_dataset", "_label")

    def __init__(self, spec: TaskSpec) -> None:
        self.spec = spec
        self._dataset = _build_dataset(spec)
        self._label = f"{spec.name}({','.join(f'{field}={value}' for field, value in spec.options)})@{spec.seed}"

    def __len__(self) -> int:
        return self.spec.size

    def problem(self, index: int) -> Problem:
        """Returns the problem at index.

        Raises:
            ValueError: index lies outside [0, size).
        """
        entry = self._entry(index)
        return Problem(
            question=entry["question"],
            answer=str(entry["answer"]),
            index=index,
            key=f"{self._label}#{index}",
            metadata=entry["metadata"],
        )

    def verify(self, index: int, completion: str) -> Verdict:
        """Scores a completion for the problem at index; see the module's verify."""
        entry = self._entry(index)
        answer = extract_answer(completion)
        if answer is None:
            return Verdict(reward=0.0, exact=False, answer=None, raw_score=0.0)
        try:
            raw_score = float(self._dataset.score_answer(answer, entry))
        except Exception as error:  # third-party scorers parse model output; some raise on text they cannot parse
            logger.warning("scorer of %s raised on problem %d: %r", self._label, index, error)
            return Verdict(reward=0.0, exact=False, answer=answer, raw_score=0.0, error=repr(error))
        exact = raw_score >= FULL_SCORE
        return Verdict(reward=1.0 if exact else 0.0, exact=exact, answer=answer, raw_score=raw_score)

    def _entry(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.spec.size:
            raise ValueError(f"problem index of {self._label}: got {index}, expected 0 <= index < {self.spec.size}")
        return self._dataset[index]


def make_task(name: str, *, seed: int, size: int, options: dict[str, int] | None = None) -> Task:
    """Builds a task from any reasoning-gym data set.

    Args:
        name: data set name as registered in reasoning-gym.
        seed: seed of problem 0; keep the seeds of disjoint tasks SEED_SPACING apart.
        size: number of problems, 1 <= size <= SEED_SPACING.
        options: fields of the data set's configuration, except seed and size; None keeps the library's defaults.

    Raises:
        ValueError: unknown name or option, size out of range, or option values the data set refuses.
    """
    return Task(TaskSpec(name=name, seed=seed, size=size, options=tuple(sorted((options or {}).items()))))


def render(problem: Problem, tokenizer: ChatTokenizer) -> list[int]:
    """Returns the prompt's token ids: one user turn, then the opening of the assistant's turn."""
    conversation = [{"role": "user", "content": f"{problem.question}\n{ANSWER_INSTRUCTION}"}]
    return tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=False)


def verify(spec: TaskSpec, index: int, completion: str) -> Verdict:
    """Scores a completion in any process, from plain data.

    The data set is built once per process and spec, then kept.

    Args:
        spec: which task the problem belongs to.
        index: which problem.
        completion: the generated text, without the prompt; <answer> tags must not have been stripped.

    Returns:
        The verdict; a completion without an answer pair earns 0.0.

    Raises:
        ValueError: spec or index is invalid.
    """
    return _cached_task(spec).verify(index, completion)


@functools.lru_cache(maxsize=16)
def _cached_task(spec: TaskSpec) -> Task:
    return Task(spec)


def _build_dataset(spec: TaskSpec) -> Any:
    if spec.name not in DATASETS:
        close = difflib.get_close_matches(spec.name, DATASETS, n=5)
        hint = ", ".join(close) if close else "no close match"
        raise ValueError(f"task name: got {spec.name!r}, expected a reasoning-gym data set (did you mean: {hint})")
    if not 1 <= spec.size <= SEED_SPACING:
        raise ValueError(f"size of task {spec.name}: got {spec.size}, expected 1 <= size <= {SEED_SPACING}")
    _, config_class = DATASETS[spec.name]
    allowed = sorted({field.name for field in dataclasses.fields(config_class)} - {"seed", "size"})
    for option, _ in spec.options:
        if option not in allowed:
            raise ValueError(f"option of task {spec.name}: got {option!r}, expected one of {', '.join(allowed)}")
    try:
        return create_dataset(spec.name, seed=spec.seed, size=spec.size, **dict(spec.options))
    except (AssertionError, TypeError) as error:  # the library validates with assert
        raise ValueError(f"options of task {spec.name}: got {dict(spec.options)}, refused: {error}") from error
