"""Kills one process of a run after another and waits for the run to go on. A part of launch.chaos.

    run goes on ─► a random while ─► SIGKILL or SIGSTOP ─► everything is there again and something new is durable ─► …

Kills are spread over the steps of the run. Owns the record of every kill, a line of kills.jsonl, from which a campaign
that was interrupted goes on.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import psutil

from launch.chaos_operator import Operator, Standing
from launch.chaos_victims import NEEDS_OPERATOR, Kind, Strike, by_kind, is_gone, plan

POLL_S = 0.25
LEAVE_S = 20.0  # after recovery: how long the victim of a SIGSTOP may take to be gone


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How long things may take, in seconds.

    Attributes:
        max_delay_s: Delays between recovery and the next kill are uniform below it.
        notice_s: After which an operator kills a stopped driver or trainer rank, which nobody else looks after.
        recovery_s: After which a run that does not recover is ended by the operator, and counted as stuck.
    """

    max_delay_s: float
    notice_s: float
    recovery_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """What was killed, and how the run got over it.

    Attributes:
        number: From 1.
        kind: See chaos_victims.Kind.
        signal: SIGKILL or SIGSTOP.
        title: Of the process.
        step: Steps that were done.
        num_pending_groups: Under way at that moment; 0: it trained, published or saved.
        recovery_s: Until all processes were there again and something new was durable; with a SIGSTOP, from then on.
        num_restarts: Times the operator had to start the run again for it.
        is_stuck: It did not recover in time.
        num_left: 1 where the victim of a SIGSTOP was still there afterwards.
    """

    number: int
    kind: str
    signal: str
    title: str
    step: int
    num_pending_groups: int
    recovery_s: float
    num_restarts: int
    is_stuck: bool = False
    num_left: int = 0


class Campaign:
    """Kills until a number is reached or the run is complete.

    Args:
        operator: Of the run.
        numbers: Processes of each kind when all are there.
        seed: Decides whom and when.
        bounds: Times.
        path: kills.jsonl.
        say: Told what happens, in words.
    """

    def __init__(
        self,
        operator: Operator,
        numbers: Mapping[Kind, int],
        seed: int,
        bounds: Bounds,
        path: Path,
        say: Callable[[str], None],
    ) -> None:
        self._operator, self._bounds, self._path, self._say = operator, bounds, path, say
        self._numbers = numbers
        self._plan: Iterator[Strike] = plan(seed, bounds.max_delay_s)
        self.kills = read_kills(path)

    def run(self, num_kills: int, num_steps: int) -> None:
        """Make the kills that are missing, evenly over so many steps, then let the run end."""
        for strike in islice(self._plan, len(self.kills), num_kills):
            if not self._goes_on(len(self.kills) * num_steps // (num_kills + 1)) or not self._wait(strike.delay_s):
                break
            kill = self._strike(strike)
            if kill is None:
                break
            self.kills.append(kill)
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(kill)) + "\n")
            self._say(line(kill))
        self._operator.finish(POLL_S)

    def _goes_on(self, num_steps: int) -> bool:
        """Wait until so many steps are done and something new is durable; False when the run is complete."""
        before = self._operator.standing()
        while (now := self._operator.standing()) == before or now.num_steps < num_steps:
            self._operator.look()
            if self._operator.is_complete:
                return False
            time.sleep(POLL_S)
        return True

    def _wait(self, delay_s: float) -> bool:
        until = time.monotonic() + delay_s
        while time.monotonic() < until:
            self._operator.look()
            if self._operator.is_complete:
                return False
            time.sleep(min(POLL_S, max(0.0, until - time.monotonic())))
        return True

    def _strike(self, strike: Strike) -> Kill | None:
        """Kill one, and see the run recover; None when it was complete before there was anybody to kill."""
        found = self._find(strike)
        if found is None:
            return None
        victim, title = found
        standing, began = self._operator.standing(), time.monotonic()
        num_lives = len(self._operator.lives)
        self._say(f"kill {len(self.kills) + 1}: {strike.signal.name} to {strike.kind.value} ({title})")
        os.kill(victim.pid, strike.signal)
        if strike.signal is signal.SIGSTOP and strike.kind in NEEDS_OPERATOR:
            time.sleep(self._bounds.notice_s)
            if not is_gone(victim):
                victim.kill()
        has_recovered = self._recovers(victim, began + self._bounds.recovery_s)
        if not has_recovered:
            self._operator.end_life()
            self._operator.look()
        recovery_s = time.monotonic() - began
        _, left = psutil.wait_procs([victim], timeout=LEAVE_S)
        return Kill(
            number=len(self.kills) + 1,
            kind=strike.kind.value,
            signal=strike.signal.name,
            title=title,
            step=standing.num_steps,
            num_pending_groups=standing.num_unfinished,
            recovery_s=round(recovery_s, 1),
            num_restarts=len(self._operator.lives) - num_lives,
            is_stuck=not has_recovered,
            num_left=len(left),
        )

    def _find(self, strike: Strike) -> tuple[psutil.Process, str] | None:
        """The victim and its title, once everybody is there."""
        while not self._operator.is_complete:
            if not self._operator.look():
                there = by_kind(self._operator.pid)
                if self._is_whole(there):
                    victim = there[strike.kind][int(strike.draw * len(there[strike.kind]))]
                    try:
                        title = victim.cmdline()[0]
                    except (psutil.Error, IndexError):
                        continue  # it ended by itself
                    return victim, title
            time.sleep(POLL_S)
        return None

    def _is_whole(self, there: Mapping[Kind, Sequence[psutil.Process]]) -> bool:
        return all(len(there[kind]) >= number for kind, number in self._numbers.items())

    def _recovers(self, victim: psutil.Process, deadline: float) -> bool:
        """Wait until everybody is there without the victim, and then for something durable."""
        since: Standing | None = None
        while time.monotonic() < deadline:
            if self._operator.is_complete:
                return True
            if self._operator.look():
                since = None
            elif since is None:
                there = by_kind(self._operator.pid)
                others = {kind: [p for p in some if p.pid != victim.pid] for kind, some in there.items()}
                if self._is_whole(others):
                    since = self._operator.standing()
            elif self._operator.standing() != since:
                return True
            time.sleep(POLL_S)
        return False


def read_kills(path: Path) -> list[Kill]:
    """Kills of a campaign so far."""
    return [Kill(**json.loads(text)) for text in path.read_text().splitlines()] if path.is_file() else []


def line(kill: Kill) -> str:
    """A row of the table."""
    how = f"{kill.num_restarts} restarts" if kill.num_restarts else "in place"
    how = "STUCK" if kill.is_stuck else how
    where = f"{kill.num_pending_groups} groups under way" if kill.num_pending_groups else "training or publishing"
    left = ", the victim is still there" if kill.num_left else ""
    return (
        f"{kill.number:3d}  {kill.signal:<8} {kill.kind:<14} step {kill.step + 1:3d}, {where:<22} "
        f"recovered in {kill.recovery_s:6.1f} s, {how}{left}"
    )
