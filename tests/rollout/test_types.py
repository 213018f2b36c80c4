"""Records keep their promises: legal transitions, gapless spans, picklable errors."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout import errors
from rollout.types import (
    ChunkResult,
    FinishReason,
    ModelLimits,
    Prompt,
    RolloutRequest,
    SamplingParams,
    Status,
    Trajectory,
    VersionSpan,
    append_span,
)


def make_trajectory():
    return Trajectory(group_id="g", sample_index=0, seed=1, prompt_token_ids=(1,))


@pytest.mark.parametrize(
    "options",
    [
        dict(max_tokens=0),
        dict(temperature=math.nan),
        dict(temperature=-0.1),
        dict(temperature=math.inf),
        dict(temperature=0.0099),
        dict(temperature=2.01),
        dict(top_k=0),
        dict(top_k=2**31),
        dict(top_p=0.0),
        dict(top_p=1e-320),  # 0 as a float32
        dict(stop_token_ids=(2**31,)),
        dict(stop_token_ids=(-1,)),
        dict(top_p=1.1),
        dict(top_p=math.nan),
    ],
)
def test_sampling_parameters_name_what_is_wrong(options):
    with pytest.raises(errors.InvalidRequest, match=next(iter(options))):
        SamplingParams(**options)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=20))
def test_spans_cover_every_token_once_and_never_repeat_a_version(pieces):
    trajectory, position = make_trajectory(), 0
    for version, num in pieces:
        trajectory.append(
            ChunkResult(
                trajectory_id="g/0",
                token_ids=(5,) * num,
                logprobs=(-1.0,) * num,
                spans=(VersionSpan(version=version, start=0, stop=num),),
                finish_reason=FinishReason.LENGTH,
                shard=0,
            )
        )
        position += num
    spans = trajectory.weight_versions
    assert [s.version for s in spans for _ in range(s.start, s.stop)] == [v for v, n in pieces for _ in range(n)]
    assert all(a.stop == b.start and a.version != b.version for a, b in pairwise(spans))
    assert len(trajectory.loss_mask) == len(trajectory.logprobs) == position


@pytest.mark.parametrize("start, stop", [(1, 2), (0, 0)])
def test_a_span_with_a_gap_or_without_tokens_is_refused(start, stop):
    with pytest.raises(ValueError, match="version span"):
        append_span([], VersionSpan(version=0, start=start, stop=stop))


@given(st.lists(st.sampled_from(Status), min_size=1, max_size=6))
def test_final_statuses_are_left_only_for_failed(steps):
    trajectory, path = make_trajectory(), [Status.PENDING]
    for step in steps:
        try:
            trajectory.move_to(step)
            path.append(step)
        except ValueError as error:
            assert step.value in str(error)
    assert len(path) <= 3 and Status.PENDING not in path[1:]
    if len(path) == 3:
        assert path[1] in (Status.COMPLETED, Status.TRUNCATED) and path[2] is Status.FAILED


def test_failing_removes_the_reward():
    trajectory = make_trajectory()
    trajectory.move_to(Status.COMPLETED)
    trajectory.reward = 1.0
    trajectory.fail("it raised")
    assert (trajectory.reward, trajectory.error, trajectory.status) == (None, "it raised", Status.FAILED)


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(prompts=(), group_ids=()), "at least one prompt"),
        (dict(n_samples_per_prompt=0), "n_samples_per_prompt"),
        (dict(group_ids=("a",)), "one a prompt"),
        (dict(group_ids=("a", "a")), "unique"),
    ],
)
def test_requests_are_checked(options, match):
    prompt = Prompt(token_ids=(1,), prompt_id="p")
    fields = dict(
        prompts=(prompt, prompt), n_samples_per_prompt=1, sampling=SamplingParams(), run_seed=0, group_ids=("a", "b")
    )
    with pytest.raises(errors.InvalidRequest, match=match):
        RolloutRequest(**fields | options)


def test_limits_say_the_limit():
    limits = ModelLimits(vocab_size=10, max_model_len=8)
    limits.check(Prompt(token_ids=(0, 9), prompt_id="p"), SamplingParams(max_tokens=6))
    for token_ids, match in (((), "at least one token"), ((10,), r"\[0, 10\)"), ((1, 1, 1), "max_model_len = 8")):
        with pytest.raises(errors.InvalidRequest, match=match):
            limits.check(Prompt(token_ids=token_ids, prompt_id="p"), SamplingParams(max_tokens=6))


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequest("n", 0, "an integer ≥ 1"),
        errors.EngineDead("gone"),
        errors.SyncRefused("no"),
        errors.UnknownHandle("h"),
        errors.QueueFull("full"),
        errors.ServiceLost("gone"),
        errors.RewardFailed("x"),
    ],
)
def test_errors_survive_pickling(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and isinstance(again, errors.LongrollError)


def test_a_long_value_is_shortened_in_the_message():
    assert len(str(errors.InvalidRequest("x", list(range(1000)), "less"))) < 250
