"""Databases for the tests of the journal: a SQLite file, and a real PostgreSQL that this module starts.

Requests and chunks that the tests write are made here too.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from rollout.config import JournalConfig
from rollout.journal.records import TrajectoryKey
from rollout.routing import RoutingRef
from rollout.types import (
    ChunkResult,
    FinishReason,
    Group,
    Prompt,
    RolloutRequest,
    SamplingParams,
    Status,
    Trajectory,
    VersionSpan,
)

SERVER_START_S = 120.0  # initdb and the first start on a busy machine
INSTALL_S = 600.0
SERVER_USERS = ("postgres", "nobody")


def server_programs() -> Path | None:
    """The directory of initdb and postgres, or None."""
    found = [Path(path).resolve().parent for path in [shutil.which("initdb")] if path is not None]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((path for path in found if (path / "initdb").exists() and (path / "postgres").exists()), None)


def _programs_or_skip() -> Path:
    """The server's programs. In CI they are installed from Debian's packages where they are missing, or it fails."""
    programs, has_setpriv = server_programs(), shutil.which("setpriv") is not None
    if "CI" in os.environ and (programs is None or not has_setpriv):
        for command in (["update"], ["install", "--yes", "--no-install-recommends", "postgresql", "util-linux"]):
            quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(["apt-get", "-qq", *command], check=True, env=quiet, timeout=INSTALL_S)
        programs, has_setpriv = server_programs(), shutil.which("setpriv") is not None
        assert programs is not None and has_setpriv, "installed postgresql and util-linux, and found no server"
    if programs is None or not has_setpriv:
        pytest.skip("no PostgreSQL server here: install Debian's package postgresql (and util-linux for setpriv)")
    return programs


def _as_server_user(directory: Path) -> list[str]:
    """PostgreSQL refuses to run as root. It dies with the tests, however they end."""
    command = ["setpriv", "--pdeathsig=INT"]
    if os.getuid() != 0:
        return command
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = next(known[name] for name in SERVER_USERS if name in known)
    os.chown(directory, user.pw_uid, user.pw_gid)
    return [*command, f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """Start a server on a Unix socket in a directory of its own; yields its DSN. Skips the test without one."""
    programs = _programs_or_skip()
    directory = Path(tempfile.mkdtemp(prefix="lr-pg-"))  # a short path: a socket's may have 107 bytes
    prefix, data = _as_server_user(directory), directory / "data"
    try:
        make = [programs / "initdb", "-D", data, "-A", "trust", "-U", "longroll", "-E", "UTF8", "--locale=C", "-N"]
        subprocess.run([*prefix, *map(str, make)], check=True, capture_output=True, timeout=SERVER_START_S)
        # -F: no fsync; the tests kill the journal's process, not the server's machine.
        serve = [programs / "postgres", "-D", data, "-k", directory, "-h", "", "-F"]
        with (directory / "log").open("wb") as log:
            server = subprocess.Popen([*prefix, *map(str, serve)], stdout=log, stderr=log)
        try:
            dsn = f"postgresql:///postgres?host={directory}&user=longroll"
            _await_server(dsn, server, directory / "log")
            yield dsn
        finally:
            server.terminate()
            server.wait()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _await_server(dsn: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SERVER_START_S
    while True:
        try:
            psycopg.connect(dsn).close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"PostgreSQL did not start: {log.read_text()}") from None
            time.sleep(0.02)


def fresh_schema(dsn: str, name: str) -> str:
    """DSN of an empty schema of that server."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f'CREATE SCHEMA "{name}"')
    return f"{dsn}&options=-csearch_path%3D{name}"


def config_of(dsn: str, **changes: object) -> JournalConfig:
    """A journal that answers at once, and does not wait for owners."""
    return replace(JournalConfig(dsn=dsn, group_commit_ms=0.0, owner_wait_s=0.0, retention_s=100.0), **changes)  # type: ignore[arg-type]


def request_of(*group_ids: str, n: int = 2, **changes: object) -> RolloutRequest:
    """Groups of `n` samples with prompts that carry metadata."""
    prompts = tuple(
        Prompt(token_ids=(1, 2, 3 + i), prompt_id=f"p-{one}", metadata={"index": i, "task": {"name": "sum"}})
        for i, one in enumerate(group_ids)
    )
    request = RolloutRequest(
        prompts=prompts,
        n_samples_per_prompt=n,
        sampling=SamplingParams(max_tokens=64, top_k=5, stop_token_ids=(2, 9)),
        run_seed=11,
        group_ids=group_ids,
        reward="reasoning_gym",
        priority=1,
    )
    return replace(request, **changes)  # type: ignore[arg-type]


def chunk_of(num_tokens: int, seed: int = 0, *, version: int = 0, exact: bool = False) -> ChunkResult:
    """A chunk of two versions; `exact` gives log-probabilities that are no float32."""
    draw = random.Random(seed)
    logprobs = [-draw.expovariate(1.0) for _ in range(num_tokens)]
    if not exact:
        logprobs = [float(int(value * 1024)) / 1024 for value in logprobs]
    half = num_tokens // 2
    bounds = [(version, 0, half), (version + 1, half, num_tokens)]
    return ChunkResult(
        trajectory_id="h:x/0",
        token_ids=tuple(draw.randrange(150_000) for _ in range(num_tokens)),
        logprobs=tuple(logprobs),
        spans=tuple(VersionSpan(version=v, start=a, stop=b) for v, a, b in bounds if b > a),
        finish_reason=FinishReason.LENGTH,
        shard=seed % 3,
        num_cached_tokens=5,
        ttft_s=0.1,
        duration_s=1.7,
        routing=RoutingRef(ref=f"file-{seed}", num_bytes=9, first_token=0, num_tokens=num_tokens),
    )


def key_of(group_id: str, sample_index: int = 0, run_id: str = "run") -> TrajectoryKey:
    return TrajectoryKey(run_id=run_id, group_id=group_id, sample_index=sample_index)


def member(group: Group, sample_index: int, chunks: list[ChunkResult]) -> Trajectory:
    """The trajectory of a group with those chunks appended."""
    trajectory = group.trajectories[sample_index]
    for chunk in chunks:
        trajectory.append(chunk)
    return trajectory


def ended(trajectory: Trajectory, reward: float | None = 0.5, status: Status = Status.COMPLETED) -> Trajectory:
    """The same trajectory, ended."""
    trajectory.move_to(status)
    trajectory.finish_reason, trajectory.reward = FinishReason.STOP, reward
    trajectory.metadata["generate_s"] = 1.25
    return trajectory
