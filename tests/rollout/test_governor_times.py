"""The model of step times: what it learns, what it shrugs off, and how sure it is."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.governor.config import GovernorConfig
from rollout.governor.plans import Planner
from rollout.governor.time_model import MAX_CELLS, SETTLED, TimeModel
from rollout.speculation_config import SpeculationConfig
from tests.rollout.governor_engine import CURVES, cpu_s

NOISE = 0.05


def taught(curve, points, visits, seed=0, outliers=0.0):
    model, rng = TimeModel(), np.random.default_rng(seed)
    for _ in range(visits):
        for calls, rows, context in points:
            factor = 10.0 if rng.random() < outliers else rng.lognormal(0, NOISE)
            model.learn(calls, rows, context, curve(calls, rows, context) * factor)
    return model


def grid(batches=(1, 4, 16, 64), nodes=(0, 1, 3, 7, 15)):
    return [(n, n * (1 + k), 1300 * n) for n in batches for k in nodes]


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_it_knows_every_curve_where_it_was(curve):
    model = taught(curve, grid(), visits=2 * SETTLED)
    for point in grid():
        seconds, sigma = model.predict(*point)
        # A moving average of 32 or so has a standard error of NOISE / sqrt(2 · 32 - 1) · sqrt(2), 0.9 %; the common
        # factor, with gain 0.02, wanders by NOISE · sqrt(0.02 / 2), 0.5 %. Four standard errors of both: 4.1 %.
        assert seconds == pytest.approx(curve(*point), rel=0.041)
        assert sigma < NOISE


def test_a_line_is_carried_to_where_it_never_was_and_the_error_says_how_far_to_trust_it():
    model = taught(cpu_s, grid(batches=(2, 8, 32), nodes=(0, 1, 7)), visits=SETTLED)
    for point in ((4, 20, 5200), (16, 48, 20_800), (64, 256, 83_200)):
        seconds, sigma = model.predict(*point)
        assert abs(math.log(seconds / cpu_s(*point))) < 2 * sigma
        assert sigma > model.predict(8, 64, 10_400)[1]


def test_outliers_count_like_the_edge_of_the_noise():
    clean, spoiled = (taught(cpu_s, grid(), visits=60, outliers=share) for share in (0.0, 0.05))
    for point in grid():
        # Each outlier counts as 3 σ of a noise that they widen themselves: 5 % of them shift a mean by 0.15 σ, σ ≤ 0.1
        # (1.25 · (0.95 · 0.04 + 0.05 · 3 σ) = σ gives 0.06). Plus 4 standard errors of the two models' difference.
        assert spoiled.predict(*point)[0] == pytest.approx(clean.predict(*point)[0], rel=0.015 + 4 * 0.014)


def test_a_first_step_that_compiles_is_outvoted():
    model = taught(cpu_s, grid(nodes=(0, 1)), visits=40)
    for visit in range(5):
        model.learn(8, 64, 10_400, cpu_s(8, 64, 10_400) * (50 if visit == 0 else 1))
    assert model.predict(8, 64, 10_400)[0] == pytest.approx(cpu_s(8, 64, 10_400), rel=0.05)  # exact but for the pull of
    # the line, which has one part in 1 + 5 · (0.25 / 0.05)², 1 %, and is within some 0.25 · 4 of it: 4 %


def test_what_slows_all_steps_alike_is_no_difference_between_them():
    model = taught(cpu_s, grid(batches=(8,), nodes=(0, 3)), visits=100)
    before = model.predict(8, 8, 10_400)[0] / model.predict(8, 32, 10_400)[0]
    rng = np.random.default_rng(1)
    for _ in range(400):  # the machine becomes 1.3 times slower, and only steps with drafts are seen
        model.learn(8, 32, 10_400, 1.3 * cpu_s(8, 32, 10_400) * rng.lognormal(0, NOISE))
    after = model.predict(8, 8, 10_400)[0] / model.predict(8, 32, 10_400)[0]
    # A cell's own average moves by 1/32 of a surprise and the common factor by 0.02 of it: the factor takes
    # 0.02 / (0.02 + 1/32) = 0.39 of ln 1.3, and the cell the rest, until a step without drafts says otherwise.
    assert math.log(before / after) < 0.7 * math.log(1.3)
    assert model.predict(8, 32, 10_400)[0] == pytest.approx(1.3 * cpu_s(8, 32, 10_400), rel=0.05)


def test_memory_is_bounded_and_the_longest_unvisited_goes():
    model = TimeModel()
    for calls in range(1, 400, 3):
        for nodes in (0, 1, 3, 7, 15, 31):
            model.learn(calls, calls * (1 + nodes), 0, cpu_s(calls, calls * (1 + nodes), 0))
    assert len(model._cells) <= MAX_CELLS
    assert model.predict(398, 398 * 32, 0)[1] < model.predict(1, 32, 0)[1]


def test_break_even_points():
    planner = Planner(SpeculationConfig(max_depth=8, budget_nodes=32), GovernorConfig())
    planner.times = taught(cpu_s, grid(batches=(1, 2, 4, 8, 16, 32, 64)), visits=SETTLED)
    for batch in (1, 8, 64):
        truth = cpu_s(batch, 8 * batch, 1300 * batch) / cpu_s(batch, batch, 1300 * batch)
        # A ratio of two predictions, each as exact as above.
        assert planner.break_even_tokens(batch, 7, 1300 * batch) == pytest.approx(truth, rel=2 * 0.041)
    # Two tokens a step with 7 nodes pay where 12 + 1.4 n < 2 (12 + 0.2 n), up to n = 12 (in ms, context apart).
    assert 8 <= planner.break_even_sequences(2.0, 7, 1300, most=64) <= 16
    assert planner.break_even_sequences(100.0, 7, 1300, most=64) == 64
    assert planner.break_even_sequences(1.0, 7, 1300, most=64) == 0


def test_a_question_before_any_step_is_refused():
    with pytest.raises(ValueError, match="before any step"):
        TimeModel().predict(1, 1, 0)


STEPS = st.tuples(st.integers(1, 512), st.integers(0, 64), st.integers(0, 10**7), st.floats(1e-5, 1e3))


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=60), st.integers(1, 600), st.integers(0, 64), st.integers(0, 10**7))
def test_whatever_it_is_told_it_answers_with_positive_numbers(steps, calls, nodes, context):
    model = TimeModel()
    for n, k, tokens, seconds in steps:
        counted = model.learn(n, n * (1 + k), tokens, seconds)
        assert counted > 0 and math.isfinite(counted)
    seconds, sigma = model.predict(calls, calls * (1 + nodes), context)
    assert seconds > 0 and math.isfinite(seconds) and 0 < sigma <= 0.5
    assert model.worst(calls, calls * (1 + nodes), context) > 0
    assert calls <= model.reach(calls, calls * (1 + nodes))


def test_learning_is_cheap():
    model = taught(cpu_s, grid(), visits=SETTLED)
    cheapest = math.inf
    for _ in range(20):  # the quietest of 20 stretches: what others do on this machine is not to be measured
        began = time.thread_time()
        for _ in range(200):
            model.learn(16, 64, 20_800, 0.025)
        cheapest = min(cheapest, (time.thread_time() - began) / 200)
    assert cheapest < 20e-6  # required: 0.2 % of the shortest steps that engines have, some 10 ms
