"""What a trainer imports: submit prompts, iterate over groups as they complete, publish weights.

Talks to the controller's actor handle without importing Ray: a call returns a reference that can be
awaited, or asked for a `concurrent.futures.Future`. Errors arrive in their own class. Not
thread-safe; give each thread its own client.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rollout.errors import LongrollError, ServiceLost, SyncRefused, UnknownHandle
from rollout.feed import Feed, FeedQuery
from rollout.fleet import ServiceStats, SyncReport
from rollout.handles import Delivery, Progress, RolloutHandle
from rollout.mismatch import MismatchReport
from rollout.reading import Reader, Reading
from rollout.remote import client_error, find_again
from rollout.requests import PromptLike, build_request
from rollout.sync.encoding import TensorPlan
from rollout.sync.manifest import BucketRef, Piece
from rollout.sync.outgoing import DEFAULT_BUCKET_BYTES, OutgoingVersion, PublishedVersion, Weights
from rollout.sync.segments import unlink
from rollout.types import Group, ModelLimits, RolloutRequest, SamplingParams

POLL_S = 30.0
REPEATABLE = frozenset(
    {"limits", "stats", "feed", "note_mismatch", "live_version", "num_workers", "served_plans", "acknowledge_groups"}
    | {"drain", "undrain", "resize"}
)
"""Calls that do the same when they are made twice, so that the death of a controller in between is nobody's concern."""
MAX_GROUPS_PER_CALL = 64
ProgressCallback = Callable[[int, int, int], None]
"""Called with groups done, groups in all, and tokens of the groups that are done."""


class RolloutClient:
    """Synchronous client.

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

    @property
    def controller(self) -> Any:
        return self._controller

    def submit(
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
        """Ask for n samples of each prompt; returns at once.

        Args:
            prompts: Prompts, or sequences of token ids.
            n_samples_per_prompt: Members of each group.
            sampling: How tokens are drawn.
            run_seed: With group id and sample index it determines every trajectory's seed.
            group_ids: One for each prompt; None numbers them by submission of this client.
            reward: Name of the reward function.
            priority: Lower is served first.
            run_id: Names the run that the groups belong to: asked for again under the same run and group ids, after
                whatever died, they come back as far as they were durable (journal.dsn) and go on from there.

        Raises:
            InvalidRequest: Anything is wrong with the arguments; nothing was queued.
            QueueFull: Too much is under way.
            EngineDead: The service has no engine left.
        """
        if self._limits is None:
            self._limits = self._call("limits")
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
            submission=self._num_submitted,
        )
        self._num_submitted += 1
        handle = self._submit(request)
        self._reader.opened(handle, request)
        return handle

    def _submit(self, request: RolloutRequest) -> RolloutHandle:
        """May be made again where the controller died over it: its run and group ids make it the same one."""
        may_repeat = request.run_id is not None
        handle: RolloutHandle = self._call("submit", request, self._client_id, may_repeat=may_repeat)
        return handle

    def groups(self, handle: RolloutHandle) -> Iterator[Group]:
        """Iterate over the groups of a submission as they complete.

        A group counts as received once it was yielded, also if the caller stops there and iterates
        again later. Failed and aborted trajectories are part of their group; see their status.
        """
        reading = self._reader.of(handle)
        while True:
            try:
                delivery: Delivery = self._call(
                    "next_groups", reading.handle.handle_id, MAX_GROUPS_PER_CALL, POLL_S, tuple(reading.taken)
                )
            except (ServiceLost, UnknownHandle):
                if reading.request is None:
                    raise
                missing = reading.missing()
                if missing is None:
                    self._reader.forget(handle)
                    return
                reading.again(self._submit(missing))
                continue
            for group, is_last in reading.new_groups(delivery):
                if is_last:  # before the yield: a caller that knows the number of groups never comes back
                    self._close(handle, reading)
                yield group
            if delivery.is_done:
                self._close(handle, reading)
                return

    def _close(self, handle: RolloutHandle, reading: Reading) -> None:
        """Everything was read: acknowledge the rest, which closes the submission."""
        self._reader.forget(handle)
        if reading.taken:
            with contextlib.suppress(UnknownHandle, ServiceLost):  # closed by an answer that was lost
                self._call("acknowledge", reading.handle.handle_id, tuple(reading.taken))
            reading.taken = []

    def rollout(
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
        """Submit and wait; groups come back in the order of their prompts. Arguments as in `submit`."""
        handle = self.submit(
            prompts, n_samples_per_prompt, sampling, run_seed=run_seed, group_ids=group_ids, reward=reward
        )
        done: list[Group] = []
        num_tokens = 0
        try:
            for group in self.groups(handle):
                done.append(group)
                num_tokens += sum(len(t.token_ids) for t in group.trajectories)
                if progress is not None:
                    progress(len(done), handle.num_groups, num_tokens)
        except BaseException:
            with contextlib.suppress(LongrollError):
                self.abort(handle)
            raise
        return handle.in_order(done)

    def abort(self, handle: RolloutHandle) -> None:
        """Give up what is unfinished; every group of the handle can still be read, unless the controller dies."""
        reading = self._reader.of(handle)
        reading.is_aborted = True
        try:
            self._call("abort", reading.handle.handle_id)
        except (ServiceLost, UnknownHandle):  # nothing of it runs under a controller that does not know it
            if reading.request is None or self._find is None:
                raise

    def acknowledge_groups(self, run_id: str, group_ids: Sequence[str], checkpoint: str) -> int:
        """A checkpoint that is safe has learned from these groups: they are never delivered again.

        Returns:
            How many were not acknowledged before.

        Raises:
            JournalConflict: One of them is not finished.
        """
        num_new: int = self._call("acknowledge_groups", run_id, tuple(group_ids), checkpoint)
        return num_new

    def progress(self, handle: RolloutHandle) -> Progress:
        progress: Progress = self._call("progress", self._reader.of(handle).handle.handle_id)
        return progress

    def stats(self) -> ServiceStats:
        stats: ServiceStats = self._call("stats")
        return stats

    def feed(self, query: FeedQuery | None = None) -> Feed:
        """What a dashboard shows; bounded whatever the fleet."""
        feed: Feed = self._call("feed", query)
        return feed

    def note_mismatch(self, version: int, kl: float, report: MismatchReport | None = None) -> None:
        """Tell what a training step found comparing sampling with training, for the dashboard.

        Args:
            version: Of the weights after the step.
            kl: KL(sampling ‖ training) over the whole step, nats a token.
            report: The same by cause; None in steps that do not measure it.
        """
        self._call("note_mismatch", version, kl, report)

    def drain(self, group: int) -> None:
        """Give an expert-parallel group nothing more; returns when what it ran has gone on elsewhere.

        Its shards go on receiving weights, and may be stopped, or used again after `undrain`.

        Raises:
            InvalidRequest: There is no such group, or no other one takes chunks.
        """
        self._call("drain", group)

    def undrain(self, group: int) -> None:
        """Let a drained group take chunks again. Raises InvalidRequest for an unknown one."""
        self._call("undrain", group)

    def resize(self, num_groups: int) -> None:
        """Say how many expert-parallel groups there shall be, while rollouts run; returns at once.

        New ones take chunks as soon as they hold the live version (`stats` tells). Of fewer, those with the highest
        numbers are drained and stopped; what they ran goes on elsewhere.

        Raises:
            InvalidRequest: Fewer than 1, the service has no supervisor, or no group that stays takes chunks.
        """
        self._call("resize", num_groups)

    def publish(self, version: int, weights: Weights) -> SyncReport:
        """Send new weights to all shards and switch to them.

        Args:
            version: Number of optimizer steps done; above the live version.
            weights: Every tensor by checkpoint name, or (name, tensor) pairs in any order; of an iterator
                one bucket of tensors exists at a time. They are encoded here, as they are served.

        Raises:
            SyncRefused: The old version goes on serving.
            EngineDead: No shard is left.
        """
        if self._plans is None:
            self._plans = self._call("served_plans")
        outgoing = OutgoingVersion(
            version, weights, self._plans, self._bucket_bytes, self._published, is_kept=self._send_changes
        )
        attempt = self._begin(version, outgoing)
        try:
            for ref in outgoing.buckets(attempt):
                self.publish_bucket(ref)
            report = self.commit_publish(version)
        except BaseException:
            with contextlib.suppress(LongrollError):
                self.abandon_publish(version)
            raise
        self._published = outgoing.published
        return report

    def _begin(self, version: int, outgoing: OutgoingVersion) -> int:
        if outgoing.base is not None:
            with contextlib.suppress(SyncRefused):  # somebody else has published, or a shard was restarted
                return self.begin_publish(version, outgoing.base, outgoing.pieces)
            outgoing.send_everything()
        return self.begin_publish(version, None, outgoing.pieces)

    def begin_publish(self, version: int, base: int | None, pieces: Sequence[tuple[int, Piece]]) -> int:
        """Open a publication, for trainers that make buckets themselves; see Publisher.begin.

        Returns:
            Number of the attempt, which every bucket must carry.
        """
        attempt: int = self._call("begin_publish", version, base, tuple(pieces))
        return attempt

    def publish_bucket(self, ref: BucketRef) -> None:
        """Let every shard take in a bucket; its segment is unlinked, whatever happens."""
        try:
            self._call("publish_bucket", ref)
        finally:
            unlink(ref)

    def commit_publish(self, version: int) -> SyncReport:
        report: SyncReport = self._call("commit_publish", version)
        return report

    def abandon_publish(self, version: int) -> None:
        self._call("abandon_publish", version)

    def _call(self, method: str, *args: Any, may_repeat: bool = False) -> Any:
        while True:
            try:
                return getattr(self._controller, method).remote(*args).future().result()
            except Exception as error:  # every error is passed on, in its own class
                known = client_error(error)
                if not isinstance(known, ServiceLost) or self._find is None:
                    raise known from None
                self._controller = find_again(self._find, self._controller, known)
                if not may_repeat and method not in REPEATABLE:
                    raise known from None
