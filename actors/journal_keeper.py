"""The controller's side of the journal: what must be durable before the scheduler goes on.

Owns the journal and what happens when it cannot write: whoever waits for it goes on waiting, which stops the
trajectories concerned and loses nothing, and an operator is told. Knows nothing of engines or clients.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from rollout.config import JournalConfig
from rollout.errors import InvalidRequest
from rollout.journal.errors import JournalConflict, JournalFull, JournalLost
from rollout.journal.journal import Journal
from rollout.journal.opening import open_journal
from rollout.journal.records import RestoredGroup, RestoredTrajectory, TrajectoryKey
from rollout.scheduler.intake import Restored
from rollout.scheduler.records import FinishedGroup, Landing, Restart
from rollout.types import FinishReason, RolloutRequest, Status

logger = logging.getLogger(__name__)
RETRY_S = 1.0
COMPACT_EVERY_S = 60.0
MAX_LENGTHS = 100_000  # of a run's earlier outputs that are told about


class JournalKeeper:
    """Records the groups of requests that name their run; others are nobody's to ask for again.

    Args:
        config: Where the journal is; without a DSN nothing is recorded.

    Raises:
        JournalError: It cannot be opened.
    """

    def __init__(self, config: JournalConfig) -> None:
        self._journal = open_journal(config) if config.dsn is not None else None
        self._durable: set[str] = set()  # run ids
        self._told: set[str] = set()  # runs whose earlier lengths were asked for
        self._line, self._num_in_line = asyncio.Lock(), 0  # calls that wait; first come, first served
        self._compacted_at = 0.0
        self.num_waits = 0
        self.trouble: str | None = None

    @property
    def counts(self) -> Any:
        """Totals of the journal, or None without one."""
        return None if self._journal is None else self._journal.counts

    def keeps(self, run_id: str) -> bool:
        """Whether trajectories of this run are made durable."""
        return run_id in self._durable

    async def submit(self, request: RolloutRequest, handle_id: str) -> dict[str, list[Restored]]:
        """Record the groups of a request; returns every member of those that were known already, by group id.

        Raises:
            JournalConflict: A known group with another prompt, sampling, size, reward or seed, or one that a
                checkpoint has learned from already.
        """
        if self._journal is None or request.run_id is None:
            return {}
        journal, run_id = self._journal, request.run_id
        known = await self._surely(partial(journal.submit, run_id, request, handle_id))
        self._durable.add(run_id)
        learned = [group for group in known if group.is_acknowledged]
        if learned:
            raise JournalConflict(
                f"group {learned[0].group_id} of run {run_id}: got it asked for again, expected no group that a "
                f"checkpoint has learned from ({learned[0].checkpoint}); {len(learned)} of {len(request.group_ids)} are"
            )
        return {group.group_id: [_restored(one, request) for one in group.trajectories] for group in known}

    async def earlier_lengths(self, run_id: str | None) -> list[tuple[str, int]]:
        """(prompt id, tokens) of a run's outputs from before this process served it; a run is told about once."""
        if self._journal is None or run_id is None or run_id in self._told:
            return []
        self._told.add(run_id)
        return await self._surely(partial(self._journal.lengths, run_id, MAX_LENGTHS))

    async def append(self, landing: Landing) -> None:
        """Make a chunk durable. Raises JournalConflict."""
        if self._journal is None or not self.keeps(landing.run_id):
            return
        journal, key = self._journal, _key(landing)
        await self._surely(partial(journal.append_chunk, key, landing.epoch, landing.start, landing.result))

    async def restart(self, restart: Restart) -> None:
        """Drop a trajectory's tokens."""
        if self._journal is None or not self.keeps(restart.run_id):
            return
        journal, key = self._journal, _key(restart)
        await self._surely(partial(journal.restart, key, restart.epoch))

    async def finish(self, finished: FinishedGroup) -> None:
        """Record how the members of a group ended. What a client gave up stays open, to be gone on with."""
        if self._journal is None or not self.keeps(finished.run_id) or not finished.is_new:
            return
        journal = self._journal
        for trajectory, epoch in zip(finished.group.trajectories, finished.epochs, strict=True):
            if trajectory.status is not Status.ABORTED:
                key = TrajectoryKey(
                    run_id=finished.run_id, group_id=trajectory.group_id, sample_index=trajectory.sample_index
                )
                await self._surely(partial(journal.finish, key, epoch, trajectory))

    async def acknowledge(self, run_id: str, group_ids: Sequence[str], checkpoint: str) -> int:
        """A checkpoint has learned from these groups; returns how many were new. Raises JournalConflict."""
        if self._journal is None:
            return 0
        journal = self._journal
        return await self._surely(partial(journal.acknowledge, run_id, group_ids, checkpoint, time.time()))

    async def lease(self, run_id: str, consumer: str, max_groups: int, lease_s: float) -> list[RestoredGroup]:
        """Hand out finished groups; see Journal.lease. Raises InvalidRequest without a journal."""
        journal = self._required()
        return await self._surely(partial(journal.lease, run_id, consumer, max_groups, lease_s, time.time()))

    async def release(self, run_id: str, consumer: str) -> int:
        """End a consumer's leases; see Journal.release. Raises InvalidRequest without a journal."""
        return await self._surely(partial(self._required().release, run_id, consumer))

    async def stored_group(self, run_id: str, group_id: str) -> RestoredGroup:
        """A group with its tokens. Raises InvalidRequest if it is not there, or there is no journal."""
        return await self._required().group(run_id, group_id)

    def _required(self) -> Journal:
        if self._journal is None:
            raise InvalidRequest("journal.dsn", None, "a journal, for groups that are to be had later")
        return self._journal

    async def keep_house(self) -> None:
        """Now and then, drop the tokens of groups that were acknowledged long ago."""
        if self._journal is not None and time.monotonic() - self._compacted_at > COMPACT_EVERY_S:
            self._compacted_at = time.monotonic()
            await self._journal.compact(time.time())

    async def close(self) -> None:
        if self._journal is not None:
            await self._journal.close()

    async def _surely(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Call until there is room and the server is there again.

        Whoever comes while others wait queues behind them: a chunk must not overtake the restart before it.
        """
        if self._num_in_line == 0:
            try:
                return await call()
            except (JournalFull, JournalLost) as error:
                self._note(error)
        self._num_in_line += 1
        try:
            async with self._line:
                return await self._until_it_can(call)
        finally:
            self._num_in_line -= 1

    async def _until_it_can(self, call: Callable[[], Awaitable[Any]]) -> Any:
        while True:
            try:
                answer = await call()
            except (JournalFull, JournalLost) as error:
                self._note(error)
                await asyncio.sleep(RETRY_S)
            else:
                self.trouble = None
                return answer

    def _note(self, error: Exception) -> None:
        self.num_waits += 1
        if self.trouble != str(error):
            logger.error("the journal cannot write, so trajectories wait: %s", error)
        self.trouble = str(error)


def _key(place: Landing | Restart) -> TrajectoryKey:
    return TrajectoryKey(run_id=place.run_id, group_id=place.group_id, sample_index=place.sample_index)


def _restored(durable: RestoredTrajectory, request: RolloutRequest) -> Restored:
    trajectory = durable.to_trajectory()
    last = durable.chunks[-1].finish_reason if durable.chunks else None
    ended = None
    if trajectory.status is Status.PENDING and durable.chunks:
        if last is FinishReason.STOP:
            ended = FinishReason.STOP
        elif len(trajectory.token_ids) >= request.sampling.max_tokens:
            ended = FinishReason.LENGTH
    return Restored(trajectory=trajectory, epoch=durable.epoch, ended=ended)
