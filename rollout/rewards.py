"""Reward functions by name, and what a valid score is.

A reward function is `fn(prompt, completion_token_ids, text) -> Score` and runs in a worker process.
One that raises fails its trajectory; it never stands for a low score. This module knows nothing of
the processes, their time limit, or the trajectories.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rollout.errors import InvalidRequest, RewardFailed
from rollout.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a reward function says.

    Attributes:
        reward: A finite number.
        extras: Further figures, reported as means beside the reward.
    """

    reward: float
    extras: dict[str, float] = field(default_factory=dict)


RewardFunction = Callable[[Prompt, tuple[int, ...], str], Score]


def resolve_reward(name: str) -> RewardFunction | None:
    """Find a reward function; importing its module may take a while.

    Args:
        name: "none", a known name, or "package.module:function".

    Returns:
        The function; None for "none".

    Raises:
        InvalidRequest: If there is none of that name.
    """
    if name == "none":
        return None
    if name in KNOWN_REWARDS:
        return KNOWN_REWARDS[name]
    expected = f"one of {', '.join(['none', *KNOWN_REWARDS])}, or package.module:function"
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise InvalidRequest("reward", name, expected)
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InvalidRequest("reward", f"{name} ({error})", expected) from error
    if not callable(function):
        raise InvalidRequest("reward", f"{name}, a {type(function).__name__}", "a function")
    return function  # type: ignore[no-any-return]


def score_completion(function: RewardFunction, prompt: Prompt, token_ids: tuple[int, ...], text: str) -> Score:
    """Call a reward function and check what it returns.

    Raises:
        RewardFailed: If it raised, or returned anything but a Score with a finite reward.
    """
    try:
        score = function(prompt, token_ids, text)
    except Exception as error:  # user code: the trajectory is failed with this reason
        raise RewardFailed(f"{type(error).__name__}: {error}") from error
    if not isinstance(score, Score):
        raise RewardFailed(f"reward function result: got {type(score).__name__}, expected a rollout.rewards.Score")
    if isinstance(score.reward, bool) or not isinstance(score.reward, (int, float)) or not math.isfinite(score.reward):
        raise RewardFailed(f"reward: got {score.reward!r}, expected a finite number")
    return Score(reward=float(score.reward), extras=score.extras)


def reasoning_gym(prompt: Prompt, token_ids: tuple[int, ...], text: str) -> Score:
    """Score an answer with reasoning-gym's verifier.

    Args:
        prompt: Its metadata holds "task" (a rollout.tasks.TaskSpec, or its fields as a mapping) and "index".
        token_ids: Not used.
        text: The completion, tags included.

    Returns:
        Reward 1.0 for the library's full score, else 0.0. An answer on which the library's own scorer
        raises is a wrong answer; `scorer_raised` counts them.
    """
    from rollout.tasks import TaskSpec, verify  # importing reasoning-gym takes seconds

    missing = [key for key in ("task", "index") if key not in prompt.metadata]
    if missing:
        raise InvalidRequest(f"prompt {prompt.prompt_id} metadata", sorted(prompt.metadata), f"the key {missing[0]!r}")
    task = prompt.metadata["task"]
    if isinstance(task, Mapping):
        options = task.get("options", ())
        pairs = options.items() if isinstance(options, Mapping) else options
        task = TaskSpec(
            name=task["name"],
            seed=task["seed"],
            size=task["size"],
            options=tuple(sorted((str(k), v) for k, v in pairs)),
        )
    verdict = verify(task, int(prompt.metadata["index"]), text)
    return Score(
        reward=verdict.reward,
        extras={
            "exact": float(verdict.exact),
            "answered": float(verdict.answer is not None),
            "raw_score": verdict.raw_score,
            "scorer_raised": float(verdict.error is not None),
        },
    )


KNOWN_REWARDS: dict[str, RewardFunction] = {"reasoning_gym": reasoning_gym}
