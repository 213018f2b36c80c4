"""launch/slurm.sh from start to end on this machine; commands of Slurm and Ray are scripts that keep their calls."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm.sh"
NODES = ("gpu07", "gpu08", "gpu09")
ADDRESS = "10.1.2.3"
TIMEOUT_S = 30.0  # of a script that sleeps two or three times for a second

COMMANDS = {
    "scontrol": """case "$1" in show) printf '%s\\n' gpu07 gpu08 gpu09;; esac""",
    "hostname": f"echo {ADDRESS} 192.168.0.9",
    "srun": """while [[ "$1" == --* ]]; do shift; done; exec "$@" """,
    "ray": """
case "$1" in
start)
    if [[ "$*" == *--head* && -n "${HEAD_DIES:-}" ]]; then exit 1; fi
    echo $$ >> "$TRACE.pids"
    if [[ "$*" == *--head* ]]; then touch "$TRACE.head"; else touch "$TRACE.workers"; fi
    exec sleep 600;;
health-check) test -e "$TRACE.head";;
list) if [[ -e "$TRACE.workers" ]]; then echo '[{}, {}, {}]'; else echo '[{}]'; fi;;
job) exit "${RUN_EXITS:-0}";;
esac""",
    "python": f"""
if [[ "$1" == -c ]]; then exec {sys.executable} "$@"; fi
case "$*" in
*" stop "*) touch "$TRACE.stop";;
*) if [[ -n "${{RUN_WAITS:-}}" ]]; then until [[ -e "$TRACE.stop" ]]; do sleep 0.1; done; fi; exit "${{RUN_EXITS:-0}}";;
esac""",
}


@dataclass
class Allocation:
    """A directory that looks like the repository inside a Slurm job."""

    folder: Path

    @property
    def trace(self) -> Path:
        return self.folder / "trace"

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        env = {
            "PATH": os.environ["PATH"],
            "TRACE": str(self.trace),
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "gpu[07-09]",
            "SLURM_CPUS_PER_TASK": "64",
            "SLURM_GPUS_ON_NODE": "8",
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env=env | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, output

    def calls(self) -> list[str]:
        return self.trace.read_text().splitlines()

    def living(self) -> list[int]:
        """`ray start` processes that were left behind."""
        pids = Path(f"{self.trace}.pids")
        return [int(pid) for pid in pids.read_text().split() if Path(f"/proc/{pid}").exists()] if pids.exists() else []


@pytest.fixture
def allocation(tmp_path: Path) -> Allocation:
    commands = tmp_path / ".venv" / "bin"  # where the script looks first
    commands.mkdir(parents=True)
    for name, body in COMMANDS.items():
        path = commands / name
        path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "$TRACE"\n{body}\n')
        path.chmod(0o755)
    return Allocation(tmp_path)


def index_of(calls: list[str], *parts: str) -> int:
    (index,) = [i for i, call in enumerate(calls) if all(part in call for part in parts)]
    return index


def test_is_shell() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_head_then_workers_then_the_run(allocation: Allocation) -> None:
    code, output = allocation.run("experiment=qwen3_235b_rl_20k", "run_dir=/shared/a run")
    calls = allocation.calls()
    head = index_of(calls, "srun", "--nodelist=gpu07", "ray start --head", "--port=6379", "--dashboard-port=8265")
    rest = index_of(calls, "srun", "--nodes=2", "--nodelist=gpu08,gpu09", f"ray start --address={ADDRESS}:6379")
    run = index_of(calls, "python -m launch.submit", f"--address http://{ADDRESS}:8265", "--job-id longroll-41-0")
    assert code == 0, output
    assert head < rest < run
    assert calls[run].endswith("experiment=qwen3_235b_rl_20k run_dir=/shared/a run")
    for call in (calls[head], calls[rest]):
        assert "--num-gpus=8" in call and "--num-cpus=64" in call and "--block" in call
    assert allocation.living() == []


def test_other_modules_are_submitted_too(allocation: Allocation) -> None:
    code, output = allocation.run("experiment=qwen3_235b_serving", LONGROLL_MODULE="launch.serve")
    assert code == 0, output
    call = allocation.calls()[index_of(allocation.calls(), "ray job submit")]
    assert call.endswith("--working-dir . -- python -m launch.serve experiment=qwen3_235b_serving")


def test_exit_code_is_the_runs(allocation: Allocation) -> None:
    code, output = allocation.run("experiment=tiny_grpo", RUN_EXITS="7")
    assert code == 7, output
    assert allocation.living() == []


def test_head_that_does_not_start_is_said(allocation: Allocation) -> None:
    code, output = allocation.run("experiment=tiny_grpo", HEAD_DIES="1")
    assert code == 1
    assert f"ray start ended before head on {ADDRESS}:6379" in output
    assert not any("launch.submit" in call for call in allocation.calls())


def test_term_stops_the_run_and_queues_it_again(allocation: Allocation) -> None:
    process = allocation.start("experiment=tiny_grpo", RUN_WAITS="1")
    give_up_at = time.monotonic() + TIMEOUT_S
    while not (allocation.trace.exists() and any("launch.submit" in call for call in allocation.calls())):
        assert process.poll() is None and time.monotonic() < give_up_at
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    calls = allocation.calls()
    assert process.returncode == 143, output
    assert index_of(calls, "launch.submit", "stop longroll-41-0") < index_of(calls, "scontrol requeue 41")
    assert allocation.living() == []


def test_refuses_outside_a_job(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode != 0 and "sbatch launch/slurm.sh" in done.stderr
