from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.compose import compose, to_yaml
from launch.evaluation import Evaluation
from launch.resume import check_same_run
from launch.train import evaluation_before
from rollout.config import RunConfig, WorkloadConfig
from rollout.cursor import Cursor
from rollout.errors import CheckpointBroken, InvalidRequest


def test_a_resumed_run_never_measures_its_start_with_later_weights(tmp_path: Path) -> None:
    cursor, unused = Cursor(step=3, version=3, data_cursor=48), None
    config = RunConfig(workload=WorkloadConfig(eval_problems=2))
    arguments: Any = (config, tmp_path, unused, unused, cursor, unused)
    with pytest.raises(CheckpointBroken, match=r"eval_before\.json"):
        evaluation_before(*arguments)
    saved = Evaluation(rewards=(1.0, None), exact=(True, None), lengths=(3, 4), version=0, duration_s=1.0)
    saved.save(tmp_path / "eval_before.json")
    assert evaluation_before(*arguments) == saved
    config.workload.eval_problems = 3
    with pytest.raises(InvalidRequest, match="2, as when this run began"):
        evaluation_before(*arguments)


def test_a_checkpoint_is_not_continued_as_another_run(tmp_path: Path) -> None:
    config = compose(["experiment=tiny_grpo"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    check_same_run(compose(["experiment=tiny_grpo", "trainer.lr=1"]), tmp_path)  # no checkpoint yet
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").touch()
    check_same_run(config, tmp_path)
    check_same_run(compose(["experiment=tiny_grpo", "trainer.num_steps=99"]), tmp_path)
    check_same_run(compose(["experiment=tiny_grpo", "trainer.lr=1", "resume=false"]), tmp_path)
    with pytest.raises(InvalidRequest, match=r"trainer\.lr: got 1\.0, expected 0\.0002"):
        check_same_run(compose(["experiment=tiny_grpo", "trainer.lr=1"]), tmp_path)
