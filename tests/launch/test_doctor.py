from __future__ import annotations

import pytest
from rich.console import Console

from launch import doctor
from launch.doctor import Finding, Verdict


def test_a_check_that_raises_is_a_finding() -> None:
    def broken() -> Finding:
        raise ImportError("libfoo is missing")

    (finding,) = doctor.examine([("foo", broken)])
    assert finding.verdict is Verdict.WRONG
    assert "libfoo" in finding.seen and finding.mend


@pytest.mark.parametrize("verdict", list(Verdict))
def test_exit_code_and_table(
    verdict: Verdict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Finding(subject="thing", verdict=verdict, seen="something", mend="mend it so")
    monkeypatch.setattr(doctor, "examine", lambda: [row])
    assert doctor.main() == (1 if verdict is Verdict.WRONG else 0)
    printed = capsys.readouterr().out
    assert "thing" in printed and "mend it so" in printed


def test_compiler_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    finding = doctor.compiler()
    assert finding.verdict is Verdict.WRONG and "g++" in finding.mend


def test_quick_checks_are_right_here() -> None:
    checks = [
        c
        for c in doctor.CHECKS
        if c[0]
        in (
            "Python",
            "torch",
            "torchvision",
            "triton",
            "package name `kernels`",
            "C++ compiler",
            "/dev/shm",
            "model directory",
            "vLLM plug-ins",
        )
    ]
    wrong = [f for f in doctor.examine(checks) if f.verdict is Verdict.WRONG]
    assert not wrong
    Console(file=None, quiet=True).print(doctor.table(wrong))
