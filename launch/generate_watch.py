"""Says how far a submission is, and drains groups of shards in turn while it runs. A part of launch.generate.

Owns one thread with a client of its own; whatever goes wrong in it ends the watching, never the generation.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from actors.service import Service
from rollout.client import RolloutClient
from rollout.errors import LongrollError
from rollout.handles import RolloutHandle

logger = logging.getLogger(__name__)
SAY_EVERY_S = 15.0
LOOK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchReport:
    """What the service did meanwhile: counts of chunks that ran elsewhere than before, were cut, and drains."""

    num_migrations: int
    num_cuts: int
    num_retries: int
    num_drains: int


class Watch:
    """A context manager around the reading of a submission.

    Args:
        service: That serves it.
        handle: The submission.
        drain_every_s: Between two drains, each of the next expert-parallel group; 0 = none.
        drain_s: How long a drained group stays out of service.
        say: Told how far it is, in words.
    """

    def __init__(
        self,
        service: Service,
        handle: RolloutHandle,
        drain_every_s: float,
        drain_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._client: RolloutClient = service.client
        self._handle, self._say = handle, say
        self._num_groups = len({info.group for info in service.infos})
        self._drain_every_s, self._drain_s = drain_every_s, drain_s
        self._num_drains = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="longroll-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join()

    def report(self) -> WatchReport:
        """Totals of the service's controller."""
        stats = self._client.stats()
        return WatchReport(
            num_migrations=stats.num_migrations,
            num_cuts=stats.num_cuts,
            num_retries=stats.num_retries,
            num_drains=self._num_drains,
        )

    def _run(self) -> None:
        try:
            self._watch()
        except LongrollError as error:  # the reader of the groups hears of what matters
            logger.warning("stopped watching: %s", error)

    def _watch(self) -> None:
        said_at, drained_at = time.monotonic(), time.monotonic()
        while not self._is_over.wait(LOOK_EVERY_S):
            now = time.monotonic()
            if now - said_at >= SAY_EVERY_S:
                said_at = now
                self._tell()
            if self._drain_every_s and now - drained_at >= self._drain_every_s:
                self._drain(self._num_drains % self._num_groups)
                drained_at = time.monotonic()

    def _tell(self) -> None:
        stats = self._client.stats()
        usage = " ".join(f"{shard.kv_usage:.0%}" for shard in stats.shards)
        self._say(
            f"{stats.num_finished} finished, {stats.num_running} running, {stats.num_queued} queued   "
            f"{stats.num_tokens_generated:,} tokens at {stats.tokens_per_s:,.0f}/s   {stats.num_chunks} chunks, "
            f"{stats.num_migrations} moves   KV in use {usage}"
        )

    def _drain(self, group: int) -> None:
        """Take a group out of service, and put it back."""
        self._client.drain(group)
        self._num_drains += 1
        self._say(f"group {group} is drained; its trajectories go on elsewhere")
        self._is_over.wait(self._drain_s)
        self._client.undrain(group)
