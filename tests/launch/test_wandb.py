"""W&B's three ways: online and offline runs, and the run of before continued."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from launch.monitor import Monitor
from rollout.config import MonitorConfig


class Recorder:
    """Takes the place of wandb.init and of the run that it gives."""

    def __init__(self) -> None:
        self.settings: list[dict[str, Any]] = []
        self.ends: list[int] = []

    def __call__(self, **settings: Any) -> Recorder:
        self.settings.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None: ...

    def finish(self, exit_code: int) -> None:
        self.ends.append(exit_code)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    import wandb

    made = Recorder()
    monkeypatch.setattr(wandb, "init", made)
    return made


def run(folder: Path, exit_code: int = 0, **options: Any) -> Monitor:
    monitor = Monitor(MonitorConfig(progress="off", **options), folder, {"trainer": {"lr": 1e-4}}, num_steps=1)
    monitor.finish(exit_code=exit_code)
    return monitor


def test_same_directory_continues_the_same_run(tmp_path: Path, recorder: Recorder) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, first, second):
        run(folder, wandb_mode="online")
    ids = [settings["id"] for settings in recorder.settings]
    assert ids[0] == ids[1] != ids[2]
    for settings in recorder.settings:
        assert (settings["mode"], settings["resume"]) == ("online", "allow")
        assert settings["config"] == {"trainer": {"lr": 1e-4}} and settings["project"] == "longroll"


def test_a_run_of_your_own_is_continued(tmp_path: Path, recorder: Recorder) -> None:
    run(tmp_path, wandb_mode="online", wandb_run_id="mine", wandb_project="ours", exit_code=3)
    (settings,) = recorder.settings
    assert (settings["id"], settings["project"], settings["dir"]) == ("mine", "ours", str(tmp_path))
    assert recorder.ends == [3]


def test_disabled_starts_nothing(tmp_path: Path, recorder: Recorder) -> None:
    run(tmp_path, wandb_mode="disabled")
    assert recorder.settings == []


@pytest.mark.slow
def test_offline_run_that_is_resumed_has_one_id(tmp_path: Path) -> None:
    """`wandb sync` joins files of one id into one run."""
    ids = set()
    for _ in range(2):
        monitor = run(tmp_path, wandb_mode="offline")
        assert monitor.num_wandb_failures == 0
        ids.add(monitor.run_id)
        time.sleep(1.1)  # W&B names directories by the second
    (run_id,) = ids
    files = list(tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2


@pytest.mark.slow
def test_online_without_an_account_is_said_and_never_stops_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monitor = run(tmp_path, wandb_mode="online")
    assert monitor.num_wandb_failures == 1
    assert len([record for record in caplog.records if "W&B failed" in record.message]) == 1
