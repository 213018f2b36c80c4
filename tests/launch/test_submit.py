from __future__ import annotations

import pytest

from launch import submit, train
from launch.cluster import JOB_MARK, run_directory


def test_a_mistake_is_said_before_anything_is_submitted(capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["experiment=tiny_grpo", "trainer.lrr=1"]) == 2
    assert "trainer.lr" in capsys.readouterr().err


def test_no_cluster_is_a_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["--address", "http://127.0.0.1:9", "status", "none"]) == 3
    assert "ray start" in capsys.readouterr().err


def test_train_prints_configuration_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["experiment=tiny_grpo", "--cfg"]) == 0
    assert "num_shards: 2" in capsys.readouterr().out
    assert train.main(["--help"]) == 0


def test_train_refuses_before_it_starts_anything(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["model.path=models/none"]) == 2
    assert "model.path" in capsys.readouterr().err
    assert train.main(["trainer.num_step=3"]) == 2
    assert "trainer.num_steps" in capsys.readouterr().err


def test_run_directory_of_a_job_survives_it(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(JOB_MARK, "{}")
    assert run_directory("runs/a") == tmp_path / "longroll" / "runs" / "a"
    monkeypatch.delenv(JOB_MARK)
    monkeypatch.chdir(tmp_path)
    assert run_directory("runs/b") == tmp_path / "runs" / "b"
    assert run_directory(str(tmp_path / "c")).is_dir()
