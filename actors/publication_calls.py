"""The controller's calls about weights: what trainers ask for.

Owns nothing: how a publication goes is decided in `actors.publications`, what it means for trajectories in
`rollout.scheduler`. A mix-in, because Ray calls methods of the actor's class.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from actors.publications import Publications
from rollout.config import InFlight, OnStale, SchedulerConfig, SyncConfig
from rollout.errors import EngineDead, SyncRefused
from rollout.fleet import Rendezvous, SyncReport
from rollout.scheduler.scheduler import Scheduler
from rollout.sync.encoding import TensorPlan
from rollout.sync.manifest import BucketRef, Piece
from rollout.weights_state import WeightsState

STALE_POLL_S = 0.2


class PublicationCalls:
    """Mixed into the controller, which has what is declared here."""

    _config: SchedulerConfig
    _sync: SyncConfig
    _plans: dict[str, TensorPlan]
    _scheduler: Scheduler
    _publications: Publications
    _num_flips_under_way: int

    def _pump(self) -> None:
        raise NotImplementedError

    def _spawn_abort(self, rank: int, flight_ids: list[str]) -> None:
        raise NotImplementedError

    def _note_sync(self, report: SyncReport, in_flight: str) -> None:
        raise NotImplementedError

    def _note_refusal(self, version: int, reason: str) -> None:
        raise NotImplementedError

    def _note_given_up(self, version: int) -> None:
        raise NotImplementedError

    async def num_workers(self) -> int:
        """Devices that receive weights: worker processes of all shards."""
        return self._publications.num_workers

    async def served_plans(self) -> dict[str, TensorPlan]:
        """How every tensor of the model is served."""
        return self._plans

    async def live_version(self) -> int:
        """The version that is served."""
        return self._publications.live_version

    async def weights(self) -> WeightsState:
        """What is served, and what has been published."""
        return self._publications.state

    async def open_transport(self, rendezvous: Rendezvous, world_size: int) -> None:
        """Let all workers join the trainer's broadcast group, before a publication."""
        await self._publications.open_transport(rendezvous, world_size)

    async def begin_publish(self, version: int, base: int | None, pieces: Sequence[tuple[int, Piece]]) -> int:
        """Open a publication; returns its attempt number. See Publisher.begin."""
        with self._noting(version):
            return await self._publications.begin(version, base, pieces)

    async def publish_bucket(self, ref: BucketRef, payload: Sequence[Any] = ()) -> None:
        """One bucket to every shard.

        Args:
            ref: The bucket.
            payload: One reference to its bytes in Ray's object store, when they travel that way. In a sequence,
                so that Ray hands on the reference instead of the bytes.
        """
        with self._noting(ref.version):
            await self._publications.stage(ref, payload[0] if payload else None)

    async def commit_publish(self, version: int, in_flight: InFlight | None = None) -> SyncReport:
        """Flip all shards (see Publisher.commit). With a pause nothing is dispatched until it is over."""
        with self._noting(version):
            await self._wait_for_the_old(version)
        mode = in_flight or self._sync.in_flight
        is_paused = mode is not InFlight.KEEP
        self._num_flips_under_way += is_paused
        try:
            with self._noting(version):
                report = await self._publications.commit(version, mode)
            self._note_sync(report, mode.value)
            if mode is InFlight.ABORT and not self._sync.partial_rollout:
                self._scheduler.restart_queued(time.monotonic())
            for rank, flight_ids in self._scheduler.on_version(version, time.monotonic()).items():
                self._spawn_abort(rank, flight_ids)
            return report
        finally:
            self._num_flips_under_way -= is_paused
            self._pump()

    @contextmanager
    def _noting(self, version: int) -> Iterator[None]:
        """A refusal is told of before it is passed on."""
        try:
            yield
        except (SyncRefused, EngineDead) as error:
            self._note_refusal(version, str(error))
            raise

    async def _wait_for_the_old(self, version: int) -> None:
        """With on_stale = wait, a version waits for the trajectories that it would make too old."""
        deadline = time.monotonic() + self._sync.drain_timeout_s
        while self._config.on_stale is OnStale.WAIT and (num_old := self._scheduler.num_too_old_for(version)):
            if time.monotonic() > deadline:
                raise SyncRefused(
                    f"version {version}: {num_old} trajectories would be older than scheduler.max_staleness = "
                    f"{self._config.max_staleness}, and did not end within sync.drain_timeout_s"
                )
            await asyncio.sleep(STALE_POLL_S)

    async def abandon_publish(self, version: int) -> None:
        if self._publications.is_open:
            self._note_given_up(version)
        await self._publications.abandon(version)

    async def remember_snapshot(self, version: int, refs: Sequence[BucketRef]) -> None:
        """Where all bytes of a version can be had, for a shard that joins late; the senders keep them."""
        self._publications.remember(version, refs)
