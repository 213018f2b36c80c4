"""Rates over a window."""

from __future__ import annotations

import pytest

from rollout.rate import RateWindow


def test_the_rate_forgets_what_is_older_than_the_window() -> None:
    rate = RateWindow(10.0)
    assert rate.per_second == 0.0
    for second in range(31):
        rate.sample(float(second), 100 * second if second <= 20 else 2000)
    assert rate.per_second == 0.0, "nothing came in the last ten seconds"
    rate.sample(31.0, 2110)
    assert rate.per_second == pytest.approx(11.0)
