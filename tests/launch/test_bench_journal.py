"""The journal's benchmark, very small, on both options that change what it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.bench_journal import main


def test_a_small_run_reports_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["tokens=20000", "in_flight=20", "trajectories=40", "recovery_chunks=2", "repeats=1", f"dir={tmp_path}"]
    assert main([*small, "chunk_tokens=64,16", f"out={tmp_path / 'out.json'}"]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert [one["chunk_tokens"] for one in record["writing"]] == [64, 16]
    assert all(record[f"tokens_per_s_{size}"] > 0 for size in (64, 16))
    assert record["recovery"]["tokens"] == 40 * 2 * 64 and record["recovery_s"] > 0
    assert "tokens_per_s_64" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "its files are gone"


def test_a_wrong_option_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chunks=3"]) == 2
    assert "chunks=3" in capsys.readouterr().err
