from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.evaluation import Evaluation
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
