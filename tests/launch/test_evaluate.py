"""Settings of an accuracy regression, and the paired comparison."""

from __future__ import annotations

import math

import pytest

from launch.compose import compose
from launch.evaluate import Options, compare, main, table, with_setting
from launch.evaluation import Evaluation
from rollout.errors import InvalidRequest, LongrollError


def evaluation(exact: list[bool | None]) -> Evaluation:
    rewards = tuple(None if e is None else float(e) for e in exact)
    return Evaluation(rewards=rewards, exact=tuple(exact), lengths=(1,) * len(exact), version=0, duration_s=1.0)


@pytest.mark.parametrize(
    ("setting", "engine"),
    [
        ("bf16", ("bfloat16", None, "auto")),
        ("fp32", ("float32", None, "auto")),
        ("int4", ("bfloat16", "int4", "auto")),
        ("fp32+int8_kv", ("float32", None, "int8_per_token_head")),
        ("int4+int8_kv", ("bfloat16", "int4", "int8_per_token_head")),
    ],
)
def test_a_setting_changes_the_engine_only(setting: str, engine: tuple[str, str | None, str]) -> None:
    config = compose(["experiment=tiny_grpo"])
    changed = with_setting(config, setting)
    assert (changed.engine.dtype, changed.engine.quantization, changed.engine.kv_cache_dtype) == engine
    assert config.engine.quantization is None, "the experiment itself is as it was"


@pytest.mark.parametrize("setting", ["int3", "bf16+fp32", "int4+int4", ""])
def test_bad_settings(setting: str) -> None:
    with pytest.raises(InvalidRequest, match="setting"):
        with_setting(compose(["experiment=tiny_grpo"]), setting)


def test_the_interval_is_that_of_the_paired_differences() -> None:
    baseline = evaluation([True] * 60 + [False] * 40 + [None])
    other = evaluation([True] * 57 + [False] * 3 + [True] * 1 + [False] * 39 + [True])
    found = compare("int4", baseline, other)
    assert (found.num_problems, found.num_changed) == (100, 4)
    assert found.difference == pytest.approx(-2.0)
    # Differences: three of -1, one of +1, ninety-six of 0; sample variance (4 - 100 * 0.02**2) / 99.
    half = 1.959964 * math.sqrt((4 - 100 * 0.0004) / 99 / 100) * 100
    assert (found.low, found.high) == (pytest.approx(-2 - half), pytest.approx(-2 + half))
    assert "loses more than 1" in table([found], Options())
    assert "ok" in table([found], Options(max_loss=2.5))


def test_too_few_pairs() -> None:
    with pytest.raises(LongrollError, match="at least 30"):
        compare("int4", evaluation([True] * 29), evaluation([True] * 29))


def test_bad_input_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment=tiny_grpo", "settings=int5"]) == 2
    assert "setting: got int5" in capsys.readouterr().err
