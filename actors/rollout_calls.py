"""The controller's calls for trainers that have no process of their own on the cluster: leases and records of runs.

Owns nothing. A group that was leased is durable, so what was kept of it for its submission is let go. A mix-in, because
Ray calls methods of the actor's class.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from actors.journal_keeper import JournalKeeper
from rollout.journal.records import RestoredGroup
from rollout.scheduler.ledger import Ledger
from rollout.scheduler.scheduler import Scheduler
from rollout.types import Group


class RolloutCalls:
    """Mixed into the controller, which has what is declared here."""

    _scheduler: Scheduler
    _ledger: Ledger
    _keeper: JournalKeeper

    def _close(self, handle_id: str) -> None:
        raise NotImplementedError

    async def acknowledge_groups(self, run_id: str, group_ids: Sequence[str], checkpoint: str) -> int:
        """A trainer's checkpoint has learned from these groups; they are never delivered again.

        Returns:
            How many were not acknowledged before.

        Raises:
            JournalConflict: One of them is not finished.
        """
        num_new = await self._keeper.acknowledge(run_id, group_ids, checkpoint)
        self._settle(run_id, group_ids)
        return num_new

    async def lease(self, run_id: str, consumer: str, max_groups: int, lease_s: float) -> tuple[Group, ...]:
        """Hand out finished groups of a run for a while; see Journal.lease.

        Raises:
            InvalidRequest: There is no journal, or nothing can be leased so.
        """
        restored = await self._keeper.lease(run_id, consumer, max_groups, lease_s)
        self._settle(run_id, [group.group_id for group in restored])
        return tuple(group.to_group() for group in restored)

    async def release(self, run_id: str, consumer: str) -> int:
        """End a consumer's leases. Returns how many. Raises InvalidRequest without a journal."""
        return await self._keeper.release(run_id, consumer)

    async def stored_group(self, run_id: str, group_id: str) -> RestoredGroup:
        """A group as it is durable, with its tokens. Raises InvalidRequest if it is not there."""
        return await self._keeper.stored_group(run_id, group_id)

    def _settle(self, run_id: str, group_ids: Sequence[str]) -> None:
        """Whoever leases from a run is there, and has these of its groups."""
        now = time.monotonic()
        for handle_id in self._scheduler.book.handles_of_run(run_id):
            if self._ledger.holds(handle_id):
                self._ledger.touch(handle_id, now)
                if self._ledger.acknowledge(handle_id, group_ids):
                    self._close(handle_id)
