"""The asyncio twin of `rollout.client.RolloutClient`: the same methods, awaited."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from rollout.client import MAX_GROUPS_PER_CALL, POLL_S, REPEATABLE, ProgressCallback
from rollout.errors import LongrollError, ServiceLost, SyncRefused, UnknownHandle
from rollout.feed import Feed, FeedQuery
from rollout.fleet import ServiceStats, SyncReport
from rollout.handles import Delivery, Progress, RolloutHandle
from rollout.reading import Reader, Reading
from rollout.remote import client_error, find_again
from rollout.requests import PromptLike, build_request
from rollout.sync.encoding import TensorPlan
from rollout.sync.manifest import BucketRef, Piece
from rollout.sync.outgoing import DEFAULT_BUCKET_BYTES, OutgoingVersion, PublishedVersion, Weights
from rollout.sync.segments import unlink
from rollout.types import Group, ModelLimits, RolloutRequest, SamplingParams


class AsyncRolloutClient:
    """Asynchronous client; arguments, results and errors as in `RolloutClient`.

    Args:
        controller: Actor handle of the controller (see actors.service.connect).
        bucket_bytes: Largest piece of a publication in shared memory at once.
        send_changes: Keep what was published last, in the served encoding, and send only what changed.
        find: Finds the controller that took the place of one that died, raising ValueError while there is none;
            None where nobody replaces it.
    """

    def __init__(
        self,
        controller: Any,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        send_changes: bool = False,
        find: Callable[[], Any] | None = None,
    ) -> None:
        self._find = find
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
        handle = await self._submit(request)
        self._reader.opened(handle, request)
        return handle

    async def _submit(self, request: RolloutRequest) -> RolloutHandle:
        """May be made again where the controller died over it: its run and group ids make it the same one."""
        may_repeat = request.run_id is not None
        handle: RolloutHandle = await self._call("submit", request, self._client_id, may_repeat=may_repeat)
        return handle

    async def groups(self, handle: RolloutHandle) -> AsyncIterator[Group]:
        """Iterate over the groups of a submission as they complete; see RolloutClient.groups."""
        reading = self._reader.of(handle)
        while True:
            try:
                delivery: Delivery = await self._call(
                    "next_groups", reading.handle.handle_id, MAX_GROUPS_PER_CALL, POLL_S, tuple(reading.taken)
                )
            except (ServiceLost, UnknownHandle):
                if reading.request is None:
                    raise
                missing = reading.missing()
                if missing is None:
                    self._reader.forget(handle)
                    return
                reading.again(await self._submit(missing))
                continue
            for group, is_last in reading.new_groups(delivery):
                if is_last:  # before the yield: a caller that knows the number of groups never comes back
                    await self._close(handle, reading)
                yield group
            if delivery.is_done:
                await self._close(handle, reading)
                return

    async def _close(self, handle: RolloutHandle, reading: Reading) -> None:
        """Everything was read: acknowledge the rest, which closes the submission."""
        self._reader.forget(handle)
        if reading.taken:
            with contextlib.suppress(UnknownHandle, ServiceLost):  # closed by an answer that was lost
                await self._call("acknowledge", reading.handle.handle_id, tuple(reading.taken))
            reading.taken = []

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
        """Give up what is unfinished; every group of the handle can still be read, unless the controller dies."""
        reading = self._reader.of(handle)
        reading.is_aborted = True
        try:
            await self._call("abort", reading.handle.handle_id)
        except (ServiceLost, UnknownHandle):  # nothing of it runs under a controller that does not know it
            if reading.request is None or self._find is None:
                raise

    async def acknowledge_groups(self, run_id: str, group_ids: Sequence[str], checkpoint: str) -> int:
        """A checkpoint that is safe has learned from these groups; see RolloutClient.acknowledge_groups."""
        num_new: int = await self._call("acknowledge_groups", run_id, tuple(group_ids), checkpoint)
        return num_new

    async def progress(self, handle: RolloutHandle) -> Progress:
        progress: Progress = await self._call("progress", self._reader.of(handle).handle.handle_id)
        return progress

    async def stats(self) -> ServiceStats:
        stats: ServiceStats = await self._call("stats")
        return stats

    async def feed(self, query: FeedQuery | None = None) -> Feed:
        """What a dashboard shows; see RolloutClient.feed."""
        feed: Feed = await self._call("feed", query)
        return feed

    async def drain(self, group: int) -> None:
        """Give a group nothing more; see RolloutClient.drain."""
        await self._call("drain", group)

    async def undrain(self, group: int) -> None:
        """Let a drained group take chunks again; see RolloutClient.undrain."""
        await self._call("undrain", group)

    async def resize(self, num_groups: int) -> None:
        """Say how many groups there shall be; see RolloutClient.resize."""
        await self._call("resize", num_groups)

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

    async def _call(self, method: str, *args: Any, may_repeat: bool = False) -> Any:
        while True:
            try:
                return await getattr(self._controller, method).remote(*args)
            except Exception as error:  # every error is passed on, in its own class
                known = client_error(error)
                if not isinstance(known, ServiceLost) or self._find is None:
                    raise known from None
                self._controller = await asyncio.to_thread(find_again, self._find, self._controller, known)
                if not may_repeat and method not in REPEATABLE:
                    raise known from None
