"""The journal as its controller holds it: awaitable calls, answered once they are durable.

One thread owns the store. It takes whatever calls have gathered, does them in one transaction (group commit), and
answers them together once that is durable; so a call that was answered survives, and one that was not may or may not.
A call that is refused does not disturb the others; an error of the database fails all calls of its transaction, which
may simply be made again.

Owns the thread and the grouping. Knows nothing of what is stored, nor of the time (it is passed in).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from rollout.errors import InvalidRequest
from rollout.journal.encoding import encode_chunk
from rollout.journal.errors import JournalConflict, JournalLost
from rollout.journal.outcome import encode_outcome
from rollout.journal.reading import slices
from rollout.journal.records import JournalCounts, RestoredGroup, TrajectoryKey, TrajectoryRecord
from rollout.journal.store import Store
from rollout.types import ChunkResult, RolloutRequest, Trajectory

logger = logging.getLogger(__name__)
MAX_CALLS = 4096  # calls of one transaction
T = TypeVar("T")


@dataclass(slots=True)
class _Call:
    """A call on its way through the thread. `value` and `error` are the thread's until it answers."""

    function: Callable[[Store], Any]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    is_transactional: bool
    value: Any = None
    error: BaseException | None = None


class Journal:
    """All calls may be made from any event loop; one that is cancelled may still become durable.

    Args:
        store: Owned from here on.
        group_commit_s: How long the first call of a transaction waits for others.
        retention_s: Default age of acknowledgements at which `compact` drops tokens.
    """

    def __init__(self, store: Store, *, group_commit_s: float, retention_s: float) -> None:
        self._store, self._group_commit_s, self._retention_s = store, group_commit_s, retention_s
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # between a call that is queued and the end of the queue
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def counts(self) -> JournalCounts:
        """Totals so far, which go on changing."""
        return self._store.counts

    async def submit(self, run_id: str, request: RolloutRequest, handle_id: str) -> list[RestoredGroup]:
        """Record the groups of a request under (run_id, group_id).

        Returns:
            What is durable of those that were known already, in the order of the request; they belong to the new
            handle from now on. Acknowledged ones come without tokens: they are not to be generated or delivered again.

        Raises:
            JournalConflict: A known group with another prompt, sampling, number of samples, reward or run seed.
            InvalidRequest: Ids or metadata that cannot be kept as text and plain data.
        """
        return await self._call(lambda store: store.submit(run_id, request, handle_id))

    async def append_chunk(self, key: TrajectoryKey, epoch: int, start: int, result: ChunkResult) -> bool:
        """Make a chunk durable. Only then may its successor be scheduled.

        Args:
            key: Its trajectory.
            epoch: Times the trajectory was restarted from scratch.
            start: Tokens of the trajectory before it.
            result: What the engine returned.

        Returns:
            Whether it is new: False for one that is durable already, and for one without tokens.

        Raises:
            JournalConflict: Other content under the same key, a gap, an overlap, another epoch, or the end is recorded.
            JournalFull: No room; it may be sent again.
            InvalidRequest: The trajectory is unknown, or the result inconsistent.
        """
        if not result.token_ids:
            return False
        chunk = encode_chunk((key, epoch, start), result)
        return await self._call(lambda store: store.append_chunk(key, epoch, start, chunk))

    async def finish(self, key: TrajectoryKey, epoch: int, trajectory: Trajectory) -> bool:
        """Record how a trajectory ended: status, finish reason, reward, error and metadata. Its tokens are durable.

        Metadata must be plain data, and its "prompt" is that of the group: it is not kept again.

        Returns:
            Whether it is new.

        Raises:
            JournalConflict: Another end is recorded, another epoch, or not as many tokens.
            InvalidRequest: The trajectory is unknown or pending, or has what cannot be kept.
        """
        outcome = encode_outcome(key, epoch, trajectory)
        return await self._call(lambda store: store.finish(key, epoch, outcome))

    async def restart(self, key: TrajectoryKey, epoch: int) -> bool:
        """Drop a pending trajectory's tokens; chunks of epoch `epoch`, one more than before, follow from token 0.

        Returns:
            Whether anything changed.

        Raises:
            JournalConflict: The epoch is not the next one, or the trajectory has ended.
        """
        return await self._call(lambda store: store.restart(key, epoch))

    async def lease_ids(self, run_id: str, consumer: str, max_groups: int, lease_s: float, now: float) -> list[str]:
        """Like `lease`, for a caller who has the groups: their ids only."""
        leased = await self._call(lambda store: store.lease(run_id, consumer, max_groups, lease_s, now))
        return [group_id for _, group_id in leased]

    async def lease(
        self, run_id: str, consumer: str, max_groups: int, lease_s: float, now: float
    ) -> list[RestoredGroup]:
        """Hand out groups that are finished and neither acknowledged nor leased, in the order in which they finished.

        Args:
            run_id: Of this run only.
            consumer: Who gets them; see `release`.
            max_groups: At most so many.
            lease_s: After this many seconds an unacknowledged group may be handed out again, to anybody.
            now: The time in seconds, from a clock that all restarts share.
        """

        def leased(store: Store) -> list[RestoredGroup]:
            return store.reader.load([key for key, _ in store.lease(run_id, consumer, max_groups, lease_s, now)])

        return await self._call(leased)

    async def acknowledge(self, run_id: str, group_ids: Sequence[str], checkpoint: str, now: float) -> int:
        """Note that a safe checkpoint has learned from groups; they are never handed out again.

        Returns:
            How many were not acknowledged before.

        Raises:
            InvalidRequest, JournalConflict: A group is unknown, or not finished; none was acknowledged.
        """
        ids = tuple(group_ids)
        return await self._call(lambda store: store.acknowledge(run_id, ids, checkpoint, now))

    async def release(self, run_id: str, consumer: str) -> int:
        """End a consumer's leases: it was restarted, and gets back all it had not acknowledged. Returns how many."""
        return await self._call(lambda store: store.release(run_id, consumer))

    async def restore(self) -> AsyncIterator[RestoredGroup]:
        """Every group with a pending trajectory, of all runs, in the order of submission."""
        keys = await self._call(lambda store: store.reader.unfinished_keys(), is_transactional=False)
        for some in slices(keys):
            for group in await self._load(some):
                yield group

    async def _load(self, keys: Sequence[int]) -> list[RestoredGroup]:
        return await self._call(lambda store: store.reader.load(keys), is_transactional=False)

    async def trajectory(self, run_id: str, trajectory_id: str) -> TrajectoryRecord:
        """One trajectory, "<group_id>/<sample_index>". Raises InvalidRequest if its tokens are not there."""
        key = TrajectoryKey.parse(run_id, trajectory_id)
        return await self._call(lambda store: store.reader.trajectory(key), is_transactional=False)

    async def group(self, run_id: str, group_id: str) -> RestoredGroup:
        """One group with its tokens. Raises InvalidRequest if they are not there."""
        return await self._call(lambda store: store.reader.group(run_id, group_id), is_transactional=False)

    async def lengths(self, run_id: str, most: int) -> list[tuple[str, int]]:
        """Lengths of a run's newest outputs by prompt; see Reader.lengths."""
        return await self._call(lambda store: store.reader.lengths(run_id, most), is_transactional=False)

    async def compact(self, now: float) -> int:
        """Drop the tokens of groups acknowledged longer than the retention time ago; their keys stay.

        Other calls are served in between. Returns the number of groups.
        """
        num_groups = 0
        while some := await self._call(lambda store: store.compact_some(now - self._retention_s)):
            num_groups += some
        await self._call(lambda store: store.tidy(), is_transactional=False)
        return num_groups

    async def close(self) -> None:
        """Finish what was called, then let go of the database. Later calls raise JournalLost."""
        with self._gate:
            if not self._is_closed:
                self._is_closed = True
                self._calls.put(None)
        await asyncio.to_thread(self._thread.join)

    async def _call(self, function: Callable[[Store], T], *, is_transactional: bool = True) -> T:
        loop = asyncio.get_running_loop()
        call = _Call(function, loop.create_future(), loop, is_transactional)
        with self._gate:
            if self._is_closed:
                raise JournalLost("journal: got a call, expected none after it was closed")
            self._calls.put(call)
        return await call.future

    def _run(self) -> None:
        is_open = True
        while is_open:
            batch = [self._calls.get()]
            if self._group_commit_s and batch[0] is not None:
                time.sleep(self._group_commit_s)
            while len(batch) < MAX_CALLS and batch[-1] is not None:
                try:
                    batch.append(self._calls.get_nowait())
                except queue.Empty:
                    break
            is_open = batch[-1] is not None
            self._serve([call for call in batch if call is not None])
        self._store.close()

    def _serve(self, calls: list[_Call]) -> None:
        """In order: neighbours that need a transaction share one, the others are done between."""
        shared: list[_Call] = []
        for call in calls:
            if call.is_transactional:
                shared.append(call)
                continue
            self._commit(shared)
            shared = []
            try:
                call.value = call.function(self._store)
            except Exception as error:  # see _commit
                call.error = error
            self._answer([call])
        self._commit(shared)

    def _commit(self, calls: list[_Call]) -> None:
        """One transaction for all; if it fails, one for each, so that only those fail that must."""
        if not calls:
            return
        begun = time.perf_counter()
        try:
            with self._store.transaction():
                for call in calls:
                    call.value, call.error = None, None
                    self._attempt(call)
        except Exception as error:  # the thread's edge: whoever waits is told, and the thread goes on
            if len(calls) > 1:
                logger.warning("journal transaction of %d calls failed, trying each alone: %s", len(calls), error)
                for call in calls:
                    self._commit([call])
                return
            calls[0].error = error
        took = time.perf_counter() - begun
        counts = self._store.counts
        counts.commit_s += took
        counts.max_commit_s = max(counts.max_commit_s, took)
        self._answer(calls)

    def _attempt(self, call: _Call) -> None:
        try:
            call.value = call.function(self._store)
        except (JournalConflict, InvalidRequest) as error:  # refused before anything was written
            call.error = error

    def _answer(self, calls: list[_Call]) -> None:
        counts = self._store.counts
        counts.num_calls += len(calls)
        waiting: dict[asyncio.AbstractEventLoop, list[_Call]] = {}
        for call in calls:
            if call.error is not None:
                name = type(call.error).__name__
                counts.num_failed[name] = counts.num_failed.get(name, 0) + 1
            waiting.setdefault(call.loop, []).append(call)
        for loop, answered in waiting.items():
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits there
                loop.call_soon_threadsafe(_resolve, answered)


def _resolve(calls: list[_Call]) -> None:
    for call in calls:
        if call.future.done():  # cancelled
            continue
        if call.error is not None:
            call.future.set_exception(call.error)
        else:
            call.future.set_result(call.value)
