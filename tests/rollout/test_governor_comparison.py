"""Turns of steps that are compared."""

import numpy as np

from rollout.governor.comparison import TURN_STEPS, is_on_hold, turn_of


def test_one_turn_of_each_pair_is_on_hold() -> None:
    steps = range(64 * TURN_STEPS)
    by_turn = [{is_on_hold(step) for step in steps if turn_of(step) == turn} for turn in range(64)]
    assert all(len(one) == 1 for one in by_turn), "a turn is of one kind"
    assert all(by_turn[turn] != by_turn[turn + 1] for turn in range(0, 64, 2))


def test_a_pace_that_drifts_favours_neither() -> None:
    """Sums over 16 turns of what grows as the turn's number, and as its square and cube, are the same."""
    turns = np.arange(16)
    on_hold = np.array([is_on_hold(turn * TURN_STEPS) for turn in turns])
    for power in (1, 2, 3):
        assert (turns[on_hold] ** power).sum() == (turns[~on_hold] ** power).sum()
