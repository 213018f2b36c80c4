"""Runs launch.train as an operator or a job controller would: whenever it ends before it is complete, again.

Owns the process of the run and everything below it, what the run has made durable so far, and the record of its lives,
a line of lives.jsonl each. Kills nobody by itself but what is left of a life that has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from launch.chaos_victims import family, is_worker
from rollout.config import JournalConfig
from rollout.errors import InvalidRequest, LongrollError
from rollout.journal.opening import open_reader

ROOT = Path(__file__).resolve().parent.parent
LEAVE_S = 60.0  # what is below a driver ends by itself after it; what does not is counted and killed
STOP_S = 90.0  # to shut down cleanly
LOG_TAIL_BYTES = 4000
NUM_FUTILE = 3  # lives in a row that ended without anything durable: it is not the campaign that kills them


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What is durable of a run; it changes whenever the run goes on.

    Attributes:
        num_groups: Submitted.
        num_unfinished: Of them, with a pending trajectory.
        num_tokens: Of those.
        num_steps: Done, or written to steps.jsonl after a resume.
    """

    num_groups: int
    num_unfinished: int
    num_tokens: int
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """One process of the run that has ended.

    Attributes:
        exit_code: Negative for a signal.
        last_words: The first line at the end of its output that names an error, or "".
        num_orphans: Engines and actors that did not end with it.
    """

    exit_code: int
    last_words: str
    num_orphans: int


class Operator:
    """Keeps a run alive. A context manager: whatever is left of the run is ended with it.

    Args:
        overrides: Of launch.train, run_dir left out.
        run_dir: Of the run; its journal is journal.sqlite there.
    """

    def __init__(self, overrides: Sequence[str], run_dir: Path) -> None:
        self.run_dir = run_dir
        dsn = f"sqlite:///{run_dir / 'journal.sqlite'}"
        self.journal = JournalConfig(dsn=dsn)
        self._command = [sys.executable, "-m", "launch.train", *overrides, f"run_dir={run_dir}", f"journal.dsn={dsn}"]
        self._log = run_dir.with_name(f"{run_dir.name}.log")
        self._process: subprocess.Popen[bytes] | None = None
        self._family: list[psutil.Process] = []
        self._began = Standing(num_groups=0, num_unfinished=0, num_tokens=0, num_steps=0)
        self._num_futile = 0
        self._lives = run_dir.with_name(f"{run_dir.name}-lives.jsonl")
        known = self._lives.read_text().splitlines() if self._lives.is_file() else []
        self.lives = [Life(**json.loads(text)) for text in known]

    def __enter__(self) -> Operator:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        self.end_life()

    @property
    def is_complete(self) -> bool:
        return (self.run_dir / "summary.json").is_file()

    @property
    def pid(self) -> int:
        """Of the run's driver, which must have been started."""
        assert self._process is not None, "look() starts it"
        return self._process.pid

    def look(self) -> bool:
        """Start the run if it is not running and not complete. Returns whether it was (re)started.

        Raises:
            LongrollError: It ends again and again without having got anywhere.
        """
        if self._process is not None:
            if self._process.poll() is None:
                self._family = family(self._process.pid) or self._family
                return False
            self.end_life()
        if self.is_complete:
            return False
        self._began = self.standing()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        return True

    def end_life(self) -> None:
        """Kill the driver if it lives, wait for everything below it, and note how it ended."""
        if self._process is None:
            return
        process, self._process = self._process, None
        everyone = {one.pid: one for one in [*self._family, *family(process.pid)]}
        if process.poll() is None:
            process.kill()
        process.wait()
        _, late = psutil.wait_procs(list(everyone.values()), timeout=LEAVE_S)
        num_orphans = sum(is_worker(orphan) for orphan in late)
        for orphan in late:
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.kill()
        self._family = []
        last_words = self._last_words() if process.returncode else ""
        life = Life(exit_code=process.returncode, last_words=last_words, num_orphans=num_orphans)
        self.lives.append(life)
        with self._lives.open("a") as file:
            file.write(json.dumps(asdict(life)) + "\n")
        self._num_futile = self._num_futile + 1 if self.standing() == self._began else 0
        if self._num_futile >= NUM_FUTILE and not self.is_complete:
            raise LongrollError(
                f"{self._num_futile} starts in a row got nowhere; see {self._log}: {self._last_words()}"
            )

    def standing(self) -> Standing:
        """What is durable now."""
        steps = self.run_dir / "steps.jsonl"
        num_steps = len(steps.read_text().splitlines()) if steps.is_file() else 0
        try:
            with open_reader(self.journal) as reader:
                num_groups = sum(len(reader.run_keys(run_id)) for run_id in reader.run_ids())
                unfinished = reader.load(reader.unfinished_keys())
        except InvalidRequest:  # there is none yet
            return Standing(num_groups=0, num_unfinished=0, num_tokens=0, num_steps=num_steps)
        num_tokens = sum(one.num_tokens for group in unfinished for one in group.trajectories)
        return Standing(
            num_groups=num_groups, num_unfinished=len(unfinished), num_tokens=num_tokens, num_steps=num_steps
        )

    def finish(self, poll_s: float) -> None:
        """Let the run come to its end."""
        while not self.is_complete or self._process is not None:
            self.look()
            time.sleep(poll_s)

    def _last_words(self) -> str:
        if not self._log.is_file():
            return ""
        with self._log.open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        found = [line.strip()[:300] for line in lines if line.startswith("error:") or "Error" in line]
        return found[0] if found else ""
