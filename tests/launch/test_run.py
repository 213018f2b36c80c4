"""Whole runs as a user starts them: a submitted Ray job, and a run that is killed and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 3
OVERRIDES = [
    "experiment=tiny_grpo",
    f"trainer.num_steps={NUM_STEPS}",
    "trainer.prompts_per_step=4",
    "trainer.checkpoint_every=1",
    "trainer.lr=1e-3",  # large enough that a step that is lost or repeated changes later tokens
    "sampling.max_tokens=96",
    "workload.eval_problems=16",
    "monitor.picture=false",
]
TIMEOUT_S = 600
ACTIVATED = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # as with the environment activated


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def kill_tree(pid: int) -> None:
    """SIGKILL a process and everything below it, all at once."""
    parent = psutil.Process(pid)
    for process in [parent, *parent.children(recursive=True)]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray head with its dashboard, apart from every other Ray on this machine; gives the dashboard's address."""
    gcs, dashboard, client, agent = free_ports(4)
    folder = Path(f"/tmp/lr{os.getpid()}")  # Ray's socket paths must stay under 107 bytes
    command = [
        str(Path(sys.executable).parent / "ray"),
        *("start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=4"),
        *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--temp-dir={folder}", "--disable-usage-stats"),
    ]
    with (tmp_path_factory.mktemp("ray") / "head.log").open("w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=os.environ | ACTIVATED)
    try:
        deadline = time.monotonic() + 120
        while True:
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            assert head.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        kill_tree(head.pid)
        head.wait()


def workers_of(pid: int) -> list[psutil.Process]:
    """Engines and actors below a driver. Ray's own agents are not counted; they take a minute to leave."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        title = " ".join(process.cmdline()[:1])
        if title.startswith(("VLLM::", "ray::")) and "Agent" not in title:
            found.append(process)
    return found


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def job_run_dir(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a run submitted with Ray's own command line."""
    run_dir = tmp_path_factory.mktemp("job") / "run"
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "ray"),
            *("job", "submit", f"--address={cluster}", "--working-dir", ".", "--"),
            *("python", "-m", "launch.train", *OVERRIDES, f"run_dir={run_dir}"),
        ],
        cwd=ROOT,
        env=os.environ | ACTIVATED,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert f"step   {NUM_STEPS}/{NUM_STEPS}" in done.stdout
    return run_dir


def test_a_submitted_job_runs_its_steps(job_run_dir: Path) -> None:
    summary = json.loads((job_run_dir / "summary.json").read_text())
    assert summary["num_weight_syncs"] == NUM_STEPS and summary["num_engine_shards"] == 2
    assert summary["num_trajectories_failed"] == 0 and summary["mismatch_kl"] < 1e-4
    steps = records(job_run_dir)
    assert [s["step"] for s in steps] == [1, 2, 3] and not any(s["is_skipped"] for s in steps)


def kill_a_trainer_rank(run: subprocess.Popen[bytes], log: Path) -> None:
    """SIGKILL one as soon as the run says that it goes on from its checkpoint."""
    deadline = time.monotonic() + TIMEOUT_S
    while "resumed after step" not in log.read_text():
        assert run.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    ranks = [one for one in workers_of(run.pid) if one.cmdline()[0].startswith("ray::TrainerRank")]
    assert len(ranks) == 2
    ranks[1].kill()


def test_a_run_killed_in_mid_step_resumes_and_repeats_the_same_trajectories(job_run_dir: Path, tmp_path: Path) -> None:
    """The second half of a killed run equals that of the undisturbed run: same tokens, so same weights.

    The second half loses a trainer rank as well, and goes on with the engines that it has.
    """
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "launch.train", *OVERRIDES, f"run_dir={run_dir}"]
    with (tmp_path / "first.log").open("w") as log:
        first = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not (run_dir / "checkpoints" / "latest").exists():  # step 1 is saved …
            assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "first.log").read_text()[-3000:]
            time.sleep(0.05)
        time.sleep(1.5)  # … and step 2 is generating
    finally:
        family = workers_of(first.pid) if first.poll() is None else []
        first.kill()
        first.wait()
    _, orphans = psutil.wait_procs(family, timeout=30)
    for orphan in orphans:
        orphan.kill()
    assert family and not orphans, f"outlived the driver: {[' '.join(o.cmdline()[:4]) for o in orphans]}"
    assert first.returncode == -signal.SIGKILL, (tmp_path / "first.log").read_text()[-3000:]
    assert not (run_dir / "summary.json").exists()
    said = tmp_path / "second.log"
    with said.open("w") as log:
        second = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    kill_a_trainer_rank(second, said)
    assert second.wait(TIMEOUT_S) == 0, said.read_text()[-5000:]
    assert "the trainer is dead" in said.read_text()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["num_trainer_restarts"] == 1 and summary["num_trajectories_failed"] == 0
    digests = [s["trajectories_digest"] for s in records(run_dir)]
    assert digests == [s["trajectories_digest"] for s in records(job_run_dir)]
    assert len(set(digests)) == NUM_STEPS
