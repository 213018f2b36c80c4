"""The controller's calls for users who wait: one completion from request to end, and where its tokens come from.

Owns nothing; who is let in is decided in `rollout.scheduler.admission`, which is told here what became of those. A
mix-in, because Ray calls methods of the actor's class.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray

from actors.line import LineAddress, LineServer
from actors.shard_watch import ShardWatch
from rollout.config import SchedulerConfig
from rollout.handles import Delivery, RolloutHandle
from rollout.scheduler.admission import Admission, Fleet
from rollout.scheduler.scheduler import Scheduler
from rollout.streaming import FirstToken
from rollout.types import RolloutRequest, Status, Trajectory

COMPLETE_POLL_S = 60.0


class InteractiveCalls:
    """Mixed into the controller, which has what is declared here."""

    _shards: dict[int, Any]
    _config: SchedulerConfig
    _scheduler: Scheduler
    _admission: Admission
    _watch: ShardWatch
    _line_server: LineServer

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
            QueueFull: It would wait longer than the request allows, or be one more than keep the targets.
            InvalidRequest, EngineDead: See `submit`.
        """
        began = time.monotonic()
        self._admission.enter(request, self._fleet(request.priority), began)
        try:
            await self.submit(request, client_id, handle_id)
            while not (delivery := await self.next_groups(handle_id, 1, COMPLETE_POLL_S)).groups:
                continue
            group = delivery.groups[0]
            await self.acknowledge(handle_id, (group.group_id,))
        finally:
            self._admission.leave(time.monotonic())
        self._learn_from(group.trajectories[0], began)
        return replace(group.trajectories[0], routed_experts=())  # references, which are good through Ray only

    async def note_first_tokens(self, seen: Sequence[FirstToken]) -> None:
        """Streams have begun at a gateway, which tells how long that took."""
        now = time.monotonic()
        for one in seen:
            self._admission.limit.first_token(one.ttft_s, now - one.age_s)

    async def line_address(self) -> LineAddress:
        """Where completions can be asked for without Ray."""
        return await self._line_server.open(ray.util.get_node_ip_address())

    async def live_shards(self) -> dict[int, Any]:
        """Actor handles of the shards that serve, by rank: who gives the tokens of streams."""
        return {rank: self._shards[rank] for rank in self._scheduler.live_shards}

    def _fleet(self, priority: int) -> Fleet:
        """What a completion of this priority finds."""
        return Fleet(
            num_shards=len(self._scheduler.shard_book.open),
            slots=self._config.max_running_per_shard,
            num_ahead=self._scheduler.num_waiting_before(priority),
        )

    def _learn_from(self, trajectory: Trajectory, began: float) -> None:
        """How long a completion took for a token, if it ran in one piece."""
        num_later, record = len(trajectory.token_ids) - 1, trajectory.metadata
        if trajectory.status in (Status.COMPLETED, Status.TRUNCATED) and num_later > 0 and len(record["shards"]) == 1:
            self._admission.limit.ended((record["generate_s"] - record["ttft_s"]) / num_later, began)

    def _tick_admission(self, now: float) -> None:
        """Let the admission learn from the last second; called by housekeeping."""
        self._admission.limit.tokens(*self._watch.take_tokens())
        counts = self._scheduler.counts
        num_ended = counts.num_finished + counts.num_aborted + sum(counts.num_failed.values())
        self._admission.tick(self._fleet(0), self._scheduler.num_running, num_ended, now)
