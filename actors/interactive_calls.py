"""The controller's calls for users who wait: one completion from request to end, and where its tokens come from.

Owns the rate at which trajectories end, from which follows how long a new one would wait. A mix-in, because Ray calls
methods of the actor's class.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rollout.errors import QueueFull
from rollout.handles import Delivery, RolloutHandle
from rollout.rate import RateWindow
from rollout.scheduler.scheduler import Scheduler
from rollout.types import RolloutRequest, Trajectory

COMPLETE_POLL_S = 60.0
MAX_RETRY_AFTER_S = 60.0


class InteractiveCalls:
    """Mixed into the controller, which has what is declared here."""

    _shards: dict[int, Any]
    _scheduler: Scheduler
    _endings: RateWindow  # trajectories that ended, by the controller's housekeeping

    async def submit(self, request: RolloutRequest, client_id: str, handle_id: str | None = None) -> RolloutHandle:
        raise NotImplementedError

    async def next_groups(
        self, handle_id: str, max_groups: int, timeout_s: float, acknowledged: Sequence[str] = ()
    ) -> Delivery:
        raise NotImplementedError

    async def acknowledge(self, handle_id: str, group_ids: Sequence[str]) -> bool:
        raise NotImplementedError

    async def complete(self, request: RolloutRequest, client_id: str, handle_id: str) -> Trajectory:
        """Queue a request for one trajectory and wait for its end, which may be a failure or an abort.

        Args:
            request: For one trajectory.
            client_id: Who asks.
            handle_id: Under which it can be aborted; chosen by the caller, who has no answer before the end.

        Raises:
            QueueFull: It would wait longer than the request allows.
            InvalidRequest, EngineDead: See `submit`.
        """
        self._check_wait(request)
        await self.submit(request, client_id, handle_id)
        while not (delivery := await self.next_groups(handle_id, 1, COMPLETE_POLL_S)).groups:
            continue
        group = delivery.groups[0]
        await self.acknowledge(handle_id, (group.group_id,))
        return group.trajectories[0]

    async def live_shards(self) -> dict[int, Any]:
        """Actor handles of the shards that serve, by rank: who gives the tokens of streams."""
        return {rank: self._shards[rank] for rank in self._scheduler.live_shards}

    def _check_wait(self, request: RolloutRequest) -> None:
        if request.max_wait_s is None:
            return
        num_ahead = self._scheduler.num_waiting_before(request.priority)
        if num_ahead == 0:
            return
        per_second = self._endings.per_second
        wait_s = num_ahead / per_second if per_second > 0 else None
        if wait_s is None or wait_s > request.max_wait_s:
            told = "a wait of unknown length" if wait_s is None else f"an expected wait of {wait_s:.2f} s"
            raise QueueFull(
                f"request: got {told} until {num_ahead} others have ended, expected at most {request.max_wait_s:g} s",
                retry_after_s=None if wait_s is None else min(wait_s, MAX_RETRY_AFTER_S),
            )

    def _sample_endings(self) -> None:
        """Look at how many trajectories have ended; called by housekeeping."""
        counts = self._scheduler.counts
        num_ended = counts.num_finished + counts.num_aborted + sum(counts.num_failed.values())
        self._endings.sample(time.monotonic(), num_ended)
