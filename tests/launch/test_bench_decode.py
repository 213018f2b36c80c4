"""The arithmetic of the decode bench; the engines it starts are those of its own command."""

import pytest

from launch.bench_decode import INT4, PLAIN, STOCK, Line, Options, main, record, table
from rollout.errors import InvalidRequest

FAST = Line(batch=1, step_s={STOCK: [0.030, 0.032, 0.090], PLAIN: [0.040, 0.041, 0.042], INT4: [0.020, 0.020, 0.020]})
SLOW = Line(batch=8, step_s={STOCK: [0.060, 0.060, 0.060], PLAIN: [0.045, 0.045, 0.045], INT4: [0.030, 0.036, 0.045]})


def test_the_speedup_is_against_the_faster_baseline_round_by_round() -> None:
    assert (FAST.baseline, SLOW.baseline) == (STOCK, PLAIN)
    assert FAST.speedups == pytest.approx([1.5, 1.6, 4.5]) and FAST.speedup == pytest.approx(1.6)
    assert SLOW.speedups == pytest.approx([1.5, 1.25, 1.0]) and SLOW.speedup == pytest.approx(1.25)


def test_the_record_names_the_lowest_speedup_and_keeps_every_round() -> None:
    written = record(Options(), 7, [FAST, SLOW])
    assert written["decode_speedup"] == pytest.approx(1.25)
    assert [line["step_s"] for line in written["batches"]] == [FAST.step_s, SLOW.step_s]
    assert "1.60 × (1.50 … 4.50)" in table([FAST, SLOW])


def test_unknown_options_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="batches"):
        main(["batches=3"])
