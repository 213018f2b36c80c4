"""The model of a step's time, fitted while chunks come back."""

from __future__ import annotations

import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.scheduler.step_costs import MIN_CHUNKS, MIN_TOKENS, StepCosts

FIXED_S, SEQUENCE_S, TOKEN_S = 0.01, 2e-4, 1e-8


def step_s(batch, context):
    return FIXED_S + SEQUENCE_S * batch + TOKEN_S * context


def test_it_recovers_the_coefficients_that_chunks_were_made_with():
    costs, rng = StepCosts(), random.Random(1)
    for _ in range(400):
        batch, context = rng.randint(1, 256), rng.randint(0, 2_000_000)
        costs.learn(512, 512 * step_s(batch, context), batch, context)
    for batch, context in ((1, 0), (64, 100_000), (256, 1_900_000)):
        # Exact data: what is left is the prior, of weight 1e-3 against some 200 remembered chunks.
        assert math.isclose(costs.token_s(batch, context), step_s(batch, context), rel_tol=1e-3)
    assert 0 < costs.prefill_s(1000) < 1000 * costs.token_s(1, 0)


def test_it_follows_a_change():
    costs, rng = StepCosts(), random.Random(2)
    for factor in (1.0, 3.0):
        for _ in range(2000):  # 0.995 ** 2000 of the old ones is left: 4e-5
            batch, context = rng.randint(1, 256), rng.randint(0, 2_000_000)
            costs.learn(512, 512 * factor * step_s(batch, context), batch, context)
    assert math.isclose(costs.token_s(64, 100_000), 3 * step_s(64, 100_000), rel_tol=1e-2)


def test_chunks_that_are_all_alike_leave_it_finite_and_right_where_they_were():
    costs = StepCosts()
    for _ in range(20_000):
        costs.learn(64, 64 * step_s(8, 4096), 8, 4096)
    assert math.isclose(costs.token_s(8, 4096), step_s(8, 4096), rel_tol=1e-3)
    assert math.isfinite(costs.token_s(4096, 10**8))
    costs.learn(64, 64 * step_s(200, 10**6), 200, 10**6)
    assert math.isfinite(costs.token_s(200, 10**6))


def test_little_is_not_priced_and_tiny_chunks_tell_nothing():
    costs = StepCosts()
    for _ in range(MIN_CHUNKS):
        assert not costs.is_known
        costs.learn(MIN_TOKENS - 1, 1.0, 1, 1)
        costs.learn(MIN_TOKENS, 0.0, 1, 1)
    assert not costs.is_known and costs.token_s(1, 1) == 0
    for _ in range(MIN_CHUNKS):
        costs.learn(MIN_TOKENS, 1.0, 1, 1)
    assert costs.is_known


CHUNKS = st.tuples(
    st.integers(1, 5000), st.floats(0, 1e4, allow_nan=False), st.integers(1, 4096), st.integers(0, 10**8)
)


@settings(max_examples=50, deadline=None)
@given(st.lists(CHUNKS, max_size=80), st.integers(1, 4096), st.integers(0, 10**8))
def test_it_is_never_negative_and_never_falls(chunks, batch, context):
    costs = StepCosts()
    for chunk in chunks:
        costs.learn(*chunk)
        priced = costs.token_s(batch, context)
        assert math.isfinite(priced) and 0 <= priced <= costs.token_s(batch + 1, context + 1)
        assert costs.prefill_s(100) >= 0
