"""The controller: one async Ray actor between clients, shards and reward workers.

    submit ─► Scheduler ─► shard.generate ─► journal ─► Scheduler ─► RewardPool ─► journal ─► Ledger ─► next_groups

Owns the event loop in which these meet, and the background tasks. What happens to a trajectory is
decided in `rollout.scheduler`, who is owed what in its ledger, what is durable in
`actors.journal_keeper`, and how weights flip in `actors.publications`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from actors.call_line import CALLS, CallLines, CallServer
from actors.feed_calls import FeedCalls, FeedState
from actors.fleet_calls import FleetCalls
from actors.interactive_calls import InteractiveCalls
from actors.journal_keeper import JournalKeeper
from actors.line import LineServer
from actors.process import place_of_this_process
from actors.publication_calls import PublicationCalls
from actors.publications import Publications
from actors.receivers import answer
from actors.rewards import RewardPool, RewardTimeout
from actors.rollout_calls import RolloutCalls
from actors.shard_watch import ShardWatch
from actors.stats_calls import StatsCalls
from rollout.config import JournalConfig, ModelConfig, SchedulerConfig, SupervisorConfig, SyncConfig
from rollout.errors import EngineDead, InvalidRequest, RewardFailed
from rollout.fleet import Place, ShardInfo, Supervision
from rollout.handles import Delivery, Progress, RolloutHandle
from rollout.rate import RateWindow
from rollout.scheduler.admission import Admission
from rollout.scheduler.jobs import ShardCapacity
from rollout.scheduler.ledger import Ledger
from rollout.scheduler.records import DeathKind, Dispatch, FailureKind, FinishedGroup, ScoreJob
from rollout.scheduler.scheduler import Scheduler
from rollout.sync.encoding import TensorPlan
from rollout.types import ChunkResult, ModelLimits, RolloutRequest

logger = logging.getLogger(__name__)
HOUSEKEEPING_S = 1.0
RATE_WINDOW_S = 10.0
STALE_POLL_S = 0.2


class Controller(FleetCalls, FeedCalls, InteractiveCalls, PublicationCalls, RolloutCalls, StatsCalls):
    """Serves clients; see rollout.client for the other end of every method.

    Args:
        config: Queues and rewards.
        sync: Publications.
        model: Whose tokenizer the reward workers use.
        shards: Actor handles of shards that have started, by rank.
        infos: What they said about themselves, in the same order.
        plans: Every tensor of the model and how it is served, for the check of publications.
        initial_version: Version of the weights that the shards loaded.
        journal: Where rollouts are made durable.
        supervisor: When an engine is taken for dead; None: nobody starts a dead one anew, so nobody waits for it.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        sync: SyncConfig,
        model: ModelConfig,
        shards: Sequence[Any],
        infos: Sequence[ShardInfo],
        plans: Mapping[str, TensorPlan],
        initial_version: int = 0,
        journal: JournalConfig | None = None,
        supervisor: SupervisorConfig | None = None,
    ) -> None:
        self._config, self._sync, self._plans = config, sync, dict(plans)
        self._shards = {info.rank: shard for info, shard in zip(infos, shards, strict=True)}
        self._groups = {info.rank: info.group for info in infos}
        self._limits = ModelLimits(
            vocab_size=min(info.vocab_size for info in infos), max_model_len=min(info.max_model_len for info in infos)
        )
        self._capacities = {info.rank: self._capacity(info) for info in infos}
        self._scheduler = Scheduler(
            config,
            self._limits,
            self._capacities,
            partial_rollout=sync.partial_rollout,
            engine_wait_s=supervisor.engine_wait_s if supervisor else 0.0,
            version=initial_version,
        )
        self._keeper = JournalKeeper(journal or JournalConfig())
        self._ledger = Ledger(config.client_timeout_s)
        self._rewards = RewardPool(model, config.num_reward_workers, config.reward_timeout_s)
        self._publications = Publications(self._shards, infos, plans, sync, initial_version, self._on_lost_shards)
        self._watch = ShardWatch((supervisor or SupervisorConfig()).hang_timeout_s)
        self._is_supervised = supervisor is not None
        self._drained: set[int] = set()
        self._num_groups_wanted = len(set(self._groups.values()))
        self._deaths: Counter[str] = Counter()
        self._supervision = Supervision()
        self._events: dict[str, asyncio.Event] = {}
        self._aborting: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_flips_under_way = 0
        self._num_groups_expired = self._num_internal_errors = 0
        self._rate = RateWindow(RATE_WINDOW_S)
        self._admission = Admission(config.admission, time.monotonic())
        self._feed = FeedState(time.monotonic())
        self._calls = CallLines()
        self._line_server = LineServer({CALLS: CallServer({"complete": self.complete, "abort": self.abort})})
        self._is_stopping = False

    async def start(self) -> None:
        """Begin housekeeping; called once, by whoever made this actor."""
        self._introduce()
        self._spawn(self._keep_house(), "housekeeping", lambda reason: None)

    async def place(self) -> Place:
        """This actor's process."""
        return place_of_this_process()

    async def limits(self) -> ModelLimits:
        return self._limits

    async def submit(self, request: RolloutRequest, client_id: str, handle_id: str | None = None) -> RolloutHandle:
        """Queue a request; one with a run id goes on from what is durable of its groups.

        Args:
            request: What is asked for.
            client_id: Who asks.
            handle_id: Of the submission, unique for ever; None: it is chosen here.

        Raises:
            InvalidRequest: A prompt does not fit the model, or there is no such reward.
            JournalConflict: A group of that run and id was another one.
            QueueFull: Too much is under way.
            EngineDead: No engine is left.
        """
        await self._rewards.check(request.reward)
        handle_id = handle_id or uuid.uuid4().hex
        await self._take_over(request)
        restored = await self._keeper.submit(request, handle_id)
        self._scheduler.remember(await self._keeper.earlier_lengths(request.run_id))
        now = time.monotonic()
        self._scheduler.submit(handle_id, request, now, restored)
        self._ledger.open(handle_id, client_id, len(request.prompts), now)
        self._events[handle_id] = asyncio.Event()
        self._pump()
        return RolloutHandle(
            handle_id=handle_id, group_ids=request.group_ids, n_samples_per_prompt=request.n_samples_per_prompt
        )

    async def _take_over(self, request: RolloutRequest) -> None:
        """Whoever asked for groups of this run before has lost them: their tokens so far belong to this request."""
        for handle_id in self._scheduler.book.handles_of(request):
            logger.info("run %s asks again for groups of %s, which is closed", request.run_id, handle_id)
            self._ledger.close(handle_id)
            self._abort(handle_id)
            self._pump()
            while self._scheduler.book.is_pending(handle_id):
                await asyncio.sleep(STALE_POLL_S)
            self._close(handle_id)

    async def next_groups(
        self,
        handle_id: str,
        max_groups: int,
        timeout_s: float,
        acknowledged: Sequence[str] = (),
        skip: frozenset[str] = frozenset(),
    ) -> Delivery:
        """Wait for finished groups; they are delivered again until acknowledged.

        Args:
            handle_id: The submission.
            max_groups: Most groups in the answer, ≥ 1.
            timeout_s: Longest wait; the answer is empty after it.
            acknowledged: Ids of groups that the client has received.
            skip: Ids of groups that it does not want again, though it has not received them for good.

        Raises:
            UnknownHandle: Never issued, closed or expired.
        """
        if max_groups < 1:
            raise InvalidRequest("max_groups", max_groups, "an integer ≥ 1")
        if await self.acknowledge(handle_id, acknowledged):
            return Delivery(groups=(), is_done=True)
        deadline = time.monotonic() + min(timeout_s, self._config.client_timeout_s / 2)
        while True:
            event = self._events.get(handle_id)
            if event is not None:
                event.clear()
            delivery = self._ledger.peek(handle_id, max_groups, skip)
            remaining_s = deadline - time.monotonic()
            if delivery.groups or delivery.is_done or remaining_s <= 0 or event is None:
                return delivery
            try:
                await asyncio.wait_for(event.wait(), remaining_s)
            except TimeoutError:
                continue  # one last look, then an empty answer

    async def acknowledge(self, handle_id: str, group_ids: Sequence[str]) -> bool:
        """The client has these groups. Returns True when it has them all, which closes the handle."""
        self._ledger.touch(handle_id, time.monotonic())
        is_closed = self._ledger.acknowledge(handle_id, group_ids)
        if is_closed:
            self._close(handle_id)
        return is_closed

    async def abort(self, handle_id: str) -> None:
        """Give up unfinished trajectories; all groups stay deliverable. Raises UnknownHandle."""
        self._ledger.touch(handle_id, time.monotonic())
        self._ledger.mark_aborted(handle_id)
        self._abort(handle_id)
        self._pump()

    async def progress(self, handle_id: str) -> Progress:
        self._ledger.touch(handle_id, time.monotonic())
        return self._scheduler.book.progress(handle_id)

    async def shutdown(self) -> None:
        """End all background work and the reward processes; the shards are their maker's."""
        self._is_stopping = True
        for task in list(self._tasks):
            task.cancel()
        self._rewards.stop()
        self._line_server.close()
        self._calls.close()
        await self._keeper.close()

    def _pump(self) -> None:
        """Carry what the scheduler has ready to where it goes. Never waits."""
        if self._is_stopping:
            return
        for restart in self._scheduler.book.take_restarts():
            self._spawn(self._keeper.restart(restart), f"restart in {restart.group_id}", lambda reason: None)
        for finished in self._scheduler.book.take_finished():
            self._note_finished(finished)
            self._spawn(self._deliver(finished), f"delivery of {finished.group.group_id}", lambda reason: None)
        for job in self._scheduler.book.take_score_jobs():
            self._spawn_for(job.flight_id, self._score(job))
        if self._num_flips_under_way == 0:
            for dispatch in self._scheduler.next_dispatches(time.monotonic()):
                self._note_start(dispatch)
                self._spawn_for(dispatch.chunk.trajectory_id, self._run_chunk(dispatch))
            for rank, flight_ids in self._scheduler.take_cuts(time.monotonic()).items():
                self._spawn_abort(rank, flight_ids)

    async def _deliver(self, finished: FinishedGroup) -> None:
        try:
            await self._keeper.finish(finished)
        finally:  # what cannot be recorded is delivered all the same; the error is counted
            if not self._ledger.add(finished.handle_id, finished.group):
                self._num_groups_expired += 1
            self._wake(finished.handle_id)

    async def _run_chunk(self, dispatch: Dispatch) -> None:
        shard, flight_id = self._shards[dispatch.shard], dispatch.chunk.trajectory_id
        try:
            if dispatch.chunk.stream is None:
                result = await answer(shard.generate.remote(dispatch.chunk))
            else:
                result = await answer(self._calls.call(shard, "generate", dispatch.chunk))
        except EngineDead as error:
            self._note_lost(dispatch, "lost")
            if self._shards[dispatch.shard] is shard:
                self._on_shard_death(dispatch.shard, str(error))
        except Exception as error:  # whatever an engine raises about one request fails that one only
            logger.warning("chunk of %s failed on shard %d: %r", flight_id, dispatch.shard, error)
            reason = f"shard {dispatch.shard}: {type(error).__name__}: {error}"
            self._fail_chunk(dispatch, reason)
        else:
            if (result.trajectory_id, result.shard) != (flight_id, dispatch.shard):
                got = f"{result.trajectory_id} of shard {result.shard}"
                reason = f"engine result: got {got}, expected {flight_id} of shard {dispatch.shard}"
                self._fail_chunk(dispatch, reason)
            else:
                await self._land(result)
        self._pump()

    async def _land(self, result: ChunkResult) -> None:
        """The shard is free at once; the trajectory goes on when its chunk is durable."""
        self._note_end(result)
        landing = self._scheduler.land(result, time.monotonic())
        if landing is None:
            return
        if self._keeper.keeps(landing.run_id):
            self._pump()
            await self._keeper.append(landing)
        self._scheduler.landed(landing.flight_id, time.monotonic())

    def _fail_chunk(self, dispatch: Dispatch, reason: str) -> None:
        self._note_lost(dispatch, "failed")
        flight_id, kind = dispatch.chunk.trajectory_id, FailureKind.ENGINE_ERROR
        self._scheduler.on_chunk_failed(flight_id, dispatch.shard, kind, reason, time.monotonic())

    async def _score(self, job: ScoreJob) -> None:
        try:
            score = await self._rewards.score(job.reward, job.group.prompt, tuple(job.trajectory.token_ids))
        except RewardFailed as error:
            kind = FailureKind.REWARD_TIMEOUT if isinstance(error, RewardTimeout) else FailureKind.REWARD_RAISED
            self._scheduler.on_reward_failed(job.flight_id, kind, f"reward: {error}", time.monotonic())
        else:
            self._scheduler.on_reward(job.flight_id, score.reward, score.extras, time.monotonic())
        self._pump()

    def _abort(self, handle_id: str) -> None:
        running = self._scheduler.abort(handle_id, time.monotonic())
        self._aborting.add(handle_id)
        if not running:
            self._aborting.discard(handle_id)
        for rank, flight_ids in running.items():
            self._spawn_abort(rank, flight_ids)

    def _spawn_abort(self, rank: int, flight_ids: list[str]) -> None:
        self._spawn(self._abort_on(rank, flight_ids), f"abort on shard {rank}", lambda reason: None)

    async def _abort_on(self, rank: int, flight_ids: list[str]) -> None:
        try:
            await answer(self._shards[rank].abort.remote(flight_ids))
        except EngineDead as error:
            self._on_shard_death(rank, str(error))
            self._pump()

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            try:
                self._keep_house_once(time.monotonic())
                await self._keeper.keep_house()
            except Exception:  # this loop must go on; the fault is visible as a metric
                self._num_internal_errors += 1
                logger.exception("housekeeping failed")

    def _keep_house_once(self, now: float) -> None:
        expired = self._ledger.expire(now)
        for handle_id in expired.to_abort:
            logger.warning("the client of %s has been silent; aborting its unfinished work", handle_id)
        self._num_groups_expired += expired.num_groups_dropped
        for handle_id in expired.closed:
            self._close(handle_id)
        # An abort can overtake the request it is for on its way into the engine, so it is repeated.
        for handle_id in {*expired.to_abort, *self._aborting}:
            self._abort(handle_id)
        self._rate.sample(now, self._scheduler.counts.num_tokens_generated)
        self._scheduler.keep_house(now)
        self._keep_feed(now)
        live = {rank: self._shards[rank] for rank in self._scheduler.live_shards}
        busy = {rank for rank in live if self._scheduler.running_on(rank)}
        for rank in self._watch.look(live, busy, now):
            self._on_shard_death(rank, "its engine made no step for supervisor.hang_timeout_s", DeathKind.HUNG)
        self._tick_admission(now)
        self._pump()

    def _wake(self, handle_id: str) -> None:
        event = self._events.get(handle_id)
        if event is not None:
            event.set()

    def _close(self, handle_id: str) -> None:
        self._scheduler.book.forget(handle_id)
        self._aborting.discard(handle_id)
        self._wake(handle_id)
        self._events.pop(handle_id, None)

    def _spawn_for(self, flight_id: str, work: Coroutine[Any, Any, None]) -> None:
        def fail(reason: str) -> None:
            self._scheduler.on_internal_error(flight_id, reason, time.monotonic())
            self._pump()

        self._spawn(work, flight_id, fail)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str, on_error: Callable[[str], None]) -> None:
        """Run in the background; an exception is logged, counted and given to `on_error`."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if task.cancelled() or task.exception() is None:
                return
            error = task.exception()
            self._num_internal_errors += 1
            logger.error("background task %s failed", name, exc_info=error)
            on_error(f"internal error: {type(error).__name__}: {error}")

        task.add_done_callback(done)

    def _capacity(self, info: ShardInfo) -> ShardCapacity:
        return ShardCapacity(
            max_running=self._config.max_running_per_shard,
            kv_tokens=info.kv_tokens,
            block_tokens=info.block_tokens,
            group=info.group,
        )
