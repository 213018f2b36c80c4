"""The asyncio twin of `rollout.client.RolloutClient`: the same methods, awaited."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from rollout.client import MAX_GROUPS_PER_CALL, POLL_S, ProgressCallback, Reader
from rollout.errors import LongrollError, SyncRefused, UnknownHandle
from rollout.fleet import ServiceStats, SyncReport
from rollout.handles import Delivery, Progress, RolloutHandle
from rollout.remote import client_error
from rollout.requests import PromptLike, build_request
from rollout.sync.encoding import TensorPlan
from rollout.sync.manifest import BucketRef, Piece
from rollout.sync.outgoing import DEFAULT_BUCKET_BYTES, OutgoingVersion, PublishedVersion, Weights
from rollout.sync.segments import unlink
from rollout.types import Group, ModelLimits, SamplingParams


class AsyncRolloutClient:
    """Asynchronous client; arguments, results and errors as in `RolloutClient`.

    Args:
        controller: Actor handle of the controller (see actors.service.connect).
        bucket_bytes: Largest piece of a publication in shared memory at once.
        send_changes: Keep what was published last, in the served encoding, and send only what changed.
    """

    def __init__(self, controller: Any, bucket_bytes: int = DEFAULT_BUCKET_BYTES, send_changes: bool = False) -> None:
        self._controller, self._bucket_bytes, self._send_changes = controller, bucket_bytes, send_changes
        self._plans: dict[str, TensorPlan] | None = None
        self._published: PublishedVersion | None = None
        self._client_id = uuid.uuid4().hex
        self._num_submitted = 0
        self._limits: ModelLimits | None = None
        self._reader = Reader()

    async def submit(
        self,
        prompts: Sequence[PromptLike],
        n_samples_per_prompt: int,
        sampling: SamplingParams,
        *,
        run_seed: int = 0,
        group_ids: Sequence[str] | None = None,
        reward: str = "none",
        priority: int = 0,
        run_id: str | None = None,
    ) -> RolloutHandle:
        """Ask for n samples of each prompt; see RolloutClient.submit."""
        if self._limits is None:
            self._limits = await self._call("limits")
        submission, self._num_submitted = self._num_submitted, self._num_submitted + 1
        request = build_request(
            prompts,
            n_samples_per_prompt,
            sampling,
            run_seed,
            group_ids,
            reward,
            priority,
            run_id,
            limits=self._limits,
            submission=submission,
        )
        handle: RolloutHandle = await self._call("submit", request, self._client_id)
        return handle

    async def groups(self, handle: RolloutHandle) -> AsyncIterator[Group]:
        """Iterate over the groups of a submission as they complete; see RolloutClient.groups."""
        while True:
            delivery: Delivery = await self._call(
                "next_groups", handle.handle_id, MAX_GROUPS_PER_CALL, POLL_S, self._reader.acknowledged(handle)
            )
            taken = self._reader.restart(handle)
            for group in delivery.groups:
                taken.append(group.group_id)
                if delivery.is_done and len(taken) == len(delivery.groups):
                    # Before the yield: a caller that knows the number of groups never comes back.
                    with contextlib.suppress(UnknownHandle):  # closed by an answer that was lost
                        await self._call("acknowledge", handle.handle_id, tuple(taken))
                    self._reader.forget(handle)
                yield group
            if delivery.is_done:
                self._reader.forget(handle)
                return

    async def rollout(
        self,
        prompts: Sequence[PromptLike],
        n_samples_per_prompt: int,
        sampling: SamplingParams,
        *,
        run_seed: int = 0,
        group_ids: Sequence[str] | None = None,
        reward: str = "none",
        progress: ProgressCallback | None = None,
    ) -> list[Group]:
        """Submit and wait; groups come back in the order of their prompts."""
        handle = await self.submit(
            prompts, n_samples_per_prompt, sampling, run_seed=run_seed, group_ids=group_ids, reward=reward
        )
        done: list[Group] = []
        num_tokens = 0
        try:
            async for group in self.groups(handle):
                done.append(group)
                num_tokens += sum(len(t.token_ids) for t in group.trajectories)
                if progress is not None:
                    progress(len(done), handle.num_groups, num_tokens)
        except BaseException:
            with contextlib.suppress(LongrollError):
                await asyncio.shield(self.abort(handle))
            raise
        return handle.in_order(done)

    async def abort(self, handle: RolloutHandle) -> None:
        """Give up what is unfinished; every group of the handle can still be read."""
        await self._call("abort", handle.handle_id)

    async def acknowledge_groups(self, run_id: str, group_ids: Sequence[str], checkpoint: str) -> int:
        """A checkpoint that is safe has learned from these groups; see RolloutClient.acknowledge_groups."""
        num_new: int = await self._call("acknowledge_groups", run_id, tuple(group_ids), checkpoint)
        return num_new

    async def progress(self, handle: RolloutHandle) -> Progress:
        progress: Progress = await self._call("progress", handle.handle_id)
        return progress

    async def stats(self) -> ServiceStats:
        stats: ServiceStats = await self._call("stats")
        return stats

    async def publish(self, version: int, weights: Weights) -> SyncReport:
        """Send new weights to all shards and switch to them; see RolloutClient.publish."""
        if self._plans is None:
            self._plans = await self._call("served_plans")
        outgoing = OutgoingVersion(
            version, weights, self._plans, self._bucket_bytes, self._published, is_kept=self._send_changes
        )
        attempt = await self._begin(version, outgoing)
        buckets = outgoing.buckets(attempt)
        try:
            while (ref := await asyncio.to_thread(next, buckets, None)) is not None:
                await self.publish_bucket(ref)
            report = await self.commit_publish(version)
        except BaseException:
            with contextlib.suppress(LongrollError):
                await asyncio.shield(self.abandon_publish(version))
            raise
        self._published = outgoing.published
        return report

    async def _begin(self, version: int, outgoing: OutgoingVersion) -> int:
        if outgoing.base is not None:
            with contextlib.suppress(SyncRefused):  # somebody else has published, or a shard was restarted
                return await self.begin_publish(version, outgoing.base, outgoing.pieces)
            outgoing.send_everything()
        return await self.begin_publish(version, None, outgoing.pieces)

    async def begin_publish(self, version: int, base: int | None, pieces: Sequence[tuple[int, Piece]]) -> int:
        """Open a publication; see RolloutClient.begin_publish."""
        attempt: int = await self._call("begin_publish", version, base, tuple(pieces))
        return attempt

    async def publish_bucket(self, ref: BucketRef) -> None:
        """Let every shard take in a bucket; its segment is unlinked, whatever happens."""
        try:
            await self._call("publish_bucket", ref)
        finally:
            unlink(ref)

    async def commit_publish(self, version: int) -> SyncReport:
        report: SyncReport = await self._call("commit_publish", version)
        return report

    async def abandon_publish(self, version: int) -> None:
        await self._call("abandon_publish", version)

    async def _call(self, method: str, *args: Any) -> Any:
        try:
            return await getattr(self._controller, method).remote(*args)
        except Exception as error:  # every error is passed on, in its own class
            raise client_error(error) from None
