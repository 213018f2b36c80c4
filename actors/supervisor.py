"""Keeps a service whole: a controller that died is made anew, a group of shards that died is started again.

Owns the threads that look and start, and what they counted; it also starts the groups that were asked for and stops
those that are no longer wanted. How a group comes and goes is the service's business, what becomes of trajectories
meanwhile the controller's: they go on elsewhere, or wait. A death of the process that runs this ends the service;
whoever starts it again goes on from the journal.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from actors.service import Service
from rollout.config import SupervisorConfig
from rollout.errors import LongrollError
from rollout.fleet import Health, Supervision

logger = logging.getLogger(__name__)


class Supervisor:
    """A context manager around the time in which a service is kept whole.

    Args:
        service: What is looked after; its maker stops it, after this.
        config: How often, and when something is taken for dead.
        say: Told of every death and return, in words.
    """

    def __init__(self, service: Service, config: SupervisorConfig, say: Callable[[str], None] = logger.warning) -> None:
        self._service, self._config, self._say = service, config, say
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="longroll-supervisor", daemon=True)
        self._retry_at: dict[int, float] = {}
        self._starting: dict[int, threading.Thread] = {}  # groups; each may wait long for room
        self._num_failed: Counter[str] = Counter()  # by the class of the error
        self.num_controller_restarts = 0
        self.num_group_restarts = 0
        self.num_groups_added = self.num_groups_removed = 0

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()
        for thread in self._starting.values():
            thread.join()

    @property
    def num_failed_restarts(self) -> int:
        return sum(self._num_failed.values())

    @property
    def counts(self) -> Supervision:
        """What it has done so far; the controller has them too, among its statistics."""
        return Supervision(
            num_controller_restarts=self.num_controller_restarts,
            num_group_restarts=self.num_group_restarts,
            num_groups_added=self.num_groups_added,
            num_groups_removed=self.num_groups_removed,
            num_failed=dict(self._num_failed),
        )

    def _run(self) -> None:
        while not self._stop.wait(self._config.check_every_s):
            try:
                self._look()
            except Exception as error:  # the next look may succeed; a supervisor that ended would help nobody
                self._num_failed[type(error).__name__] += 1
                logger.exception("supervision failed once")

    def _look(self) -> None:
        health = self._health()
        if health is None:
            self._replace_controller()
            return
        self._service.health = health
        self._starting = {group: thread for group, thread in self._starting.items() if thread.is_alive()}
        for group in health.dead_groups:
            if self._may_start(group):
                self._start(group, self._restart)
        last = self._service.num_groups - 1
        if last in self._starting or last + 1 in self._starting:
            return  # until then it is not known which group is the last
        if last in health.surplus_groups and self._service.remove_group(last):
            self.num_groups_removed += 1
            self._say(f"group {last} was stopped")
        elif last + 1 < health.num_groups_wanted and self._may_start(last + 1):
            self._start(last + 1, self._add)

    def _may_start(self, group: int) -> bool:
        is_time = time.monotonic() >= self._retry_at.get(group, 0.0)
        return is_time and group not in self._starting and not self._stop.is_set()

    def _start(self, group: int, work: Callable[[int], None]) -> None:
        """In a thread of its own: a group may wait long for room, and a controller must not wait with it."""
        thread = threading.Thread(target=work, args=(group,), name=f"longroll-start-{group}", daemon=True)
        self._starting[group] = thread
        thread.start()

    def _health(self) -> Health | None:
        """What the controller says; None when it is dead, or silent for so long that it is taken for dead."""
        try:
            told = self._service.controller.health.remote(self.counts)
            health: Health = ray.get(told, timeout=self._config.hang_timeout_s)
            self._service.note_version(self._config.hang_timeout_s)
            return health
        except RayActorError as error:
            self._say(f"the controller is dead: {str(error).splitlines()[0]}")
        except GetTimeoutError:
            self._say(f"the controller gave no sign of life for {self._config.hang_timeout_s:g} s")
        return None

    def _replace_controller(self) -> None:
        try:
            self._service.replace_controller()
        except LongrollError as error:  # the next look finds it dead again
            self._num_failed[type(error).__name__] += 1
            self._say(f"the controller did not come back: {error}")
        else:
            self.num_controller_restarts += 1
            self._say("the controller serves again")

    def _restart(self, group: int) -> None:
        self._say(f"starting expert-parallel group {group} anew")
        if self._try(group, lambda: self._service.restart_group(group, self._stop)):
            self.num_group_restarts += 1

    def _add(self, group: int) -> None:
        self._say(f"starting expert-parallel group {group}, which was asked for")
        if self._try(group, lambda: self._service.add_group(self._stop)):
            self.num_groups_added += 1

    def _try(self, group: int, start: Callable[[], None]) -> bool:
        began = time.monotonic()
        try:
            start()
        except Exception as error:  # whatever it is, the next try may succeed; it is counted by its class
            self._num_failed[type(error).__name__] += 1
            self._retry_at[group] = time.monotonic() + self._config.retry_s
            level = logging.WARNING if isinstance(error, LongrollError) else logging.ERROR
            logger.log(level, "group %d did not start", group, exc_info=not isinstance(error, LongrollError))
            self._say(f"group {group} did not start, trying again in {self._config.retry_s:g} s: {error}")
            return False
        self._say(f"group {group} serves, after {time.monotonic() - began:.0f} s")
        return True
