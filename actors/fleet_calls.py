"""The controller's calls about which groups of shards serve: deaths, returns, draining, and another number of groups.

Owns nothing but what was asked for: which groups are drained, and how many there shall be. Processes are started and
stopped by the service's supervisor, who asks for `health`. A mix-in, because Ray calls methods of the actor's class.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from actors.publications import Publications
from rollout.errors import InvalidRequest
from rollout.fleet import Health, ShardInfo, Supervision
from rollout.scheduler.jobs import ShardCapacity
from rollout.scheduler.records import DeathKind
from rollout.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)
DRAIN_POLL_S = 0.5


class FleetCalls:
    """Mixed into the controller, which has what is declared here."""

    _shards: dict[int, Any]
    _groups: dict[int, int]  # of every rank
    _capacities: dict[int, ShardCapacity]
    _scheduler: Scheduler
    _publications: Publications
    _is_supervised: bool
    _drained: set[int]  # groups, by whoever called `drain`
    _num_groups_wanted: int
    _deaths: Counter[str]  # groups that died, by DeathKind
    _supervision: Supervision

    def _pump(self) -> None:
        raise NotImplementedError

    def _spawn_abort(self, rank: int, flight_ids: list[str]) -> None:
        raise NotImplementedError

    def _capacity(self, info: ShardInfo) -> ShardCapacity:
        raise NotImplementedError

    async def health(self, supervision: Supervision | None = None) -> Health:
        """What a supervisor has to do; it says what it has done so far."""
        self._supervision = supervision or self._supervision
        live = {self._groups[rank] for rank in self._scheduler.live_shards}
        surplus = self._surplus()
        return Health(
            dead_groups=tuple(sorted(set(self._groups.values()) - live - surplus)),
            num_groups_wanted=self._num_groups_wanted,
            surplus_groups=tuple(sorted(group for group in surplus if not self._running_in(group))),
            drained_groups=tuple(sorted(self._drained)),
        )

    async def drain(self, group: int) -> None:
        """Give a group nothing more, and wait until what it runs has gone on elsewhere; weights still reach it.

        Raises:
            InvalidRequest: There is no such group, or no other one takes chunks.
        """
        self._check_known(group)
        self._check_rest({group, *self._drained, *self._surplus()}, "group", group)
        self._drained.add(group)
        self._apply()
        while group in self._drained and (running := self._running_in(group)):
            await asyncio.sleep(DRAIN_POLL_S)
            for rank in running:  # an abort can overtake the request it is for, so it is repeated
                self._spawn_abort(rank, self._scheduler.running_on(rank))

    async def undrain(self, group: int) -> None:
        """Give a group chunks again. Raises InvalidRequest: there is no such group."""
        self._check_known(group)
        self._drained.discard(group)
        self._apply()

    async def resize(self, num_groups: int) -> None:
        """Say how many groups there shall be. Returns at once; `health` tells the supervisor what is missing.

        More groups take chunks once they hold the live version. Of fewer, those with the highest numbers are drained
        at once, and stopped when they run nothing.

        Raises:
            InvalidRequest: Fewer than 1, nobody supervises the service, or no group that stays takes chunks.
        """
        if num_groups < 1:
            raise InvalidRequest("num_groups", num_groups, "an integer ≥ 1")
        if not self._is_supervised:
            raise InvalidRequest("num_groups", num_groups, "a supervised service (supervisor.enabled)")
        beyond = {group for group in self._groups.values() if group >= num_groups}
        self._check_rest(beyond | self._drained, "num_groups", num_groups)
        self._num_groups_wanted = num_groups
        self._apply()

    async def restore_fleet(self, health: Health) -> None:
        """Ask for the same as of a controller that was here before."""
        self._num_groups_wanted = health.num_groups_wanted
        self._drained = set(health.drained_groups) & set(self._groups.values())
        self._apply()

    async def join(self, shards: Mapping[int, Any], infos: Sequence[ShardInfo]) -> None:
        """Take in a group that was not there before, once it holds the live version.

        Raises:
            SyncRefused: It could not be brought to it; it is not taken in.
            EngineDead: One of its shards is gone.
        """
        await self._publications.join(shards, infos)
        for info in infos:
            self._groups[info.rank], self._capacities[info.rank] = info.group, self._capacity(info)
        self._take_in(shards)

    async def leave(self, group: int) -> bool:
        """Forget a group that is to be stopped. False, and nothing happens, if it is needed after all."""
        ranks = self._ranks_of(group)
        if group not in self._surplus() or self._running_in(group) or max(ranks) != max(self._groups):
            return False
        self._publications.leave(ranks)
        for rank in ranks:
            self._scheduler.on_shard_death(rank, "its group was stopped", time.monotonic())
            del self._groups[rank], self._capacities[rank], self._shards[rank]
        self._drained.discard(group)
        self._introduce()
        logger.info("group %d was taken out of the fleet", group)
        return True

    async def rejoin(self, shards: Mapping[int, Any]) -> None:
        """Take back the shards of a group that were started anew; see Publications.rejoin."""
        await self._publications.rejoin(shards)
        self._take_in(shards)

    async def lose(self, ranks: Sequence[int], reason: str) -> None:
        """These shards do not serve, and their groups must be started anew."""
        for rank in ranks:
            self._on_shard_death(rank, reason, DeathKind.BEHIND)
        self._pump()

    def _take_in(self, shards: Mapping[int, Any]) -> None:
        for rank, shard in shards.items():
            self._shards[rank] = shard
            self._scheduler.on_shard_up(rank, self._capacities[rank])
        self._introduce()
        logger.info("shards %s serve, at version %d", sorted(shards), self._publications.live_version)
        self._apply()

    def _introduce(self) -> None:
        """Tell every shard who the others are: their trajectories may draft for its own."""
        everyone = ray.put([self._shards[rank] for rank in sorted(self._shards)])  # once, however many there are
        for shard in self._shards.values():
            shard.set_peers.remote(everyone)  # one that is gone is introduced again when it comes back

    def _on_shard_death(self, rank: int, reason: str, kind: DeathKind = DeathKind.DIED) -> None:
        """Its whole group serves no longer; a supervisor may start the group anew and call `rejoin`."""
        self._publications.lose(rank)
        if rank not in self._scheduler.live_shards:
            return
        logger.error("shard %d is dead, and its expert-parallel group with it: %s", rank, reason)
        self._deaths[kind.value] += 1
        for peer in self._scheduler.live_shards:
            if self._groups[peer] == self._groups[rank]:
                self._scheduler.on_shard_death(peer, reason, time.monotonic())

    def _on_lost_shards(self, ranks: frozenset[int], reason: str) -> None:
        """The publisher does not know what these serve: they must not be given requests."""
        for rank in ranks:
            self._on_shard_death(rank, reason, DeathKind.SYNC)
        self._pump()

    def _apply(self) -> None:
        """Every shard takes chunks or does not, as was asked for."""
        closed = self._drained | self._surplus()
        for rank, group in self._groups.items():
            if group in closed:
                self._scheduler.drain(rank)
            else:
                self._scheduler.undrain(rank)
        self._pump()

    def _surplus(self) -> set[int]:
        return {group for group in self._groups.values() if group >= self._num_groups_wanted}

    def _ranks_of(self, group: int) -> list[int]:
        self._check_known(group)
        return [rank for rank, other in self._groups.items() if other == group]

    def _running_in(self, group: int) -> list[int]:
        """Its shards that run something."""
        return [rank for rank in self._ranks_of(group) if self._scheduler.running_on(rank)]

    def _check_known(self, group: int) -> None:
        known = sorted(set(self._groups.values()))
        if group not in known:
            raise InvalidRequest("group", group, f"one of {known}")

    def _check_rest(self, closed: set[int], what: str, got: int) -> None:
        """Raises InvalidRequest if no group would take chunks with these closed."""
        if not set(self._groups.values()) - closed:
            raise InvalidRequest(what, got, "at least one group that still takes chunks")
