"""Keeps a service whole: a controller that died is made anew, a group of shards that died is started again.

Owns the thread that looks, and what it counted. How a group comes back is the service's business, what becomes of
trajectories meanwhile the controller's: they go on elsewhere, or wait. A death of the process that runs this
ends the service; whoever starts it again goes on from the journal.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from actors.service import Service
from rollout.config import SupervisorConfig
from rollout.errors import LongrollError
from rollout.fleet import Health

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
        self.num_controller_restarts = 0
        self.num_group_restarts = 0
        self.num_failed_restarts = 0

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._config.check_every_s):
            try:
                self._look()
            except Exception:  # the next look may succeed; a supervisor that ended would help nobody
                logger.exception("supervision failed once")

    def _look(self) -> None:
        health = self._health()
        if health is None:
            self._replace_controller()
            return
        for group in health.dead_groups:
            if time.monotonic() >= self._retry_at.get(group, 0.0) and not self._stop.is_set():
                self._restart(group)

    def _health(self) -> Health | None:
        """What the controller says; None when it is dead, or silent for so long that it is taken for dead."""
        try:
            health: Health = ray.get(self._service.controller.health.remote(), timeout=self._config.hang_timeout_s)
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
            self.num_failed_restarts += 1
            self._say(f"the controller did not come back: {error}")
        else:
            self.num_controller_restarts += 1
            self._say("the controller serves again")

    def _restart(self, group: int) -> None:
        self._say(f"starting expert-parallel group {group} anew")
        began = time.monotonic()
        try:
            self._service.restart_group(group)
        except LongrollError as error:
            self.num_failed_restarts += 1
            self._retry_at[group] = time.monotonic() + self._config.retry_s
            self._say(f"group {group} did not come back, trying again in {self._config.retry_s:g} s: {error}")
        else:
            self.num_group_restarts += 1
            self._say(f"group {group} serves again, after {time.monotonic() - began:.0f} s")
