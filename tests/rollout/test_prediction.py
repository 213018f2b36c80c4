"""What is expected of a trajectory's length, and what it is expected from."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rollout.scheduler.jobs import Job
from rollout.scheduler.prediction import OUTLIVED, VISIT_WEIGHT, LengthPredictor

MOST = 1000


def a_job(tokens=0, group="g", prompt=None, most=MOST):
    return Job(
        job_id="j", group_id=group, order=0, num_prompt_tokens=5, max_tokens=most, num_tokens=tokens, prompt_key=prompt
    )


def test_an_unknown_group_is_taken_for_as_long_as_it_may_become():
    predictor = LengthPredictor()
    predictor.open_group("g", None)
    assert not predictor.is_known("g")
    assert predictor.total_tokens(a_job(tokens=10)) == MOST
    assert predictor.remaining_tokens(a_job(tokens=10)) == MOST - 10


def test_siblings_tell_the_length_and_what_outlives_it_is_expected_to_go_on():
    predictor = LengthPredictor()
    predictor.open_group("g", None)
    for tokens in (100, 300):
        predictor.ended(a_job(tokens))
    assert predictor.is_known("g") and predictor.total_tokens(a_job()) == 200
    assert predictor.total_tokens(a_job(tokens=200)) == OUTLIVED * 200
    assert predictor.total_tokens(a_job(tokens=900)) == MOST


def test_earlier_visits_of_a_prompt_count_for_a_part_of_a_sibling():
    predictor = LengthPredictor()
    predictor.open_group("first", "p")
    predictor.ended(a_job(100, "first", "p"))
    predictor.close_group("first")
    predictor.open_group("second", "p")
    assert predictor.total_tokens(a_job(group="second")) == 100
    predictor.ended(a_job(400, "second", "p"))
    expected = (VISIT_WEIGHT * 100 + 400) / (VISIT_WEIGHT + 1)
    assert predictor.total_tokens(a_job(group="second")) == expected


def test_what_is_remembered_counts_like_a_visit():
    seen, told = LengthPredictor(), LengthPredictor()
    seen.open_group("first", "p")
    for length in (100, 300):
        seen.ended(a_job(length, "first", "p"))
        told.remember("p", length)
    for predictor in (seen, told):
        predictor.open_group("next", "p")
    assert told.is_known("next")
    assert told.total_tokens(a_job(group="next")) == seen.total_tokens(a_job(group="next")) == 200


def test_only_the_latest_prompts_are_remembered():
    predictor = LengthPredictor(max_prompts=2)
    for prompt in "abc":
        predictor.open_group(prompt, prompt)
        predictor.ended(a_job(100, prompt, prompt))
        predictor.close_group(prompt)
    for prompt in "abc":
        predictor.open_group(prompt, prompt)
    assert [predictor.is_known(prompt) for prompt in "abc"] == [False, True, True]


@given(
    lengths=st.lists(st.integers(0, MOST), max_size=20),
    others=st.lists(st.integers(0, MOST), max_size=5),
    tokens=st.integers(0, MOST),
)
def test_expectations_stay_between_what_is_there_and_what_may_be(lengths, others, tokens):
    predictor = LengthPredictor()
    predictor.open_group("g", None)
    predictor.open_group("other", None)
    for length in lengths:
        predictor.ended(a_job(length))
    for length in others:
        predictor.ended(a_job(length, "other"))
    job = a_job(tokens)
    assert tokens <= predictor.total_tokens(job) <= MOST
    assert 0 <= predictor.remaining_tokens(job) <= MOST - tokens
    assert 0 <= predictor.likely_remaining_tokens(job) <= MOST - tokens


def test_a_bet_on_an_unknown_group_is_the_mean_of_all():
    predictor = LengthPredictor()
    predictor.open_group("g", None)
    predictor.open_group("other", None)
    assert predictor.likely_remaining_tokens(a_job()) < predictor.remaining_tokens(a_job())
    predictor.ended(a_job(80, "other"))
    assert predictor.likely_remaining_tokens(a_job()) == 80
    assert predictor.likely_remaining_tokens(a_job(tokens=30)) == 50
