"""Publications as a controller runs them: shard actors in the publisher's place of receivers, and what is counted.

Owns the receivers, the snapshot for shards that join late, and the counts. How weights flip is decided in
`rollout.sync.publication`; what becomes of trajectories meanwhile is the controller's business.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from actors.receivers import ShardReceiver
from actors.snapshot_store import load_snapshot, save_snapshot
from rollout.config import InFlight, SyncConfig
from rollout.errors import EngineDead, SyncRefused
from rollout.fleet import Rendezvous, ShardInfo, SyncReport
from rollout.sync.encoding import TensorPlan
from rollout.sync.manifest import BucketRef, Piece
from rollout.sync.members import OnDead
from rollout.sync.publication import Publisher, State
from rollout.weights_state import WeightsState

RECENT = 64  # publications that are told about


class Publications:
    """The controller's publisher.

    Args:
        shards: Actor handles, by rank.
        infos: What the shards said about themselves, by rank.
        plans: Every tensor of the model and how it is served.
        config: Timeouts and the in-flight policy.
        initial_version: Version of the weights that the shards loaded.
        on_lost: Told which ranks must be given no requests any more, and why.
    """

    def __init__(
        self,
        shards: Mapping[int, Any],
        infos: Sequence[ShardInfo],
        plans: Mapping[str, TensorPlan],
        config: SyncConfig,
        initial_version: int,
        on_lost: OnDead,
    ) -> None:
        self._num_workers = {info.rank: info.num_workers for info in infos}
        self._receivers = {rank: ShardReceiver(shard) for rank, shard in sorted(shards.items())}
        groups = {info.rank: info.group for info in infos}
        self._publisher = Publisher(
            self._receivers,
            groups,
            plans,
            config,
            live_version=initial_version,
            on_dead=on_lost,
            num_attempts=time.time_ns() // 1_000_000,  # above those of a controller that was here before
        )
        self._snapshot = (initial_version, load_snapshot(initial_version))
        self.num_syncs = self.num_refused = 0
        self._recent: deque[SyncReport] = deque(maxlen=RECENT)

    @property
    def num_workers(self) -> int:
        """Devices that receive weights: worker processes of all shards."""
        return sum(self._num_workers.values())

    @property
    def is_open(self) -> bool:
        """A publication has begun and can be given up by its sender."""
        return self._publisher.state is State.STAGING

    @property
    def live_version(self) -> int:
        return self._publisher.live_version

    @property
    def state(self) -> WeightsState:
        """What is served, and what has been published."""
        return WeightsState(
            live_version=self.live_version,
            state=self._publisher.state.value,
            num_published=self.num_syncs,
            num_refused=self.num_refused,
            recent=tuple(self._recent),
        )

    async def open_transport(self, rendezvous: Rendezvous, world_size: int) -> None:
        for rank, receiver in self._receivers.items():
            receiver.num_workers_left = sum(n for other, n in self._num_workers.items() if other >= rank)
        await self._counted(self._publisher.open_transport(rendezvous, world_size))

    async def begin(self, version: int, base: int | None, pieces: Sequence[tuple[int, Piece]]) -> int:
        attempt: int = await self._counted(self._publisher.begin(version, base, pieces))
        return attempt

    async def stage(self, ref: BucketRef, payload: Any) -> None:
        """Stage a bucket; `payload` is its reference in Ray's object store, or None."""
        for receiver in self._receivers.values():
            receiver.offer(ref, payload)
        try:
            await self._counted(self._publisher.stage(ref))
        finally:
            for receiver in self._receivers.values():
                receiver.offer(ref, None)

    async def commit(self, version: int, in_flight: InFlight) -> SyncReport:
        report: SyncReport = await self._counted(self._publisher.commit(version, in_flight))
        self.num_syncs += 1
        self._recent.append(report)
        return report

    async def abandon(self, version: int) -> None:
        """Give up a publication that is open; its sender found a fault."""
        if self.is_open:
            self.num_refused += 1
        await self._publisher.abandon(version)

    def remember(self, version: int, refs: Sequence[BucketRef]) -> None:
        """Where all bytes of a version can be had; the senders keep them."""
        self._snapshot = (version, tuple(refs))
        save_snapshot(version, refs)

    def lose(self, rank: int) -> None:
        """A shard is gone, and its group with it."""
        self._publisher.lose([rank])

    async def rejoin(self, shards: Mapping[int, Any]) -> None:
        """Bring the shards of a group that were started anew to the live version.

        Raises:
            SyncRefused: They could not be brought to it; they stay out.
            EngineDead: One of them is gone.
        """
        receivers = {rank: ShardReceiver(shard) for rank, shard in shards.items()}
        self._publisher.restarted(receivers)
        await self._catch_up(receivers)

    async def join(self, shards: Mapping[int, Any], infos: Sequence[ShardInfo]) -> None:
        """Bring the shards of a group that was not there before to the live version. Raises as `rejoin`."""
        receivers = {rank: ShardReceiver(shard) for rank, shard in shards.items()}
        self._publisher.joined(receivers, infos[0].group)
        await self._catch_up(receivers)
        self._num_workers |= {info.rank: info.num_workers for info in infos}

    def leave(self, ranks: Sequence[int]) -> None:
        """The shards of a group are stopped for good."""
        self._publisher.lose(ranks)
        for rank in ranks:
            del self._receivers[rank], self._num_workers[rank]

    async def _catch_up(self, receivers: Mapping[int, ShardReceiver]) -> None:
        version, refs = self._snapshot
        await self._publisher.catch_up(min(receivers), refs if version == self._publisher.live_version else ())
        self._receivers |= receivers

    async def _counted(self, step: Coroutine[Any, Any, Any]) -> Any:
        try:
            return await step
        except (SyncRefused, EngineDead):
            self.num_refused += 1
            raise
