"""Every trajectory under way, and everything that can happen to one until its group is finished.

            ┌──── engine died ─────┐   ┌──── budget ended, engine aborted ────┐
            ▼                      │   ▼                                      │
         QUEUED ── next_dispatches ─► RUNNING ──── land ────► LANDING ── landed ┤
            │ client abort, no engine left         (made durable)             │ generation ended
            ▼                                                                 ▼ (or client abort: FINAL)
          FINAL ◄──────────────── on_reward(_failed) ────────────────────── SCORING

Who runs next, and where, is the dispatcher's to say. Pure and deterministic: events come in as calls with the time;
work goes out through `next_dispatches`, `take_cuts`, and the book's `take_restarts`, `take_score_jobs` and
`take_finished`. Knows nothing of Ray, engines, clients, clocks, or of how a chunk is made durable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rollout.config import OnStale, SchedulerConfig
from rollout.errors import EngineDead, QueueFull
from rollout.scheduler.dispatcher import DispatchCounts, Dispatcher
from rollout.scheduler.flight_book import FlightBook
from rollout.scheduler.intake import Restored, fault_of, make_group
from rollout.scheduler.jobs import ShardCapacity
from rollout.scheduler.records import Counts, Dispatch, FailureKind, Flight, Landing, Phase, Submission
from rollout.scheduler.shard_book import ShardBook
from rollout.types import Chunk, ChunkResult, FinishReason, ModelLimits, RolloutRequest


class Scheduler:
    """Owns submissions and trajectories.

    Args:
        config: Limits and policy.
        limits: What the model accepts.
        shards: What every shard can take, by rank.
        partial_rollout: Keep the tokens of a chunk that an engine aborted, instead of starting anew.
        engine_wait_s: How long trajectories wait for an engine when none is alive; 0: they fail at once.
        version: Live weight version.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        limits: ModelLimits,
        shards: Mapping[int, ShardCapacity],
        *,
        partial_rollout: bool = True,
        engine_wait_s: float = 0.0,
        version: int = 0,
    ) -> None:
        self._config, self._limits, self._partial_rollout = config, limits, partial_rollout
        self._dispatcher = Dispatcher(config, shards)
        self._engine_wait_s, self._version = engine_wait_s, version
        self._book = FlightBook(self._dispatcher)
        self._death_reason = "no engine was ever started"
        self._died_at = 0.0

    @property
    def book(self) -> FlightBook:
        """Submissions and trajectories; to be read, and its `take_…` emptied, by the owner of the scheduler."""
        return self._book

    @property
    def counts(self) -> Counts:
        return self._book.counts

    @property
    def num_queued(self) -> int:
        return self._dispatcher.num_queued

    @property
    def num_running(self) -> int:
        return self._dispatcher.num_running

    @property
    def live_shards(self) -> list[int]:
        return self._dispatcher.book.live

    @property
    def dispatch_counts(self) -> DispatchCounts:
        return self._dispatcher.counts

    @property
    def shard_book(self) -> ShardBook:
        """Loads of the shards; to be read only."""
        return self._dispatcher.book

    def running_on(self, shard: int) -> list[str]:
        return self._dispatcher.running_on(shard)

    def num_waiting_before(self, priority: int) -> int:
        """How many running trajectories must end before a new one of this priority starts; see the dispatcher."""
        return self._dispatcher.num_waiting_before(priority)

    def submit(
        self,
        handle_id: str,
        request: RolloutRequest,
        now: float,
        restored: Mapping[str, Sequence[Restored]] | None = None,
    ) -> None:
        """Queue all trajectories of a request, or none.

        Args:
            handle_id: Identifies it.
            request: What is asked for.
            now: Seconds.
            restored: What is durable of its groups, by group id: every member.

        Raises:
            InvalidRequest: A prompt does not fit the model, or a seed cannot be derived.
            QueueFull: More trajectories would be under way than allowed.
            EngineDead: No shard is alive, and none is waited for.
        """
        if not self.live_shards and not self._is_waiting_for_engines(now):
            raise EngineDead(f"no live engine: {self._death_reason}")
        for prompt in request.prompts:
            self._limits.check(prompt, request.sampling)
        num_new = len(request.prompts) * request.n_samples_per_prompt
        most = self._config.max_queued_trajectories
        if len(self._book.flights) + num_new > most:
            raise QueueFull(
                f"submission: got {num_new} trajectories with {len(self._book.flights)} under way, "
                f"expected at most max_queued_trajectories = {most} in all"
            )
        submission = Submission(handle_id=handle_id, request=request, num_groups_pending=len(request.prompts))
        known = restored or {}
        groups = [make_group(request, place, known.get(id_)) for place, id_ in enumerate(request.group_ids)]
        self._book.submissions[handle_id] = submission
        for group in groups:
            self._book.open(submission, group, known.get(group.group_id), now)
        for flight in list(submission.flights.values()):
            if flight.phase is Phase.QUEUED and self._is_stale(flight, self._version):  # restored from long ago
                self._continue(flight, now)

    def remember(self, lengths: Iterable[tuple[str, int]]) -> None:
        """Learn from outputs of an earlier life of the service: (prompt id, tokens) of each, the oldest first."""
        for prompt_id, num_tokens in lengths:
            self._dispatcher.remember(prompt_id, num_tokens)

    def abort(self, handle_id: str, now: float) -> dict[int, list[str]]:
        """End a submission: what is queued is aborted now, what runs when its chunk comes back.

        Trajectories being scored are finished already and keep their outcome.

        Returns:
            For each shard the running flights that its engine should be told to abort.
        """
        submission = self._book.submissions.get(handle_id)
        if submission is None:
            return {}
        submission.is_aborted = True
        running: dict[int, list[str]] = {}
        for flight in list(submission.flights.values()):
            if flight.phase is Phase.QUEUED:
                self._book.end_aborted(flight, now)
            elif flight.phase is Phase.RUNNING:
                running.setdefault(self._shard_of(flight), []).append(flight.flight_id)
        return running

    def next_dispatches(self, now: float) -> list[Dispatch]:
        """Chunks to start now."""
        dispatches = []
        for assignment in self._dispatcher.next_assignments(now):
            flight = self._book.flights[assignment.job_id]
            chunk = self._start(flight, assignment.budget_tokens, now)
            dispatches.append(Dispatch(shard=assignment.shard, chunk=chunk))
        return dispatches

    def take_cuts(self, now: float) -> dict[int, list[str]]:
        """Running chunks that their engines should abort now, by shard: something more urgent waits."""
        cuts: dict[int, list[str]] = {}
        for shard, flight_id in self._dispatcher.take_cuts(now):
            cuts.setdefault(shard, []).append(flight_id)
        return cuts

    def land(self, result: ChunkResult, now: float) -> Landing | None:
        """A chunk came back; its slot is free if it was the last. Returns what must be durable before `landed`.

        None where nothing is kept: a result that nobody waits for any more (counted), a fault, or dropped tokens.
        """
        flight = self._book.flights.get(result.trajectory_id)
        if flight is None or flight.phase is not Phase.RUNNING or self._shard_of(flight) != result.shard:
            self._book.counts.num_stale_results += 1
            return None
        num_tokens = len(result.token_ids)
        self._book.counts.num_tokens_generated += num_tokens
        job = self._dispatcher.job(flight.flight_id)
        assert job is not None, "what runs is known to the dispatcher"
        fault = fault_of(job.budget_tokens, result)
        is_kept = fault is None and result.finish_reason is not FinishReason.ERROR
        goes_on = is_kept and result.finish_reason is FinishReason.LENGTH and num_tokens < job.remaining_tokens
        kept = num_tokens if is_kept else 0
        self._dispatcher.hold(flight.flight_id, kept, now, goes_on=goes_on, duration_s=result.duration_s)
        flight.phase = Phase.LANDING
        if not is_kept:
            self._book.counts.num_tokens_discarded += num_tokens
            if fault is not None:
                self._book.fail(flight, FailureKind.ENGINE_ERROR, fault, now)
            else:
                reason = f"shard {result.shard} reported an error"
                self._retry_or_fail(flight, FailureKind.ENGINE_ERROR, reason, now)
            return None
        if result.finish_reason is FinishReason.ABORT and not (self._partial_rollout or flight.submission.is_aborted):
            self._book.counts.num_tokens_discarded += num_tokens
            self._book.drop_tokens(flight)
            self._continue(flight, now)
            return None
        start, flight.landing = len(flight.trajectory.token_ids), result.finish_reason
        self._book.append(flight, result)
        return Landing(
            flight_id=flight.flight_id,
            run_id=flight.submission.run_id,
            group_id=flight.trajectory.group_id,
            sample_index=flight.trajectory.sample_index,
            epoch=flight.epoch,
            start=start,
            result=result,
        )

    def landed(self, flight_id: str, now: float) -> None:
        """The chunk that `land` returned is durable: the trajectory goes on, or has ended."""
        flight = self._book.flights.get(flight_id)
        if flight is None or flight.phase is not Phase.LANDING or flight.landing is None:
            self._book.counts.num_stale_results += 1  # it failed in between
            return
        reason, flight.landing = flight.landing, None
        if self._is_stale(
            flight, 0
        ):  # its own tokens are too far apart: it ran on before its engine heard of the abort
            self._start_anew(flight, now)
            return
        is_full = len(flight.trajectory.token_ids) >= flight.submission.request.sampling.max_tokens
        if reason is FinishReason.STOP or is_full:  # an abort may cross the last token on its way
            self._dispatcher.end(flight_id)
            self._book.conclude(flight, FinishReason.STOP if reason is FinishReason.STOP else FinishReason.LENGTH, now)
        elif flight.submission.is_aborted:
            self._book.end_aborted(flight, now)
        else:
            self._continue(flight, now)

    def on_chunk(self, result: ChunkResult, now: float) -> None:
        """`land` and `landed` in one, where nothing is made durable."""
        landing = self.land(result, now)
        if landing is not None:
            self.landed(landing.flight_id, now)

    def on_chunk_failed(self, flight_id: str, shard: int, kind: FailureKind, reason: str, now: float) -> None:
        """Running this chunk failed for a reason that another engine would not cure; see `on_chunk`."""
        flight = self._book.flights.get(flight_id)
        if flight is None or flight.phase is not Phase.RUNNING or self._shard_of(flight) != shard:
            self._book.counts.num_stale_results += 1
            return
        self._book.fail(flight, kind, reason, now)

    def on_internal_error(self, flight_id: str, reason: str, now: float) -> None:
        """Handling this trajectory raised, wherever it was: it fails, so that nothing waits for it."""
        flight = self._book.flights.get(flight_id)
        if flight is None:
            return
        self._book.fail(flight, FailureKind.INTERNAL, reason, now)

    def on_shard_death(self, shard: int, reason: str, now: float) -> None:
        """Take a shard out; its chunks run elsewhere with all tokens of earlier chunks, or fail.

        With no shard left, every trajectory that still needs an engine fails, now or after `engine_wait_s`.
        """
        if shard not in self.live_shards:
            return
        self._death_reason, self._died_at = reason, now
        for flight_id in self._dispatcher.on_shard_down(shard):
            self._retry_or_fail(self._book.flights[flight_id], FailureKind.ENGINE_DEAD, reason, now)
        self.keep_house(now)

    def on_shard_up(self, shard: int, capacity: ShardCapacity) -> None:
        """A shard serves: a new one, or one that was taken out, with nothing running on it."""
        self._dispatcher.on_shard_up(shard, capacity)

    def drain(self, shard: int) -> None:
        """A shard gets nothing new, and what it runs goes on elsewhere; see `take_cuts`."""
        self._dispatcher.drain(shard)

    def undrain(self, shard: int) -> None:
        """A shard that was drained gets chunks again; harmless for one that was not."""
        self._dispatcher.undrain(shard)

    def keep_house(self, now: float) -> None:
        """To be called now and then: gives up what has waited for an engine for too long."""
        if not self.live_shards and not self._is_waiting_for_engines(now):
            self._fail_all_queued(f"no live engine: {self._death_reason}", now)

    def _is_waiting_for_engines(self, now: float) -> bool:
        return now - self._died_at < self._engine_wait_s

    def on_version(self, version: int, now: float) -> dict[int, list[str]]:
        """New weights are live. What is too old for them is treated as configured.

        Returns:
            For each shard the flights that its engine should abort: they are too old as well.
        """
        self._version = version
        running: dict[int, list[str]] = {}
        for flight in [f for f in self._book.flights.values() if self._is_stale(f, version)]:
            if flight.phase is Phase.QUEUED:
                self._continue(flight, now)
            elif flight.phase is Phase.RUNNING:
                running.setdefault(self._shard_of(flight), []).append(flight.flight_id)
        return running

    def num_too_old_for(self, version: int) -> int:
        """Trajectories that are still generated and would be too old if this version were live."""
        phases = (Phase.QUEUED, Phase.RUNNING, Phase.LANDING)
        return sum(f.phase in phases and self._is_stale(f, version) for f in self._book.flights.values())

    def _is_stale(self, flight: Flight, version: int) -> bool:
        """Whether it would be too old with one more token of this version, or is by those that it has."""
        spans, most = flight.trajectory.weight_versions, self._config.max_staleness
        return most is not None and bool(spans) and max(version, spans[-1].version) - spans[0].version > most

    def _start_anew(self, flight: Flight, now: float) -> None:
        if flight.submission.is_aborted:  # whoever asks for it again shall not get it as it is
            self._book.drop_tokens(flight)
            self._book.end_aborted(flight, now)
        else:
            self._continue(flight, now)

    def restart_queued(self, now: float) -> None:
        """Drop the tokens of queued trajectories: new weights, and partial rollouts are not wanted."""
        for flight in self._book.flights.values():
            if flight.phase is Phase.QUEUED and flight.trajectory.token_ids:
                self._book.drop_tokens(flight)

    def on_reward(self, flight_id: str, reward: float, extras: dict[str, float], now: float) -> None:
        """A trajectory was scored."""
        flight = self._book.flights.get(flight_id)
        if flight is None or flight.phase is not Phase.SCORING:
            self._book.counts.num_stale_results += 1
            return
        flight.trajectory.reward = reward
        flight.trajectory.metadata["score"] = dict(extras)
        self._book.finish(flight, now)

    def on_reward_failed(self, flight_id: str, kind: FailureKind, reason: str, now: float) -> None:
        """A trajectory could not be scored: it is failed with the reason and has no reward."""
        flight = self._book.flights.get(flight_id)
        if flight is None or flight.phase is not Phase.SCORING:
            self._book.counts.num_stale_results += 1
            return
        self._book.fail(flight, kind, reason, now)

    def _shard_of(self, flight: Flight) -> int:
        job = self._dispatcher.job(flight.flight_id)
        assert job is not None and job.shard is not None, "asked of a running flight only"
        return job.shard

    def _continue(self, flight: Flight, now: float) -> None:
        """A trajectory needs an engine again."""
        if self._is_stale(flight, self._version):
            if self._config.on_stale is OnStale.DROP:
                versions = f"begun under version {flight.trajectory.weight_versions[0].version}, now {self._version}"
                reason = f"too stale: {versions}, max_staleness {self._config.max_staleness}"
                self._book.fail(flight, FailureKind.STALE, reason, now)
                return
            self._book.counts.num_regenerated += 1
            self._book.drop_tokens(flight)
        if flight.phase is Phase.LANDING:
            self._dispatcher.resume(flight.flight_id)
        flight.phase = Phase.QUEUED
        self.keep_house(now)

    def _start(self, flight: Flight, budget_tokens: int, now: float) -> Chunk:
        trajectory = flight.trajectory
        flight.phase = Phase.RUNNING
        trajectory.metadata.setdefault("queue_s", now - flight.submitted_at)
        return Chunk(
            trajectory_id=flight.flight_id,
            token_ids=trajectory.prompt_token_ids + tuple(trajectory.token_ids),
            num_prompt_tokens=len(trajectory.prompt_token_ids),
            max_tokens=budget_tokens,
            seed=trajectory.seed,
            sampling=flight.submission.request.sampling,
            stream=flight.submission.request.stream,
        )

    def _retry_or_fail(self, flight: Flight, kind: FailureKind, reason: str, now: float) -> None:
        """A chunk was lost with its engine; the tokens of earlier chunks are kept."""
        if flight.submission.is_aborted:
            self._book.end_aborted(flight, now)
        elif flight.num_retries >= self._config.max_retries:
            self._book.fail(flight, kind, f"lost {flight.num_retries + 1} times in a row; last: {reason}", now)
        else:
            flight.num_retries += 1
            self._book.counts.num_retries += 1
            self._continue(flight, now)

    def _fail_all_queued(self, reason: str, now: float) -> None:
        for flight in [f for f in self._book.flights.values() if f.phase is Phase.QUEUED]:
            self._book.fail(flight, FailureKind.ENGINE_DEAD, reason, now)
