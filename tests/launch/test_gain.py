"""launch.gain: gains on the same problems, and their ratio's interval."""

from pathlib import Path

import numpy as np
import pytest

from launch.compose import compose, to_yaml
from launch.evaluation import Evaluation
from launch.gain import Options, config_of, gains, main, ratio_interval
from rollout.errors import InvalidRequest


def _evaluation(rewards: list[float | None]) -> Evaluation:
    return Evaluation(
        rewards=tuple(rewards), exact=tuple(None for _ in rewards), lengths=(1,) * len(rewards), version=0, duration_s=1
    )


def test_a_failed_problem_counts_as_unanswered() -> None:
    assert gains(_evaluation([0, 1, None, 0]), _evaluation([1, None, 1, 0])).tolist() == [1, -1, 1, 0]


def test_the_interval_holds_the_ratio_and_shrinks_with_problems() -> None:
    random = np.random.default_rng(3)

    def width(num_problems: int) -> float:
        first = random.choice([0.0, 1.0], size=num_problems)
        low, high = ratio_interval(first, first * random.choice([0.8, 1.2], size=num_problems))
        assert low < 1.0 < high
        return high - low

    # a mean's interval is as wide as 1 / √n: 16 times the problems, a quarter of it
    assert width(1600) / width(100) == pytest.approx(0.25, abs=0.1)


def test_the_same_run_twice_has_a_ratio_of_one() -> None:
    first = np.array([0.0, 1.0] * 50)
    assert ratio_interval(first, first) == (1.0, 1.0)


def test_a_run_s_own_configuration_is_used(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(compose(["experiment=tiny_grpo_int4", "trainer.lr=0.125"])))
    config = config_of(tmp_path, 77)
    assert (config.engine.quantization, config.trainer.lr, config.workload.eval_problems) == ("int4", 0.125, 77)
    assert config.trainer.betas == tuple(config.trainer.betas)


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidRequest, match="runs"):
        Options()
    assert main([f"runs={tmp_path}"]) == 2
    assert "config.yaml" in capsys.readouterr().err
    assert main([f"runs={tmp_path}", "trainer.lr=1"]) == 2
