"""Names, scores and failures of reward functions."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest

from rollout.errors import InvalidRequest, RewardFailed
from rollout.rewards import Score, reasoning_gym, resolve_reward, score_completion
from rollout.tasks import make_task
from rollout.types import Prompt

PROMPT = Prompt(token_ids=(1,), prompt_id="p")


def test_names_resolve():
    assert resolve_reward("none") is None
    assert resolve_reward("reasoning_gym") is reasoning_gym
    assert resolve_reward("rollout.rewards:reasoning_gym") is reasoning_gym


@pytest.mark.parametrize("name", ["", "unknown", "no.such.module:f", "rollout.rewards:missing", ":f", "math:pi", "x:"])
def test_unknown_names_list_what_is_known(name):
    with pytest.raises(InvalidRequest, match=r"reasoning_gym|a function"):
        resolve_reward(name)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, True, "1"])
def test_a_score_must_be_a_finite_number(value):
    with pytest.raises(RewardFailed, match="finite number"):
        score_completion(lambda prompt, ids, text: Score(reward=value), PROMPT, (), "")


def test_raising_or_returning_something_else_is_a_failure_with_its_reason():
    def boom(prompt, token_ids, text):
        raise KeyError("no such answer")

    with pytest.raises(RewardFailed, match=r"KeyError: 'no such answer'"):
        score_completion(boom, PROMPT, (), "")
    with pytest.raises(RewardFailed, match=r"got float, expected a rollout\.rewards\.Score"):
        score_completion(lambda prompt, ids, text: 1.0, PROMPT, (), "")


@pytest.mark.parametrize("as_mapping", [False, True])
def test_reasoning_gym_scores_right_and_wrong_answers(as_mapping):
    task = make_task("chain_sum", seed=5, size=10, options={"min_terms": 2, "max_terms": 2})
    spec = asdict(task.spec) if as_mapping else task.spec
    prompt = Prompt(token_ids=(1,), prompt_id="p", metadata={"task": spec, "index": 3})
    answer = task.problem(3).answer
    right = score_completion(reasoning_gym, prompt, (), f"thinking <answer>{answer}</answer>")
    wrong = score_completion(reasoning_gym, prompt, (), "<answer>x</answer>")
    silent = score_completion(reasoning_gym, prompt, (), "no idea")
    assert [s.reward for s in (right, wrong, silent)] == [1.0, 0.0, 0.0]
    assert [s.extras["answered"] for s in (right, wrong, silent)] == [1.0, 1.0, 0.0]


def test_reasoning_gym_without_a_task_is_a_failure_not_a_zero():
    with pytest.raises(RewardFailed, match="expected the key 'task'"):
        score_completion(reasoning_gym, PROMPT, (), "<answer>1</answer>")
