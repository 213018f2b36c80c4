"""The controller's calls about the state of the service: figures for clients.

Owns nothing. A mix-in, because Ray calls methods of the actor's class.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from typing import Any

from actors.journal_keeper import JournalKeeper
from actors.publications import Publications
from actors.receivers import answer
from rollout.config import SchedulerConfig
from rollout.errors import EngineDead
from rollout.fleet import ServiceStats, ShardStats, Supervision
from rollout.rate import RateWindow
from rollout.scheduler.admission import Admission
from rollout.scheduler.ledger import Ledger
from rollout.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)
STATS_TIMEOUT_S = 5.0


class StatsCalls:
    """Mixed into the controller, which has what is declared here."""

    _shards: dict[int, Any]
    _deaths: Counter[str]
    _drained: set[int]
    _num_groups_wanted: int
    _supervision: Supervision
    _config: SchedulerConfig
    _scheduler: Scheduler
    _admission: Admission
    _publications: Publications
    _ledger: Ledger
    _keeper: JournalKeeper
    _rate: RateWindow
    _num_groups_expired: int
    _num_internal_errors: int

    def _pump(self) -> None:
        raise NotImplementedError

    def _on_shard_death(self, rank: int, reason: str) -> None:
        raise NotImplementedError

    async def stats(self) -> ServiceStats:
        now, counts, admission = time.monotonic(), self._scheduler.counts, self._admission
        num_open_shards = len(self._scheduler.shard_book.open)
        self._rate.sample(now, counts.num_tokens_generated)
        return ServiceStats(
            live_version=self._publications.live_version,
            num_queued=self._scheduler.num_queued,
            num_running=self._scheduler.num_running,
            num_finished=counts.num_finished,
            num_aborted=counts.num_aborted,
            num_failed=dict(counts.num_failed),
            num_tokens_generated=counts.num_tokens_generated,
            num_tokens_discarded=counts.num_tokens_discarded,
            tokens_per_s=self._rate.per_second,
            num_syncs=self._publications.num_syncs,
            num_syncs_refused=self._publications.num_refused,
            num_clients=self._ledger.num_clients,
            num_retries=counts.num_retries,
            num_groups_expired=self._num_groups_expired,
            num_chunks=self._scheduler.dispatch_counts.num_chunks,
            num_migrations=self._scheduler.dispatch_counts.num_migrations,
            num_cuts=self._scheduler.dispatch_counts.num_cuts,
            num_trimmed=self._scheduler.dispatch_counts.num_trimmed,
            num_regenerated=counts.num_regenerated,
            num_tokens_restored=counts.num_tokens_restored,
            num_journal_waits=self._keeper.num_waits,
            num_internal_errors=self._num_internal_errors,
            num_groups_wanted=self._num_groups_wanted,
            num_interactive=admission.num_open,
            admission_bound=admission.bound(num_open_shards, self._config.max_running_per_shard),
            num_refused=dict(admission.num_refused),
            drained_groups=tuple(sorted(self._drained)),
            num_group_deaths=dict(self._deaths),
            supervision=self._supervision,
            shards=await self._shard_stats(),
        )

    async def _shard_stats(self) -> tuple[ShardStats, ...]:
        live = self._scheduler.live_shards
        calls = [asyncio.wait_for(answer(self._shards[rank].stats.remote()), STATS_TIMEOUT_S) for rank in live]
        found = []
        for rank, got in zip(live, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(got, ShardStats):
                found.append(got)
            elif isinstance(got, EngineDead):
                self._on_shard_death(rank, str(got))
            else:
                logger.warning("shard %d gave no statistics: %r", rank, got)
        self._pump()
        return tuple(found)
