"""The queue of trajectories and everything that can happen to one until its group is finished.

            ┌──── budget ended, engine aborted, engine died ────┐
            ▼                                                   │
         QUEUED ───── next_dispatches ─────► RUNNING ───────────┤
            │ client abort, no engine left      │ generation ended (or client abort: FINAL)
            ▼                                   ▼
          FINAL ◄──── on_reward(_failed) ─── SCORING

Pure and deterministic: events come in as calls with the time; work goes out through
`next_dispatches`, `take_score_jobs` and `take_finished`. A simulator drives the same class as the
controller. Knows nothing of Ray, engines, clients or clocks.
"""

from __future__ import annotations

import heapq

from rollout.config import SchedulerConfig
from rollout.errors import EngineDead, QueueFull, UnknownHandle
from rollout.handles import Progress
from rollout.scheduler.intake import fault_of, make_group
from rollout.scheduler.placement import choose_shard
from rollout.scheduler.records import (
    Counts,
    Dispatch,
    FailureKind,
    FinishedGroup,
    Flight,
    Phase,
    ScoreJob,
    ShardLoad,
    Submission,
)
from rollout.types import Chunk, ChunkResult, FinishReason, ModelLimits, RolloutRequest, Status

UNSCORED = "none"


class Scheduler:
    """Owns submissions, trajectories and the load of every shard.

    Args:
        config: Limits.
        limits: What the model accepts.
        shards: Ranks of the fleet.
        partial_rollout: Keep the tokens of a chunk that an engine aborted, instead of starting anew.
    """

    def __init__(
        self, config: SchedulerConfig, limits: ModelLimits, shards: list[int], *, partial_rollout: bool = True
    ) -> None:
        self._config, self._limits, self._partial_rollout = config, limits, partial_rollout
        self._shards = {rank: ShardLoad() for rank in shards}
        self._submissions: dict[str, Submission] = {}
        self._flights: dict[str, Flight] = {}
        self._heap: list[tuple[int, int, str]] = []
        self._num_queued = 0
        self._num_submitted = 0
        self._score_jobs: list[ScoreJob] = []
        self._finished: list[FinishedGroup] = []
        self._death_reason = "no engine was ever started"
        self.counts = Counts()

    @property
    def num_queued(self) -> int:
        return self._num_queued

    @property
    def num_running(self) -> int:
        return sum(len(load.running) for load in self._shards.values())

    @property
    def live_shards(self) -> list[int]:
        return [rank for rank, load in self._shards.items() if load.is_live]

    def running_on(self, shard: int) -> list[str]:
        return sorted(self._shards[shard].running)

    def submit(self, handle_id: str, request: RolloutRequest, now: float) -> None:
        """Queue all trajectories of a request, or none.

        Raises:
            InvalidRequest: A prompt does not fit the model, or a seed cannot be derived.
            QueueFull: More trajectories would be under way than allowed.
            EngineDead: No shard is alive.
        """
        if not self.live_shards:
            raise EngineDead(f"no live engine: {self._death_reason}")
        for prompt in request.prompts:
            self._limits.check(prompt, request.sampling)
        num_new = len(request.prompts) * request.n_samples_per_prompt
        most = self._config.max_queued_trajectories
        if len(self._flights) + num_new > most:
            raise QueueFull(
                f"submission: got {num_new} trajectories with {len(self._flights)} under way, "
                f"expected at most max_queued_trajectories = {most} in all"
            )
        submission = Submission(handle_id=handle_id, request=request, num_groups_pending=len(request.prompts))
        groups = [make_group(request, place) for place in range(len(request.prompts))]
        self._submissions[handle_id] = submission
        for group in groups:
            submission.num_pending[group.group_id] = len(group.trajectories)
            for trajectory in group.trajectories:
                flight = Flight(
                    flight_id=f"{handle_id}:{trajectory.trajectory_id}",
                    submission=submission,
                    group=group,
                    trajectory=trajectory,
                    order=self._num_submitted,
                    submitted_at=now,
                )
                self._num_submitted += 1
                submission.flights[flight.flight_id] = self._flights[flight.flight_id] = flight
                self._enqueue(flight)

    def abort(self, handle_id: str, now: float) -> dict[int, list[str]]:
        """End a submission: what is queued is aborted now, what runs when its chunk comes back.

        Trajectories being scored are finished already and keep their outcome.

        Returns:
            For each shard the running flights that its engine should be told to abort.
        """
        submission = self._submissions.get(handle_id)
        if submission is None:
            return {}
        submission.is_aborted = True
        running: dict[int, list[str]] = {}
        for flight in list(submission.flights.values()):
            if flight.phase is Phase.QUEUED:
                self._end_aborted(flight, now)
            elif flight.phase is Phase.RUNNING and flight.shard is not None:
                running.setdefault(flight.shard, []).append(flight.flight_id)
        return running

    def progress(self, handle_id: str) -> Progress:
        """How far a submission is. Raises UnknownHandle for one that was forgotten."""
        submission = self._submissions.get(handle_id)
        if submission is None:
            raise UnknownHandle(handle_id)
        request = submission.request
        num_pending = len(submission.flights)
        return Progress(
            num_pending=num_pending,
            num_finished=len(request.prompts) * request.n_samples_per_prompt - num_pending,
            num_groups=len(request.prompts),
            num_groups_finished=len(request.prompts) - submission.num_groups_pending,
            num_tokens=submission.num_tokens,
        )

    def forget(self, handle_id: str) -> None:
        """Drop the record of a submission whose groups are all finished."""
        submission = self._submissions.pop(handle_id, None)
        assert submission is None or not submission.flights, f"{handle_id} was forgotten while pending"

    def next_dispatches(self, now: float) -> list[Dispatch]:
        """Chunks to start now: lowest priority value first, then in the order of submission."""
        dispatches: list[Dispatch] = []
        while self._heap:
            flight = self._flights.get(self._heap[0][2])
            if flight is None or flight.phase is not Phase.QUEUED:
                heapq.heappop(self._heap)
                continue
            shard = choose_shard(self._shards, flight.home, self._config.max_running_per_shard)
            if shard is None:
                break
            heapq.heappop(self._heap)
            dispatches.append(Dispatch(shard=shard, chunk=self._start(flight, shard, now)))
        return dispatches

    def take_score_jobs(self) -> list[ScoreJob]:
        """Trajectories to score, each handed out once; answer with `on_reward` or `on_reward_failed`."""
        jobs, self._score_jobs = self._score_jobs, []
        return jobs

    def take_finished(self) -> list[FinishedGroup]:
        """Groups that have finished since the last call, each handed out once."""
        finished, self._finished = self._finished, []
        return finished

    def on_chunk(self, result: ChunkResult, now: float) -> None:
        """A chunk came back. One that this scheduler no longer waits for is counted and ignored."""
        flight = self._flights.get(result.trajectory_id)
        if flight is None or flight.phase is not Phase.RUNNING or flight.shard != result.shard:
            self.counts.num_stale_results += 1
            return
        self.counts.num_tokens_generated += len(result.token_ids)
        self._release(flight)
        fault = fault_of(flight, result)
        if fault is not None:
            self.counts.num_tokens_discarded += len(result.token_ids)
            self._fail(flight, FailureKind.ENGINE_ERROR, fault, now)
        elif result.finish_reason is FinishReason.ABORT:
            self._on_aborted_chunk(flight, result, now)
        elif result.finish_reason is FinishReason.ERROR:
            self.counts.num_tokens_discarded += len(result.token_ids)
            self._retry_or_fail(flight, FailureKind.ENGINE_ERROR, f"shard {result.shard} reported an error", now)
        else:
            self._on_ended_chunk(flight, result, now)

    def on_chunk_failed(self, flight_id: str, shard: int, kind: FailureKind, reason: str, now: float) -> None:
        """Running this chunk failed for a reason that another engine would not cure; see `on_chunk`."""
        flight = self._flights.get(flight_id)
        if flight is None or flight.phase is not Phase.RUNNING or flight.shard != shard:
            self.counts.num_stale_results += 1
            return
        self._release(flight)
        self._fail(flight, kind, reason, now)

    def on_internal_error(self, flight_id: str, reason: str, now: float) -> None:
        """Handling this trajectory raised, wherever it was: it fails, so that nothing waits for it."""
        flight = self._flights.get(flight_id)
        if flight is None:
            return
        if flight.phase is Phase.RUNNING:
            self._release(flight)
        self._fail(flight, FailureKind.INTERNAL, reason, now)

    def on_shard_death(self, shard: int, reason: str, now: float) -> None:
        """Take a shard out; its chunks run elsewhere with all tokens of earlier chunks, or fail.

        With no shard left, every trajectory that still needs an engine fails.
        """
        load = self._shards[shard]
        if not load.is_live:
            return
        load.is_live, self._death_reason = False, reason
        for flight_id in sorted(load.running, key=lambda f: self._flights[f].order):
            flight = self._flights[flight_id]
            self._release(flight)
            flight.home = None
            self._retry_or_fail(flight, FailureKind.ENGINE_DEAD, reason, now)
        if not self.live_shards:
            self._fail_all_queued(f"no live engine: {reason}", now)

    def on_shard_restart(self, shard: int) -> None:
        """A shard that was taken out serves again, with nothing running on it."""
        self._shards[shard] = ShardLoad()

    def restart_queued(self, now: float) -> None:
        """Drop the tokens of queued trajectories: new weights, and partial rollouts are not wanted."""
        for flight in self._flights.values():
            if flight.phase is Phase.QUEUED and flight.trajectory.token_ids:
                self._drop_tokens(flight)

    def on_reward(self, flight_id: str, reward: float, extras: dict[str, float], now: float) -> None:
        """A trajectory was scored."""
        flight = self._flights.get(flight_id)
        if flight is None or flight.phase is not Phase.SCORING:
            self.counts.num_stale_results += 1
            return
        flight.trajectory.reward = reward
        flight.trajectory.metadata["score"] = dict(extras)
        self._finish(flight, now)

    def on_reward_failed(self, flight_id: str, kind: FailureKind, reason: str, now: float) -> None:
        """A trajectory could not be scored: it is failed with the reason and has no reward."""
        flight = self._flights.get(flight_id)
        if flight is None or flight.phase is not Phase.SCORING:
            self.counts.num_stale_results += 1
            return
        self._fail(flight, kind, reason, now)

    def _enqueue(self, flight: Flight) -> None:
        flight.phase = Phase.QUEUED
        self._num_queued += 1
        heapq.heappush(self._heap, (flight.submission.request.priority, flight.order, flight.flight_id))

    def _start(self, flight: Flight, shard: int, now: float) -> Chunk:
        trajectory, sampling = flight.trajectory, flight.submission.request.sampling
        remaining = sampling.max_tokens - len(trajectory.token_ids)
        budget = min(remaining, self._config.chunk_tokens or remaining)
        context = trajectory.prompt_token_ids + tuple(trajectory.token_ids)
        flight.phase, flight.shard, flight.home = Phase.RUNNING, shard, shard
        flight.budget_tokens, flight.reserved_tokens = budget, len(context) + budget
        self._num_queued -= 1
        load = self._shards[shard]
        load.running.add(flight.flight_id)
        load.reserved_tokens += flight.reserved_tokens
        trajectory.metadata.setdefault("queue_s", now - flight.submitted_at)
        return Chunk(
            trajectory_id=flight.flight_id,
            token_ids=context,
            num_prompt_tokens=len(trajectory.prompt_token_ids),
            max_tokens=budget,
            seed=trajectory.seed,
            sampling=sampling,
        )

    def _release(self, flight: Flight) -> None:
        assert flight.shard is not None
        load = self._shards[flight.shard]
        load.running.remove(flight.flight_id)
        load.reserved_tokens -= flight.reserved_tokens
        flight.shard, flight.reserved_tokens = None, 0

    def _append(self, flight: Flight, result: ChunkResult) -> None:
        flight.trajectory.append(result)
        flight.submission.num_tokens += len(result.token_ids)
        flight.num_retries = 0
        record = flight.trajectory.metadata
        record.setdefault("ttft_s", result.ttft_s)
        record["shards"] = [*record.get("shards", []), result.shard]
        record["generate_s"] = record.get("generate_s", 0.0) + result.duration_s
        record["num_cached_tokens"] = record.get("num_cached_tokens", 0) + result.num_cached_tokens

    def _on_ended_chunk(self, flight: Flight, result: ChunkResult, now: float) -> None:
        self._append(flight, result)
        trajectory, request = flight.trajectory, flight.submission.request
        is_full = len(trajectory.token_ids) >= request.sampling.max_tokens
        if result.finish_reason is FinishReason.LENGTH and not is_full:
            if flight.submission.is_aborted:
                self._end_aborted(flight, now)
            else:
                self._enqueue(flight)
            return
        self._conclude(flight, result.finish_reason, now)

    def _conclude(self, flight: Flight, reason: FinishReason, now: float) -> None:
        """Generation has ended by itself: score the trajectory, if it is to be scored."""
        trajectory, request = flight.trajectory, flight.submission.request
        trajectory.finish_reason = reason
        trajectory.move_to(Status.COMPLETED if reason is FinishReason.STOP else Status.TRUNCATED)
        if request.reward == UNSCORED:
            self._finish(flight, now)
            return
        flight.phase = Phase.SCORING
        self._score_jobs.append(
            ScoreJob(flight_id=flight.flight_id, group=flight.group, trajectory=trajectory, reward=request.reward)
        )

    def _on_aborted_chunk(self, flight: Flight, result: ChunkResult, now: float) -> None:
        if flight.submission.is_aborted:
            self._append(flight, result)
            self._end_aborted(flight, now)
            return
        if self._partial_rollout:
            self._append(flight, result)
        else:
            self.counts.num_tokens_discarded += len(result.token_ids)
            self._drop_tokens(flight)
        is_full = len(flight.trajectory.token_ids) >= flight.submission.request.sampling.max_tokens
        if is_full:  # the abort crossed the last token on its way
            self._conclude(flight, FinishReason.LENGTH, now)
        elif self.live_shards:
            self._enqueue(flight)
        else:
            self._fail(flight, FailureKind.ENGINE_DEAD, f"no live engine: {self._death_reason}", now)

    def _retry_or_fail(self, flight: Flight, kind: FailureKind, reason: str, now: float) -> None:
        """A chunk was lost with its engine; the tokens of earlier chunks are kept."""
        if flight.submission.is_aborted:
            self._end_aborted(flight, now)
        elif flight.num_retries >= self._config.max_retries:
            self._fail(flight, kind, f"lost {flight.num_retries + 1} times in a row; last: {reason}", now)
        else:
            flight.num_retries += 1
            self.counts.num_retries += 1
            self._enqueue(flight)

    def _drop_tokens(self, flight: Flight) -> None:
        trajectory = flight.trajectory
        self.counts.num_tokens_discarded += len(trajectory.token_ids)
        flight.submission.num_tokens -= len(trajectory.token_ids)
        for tokens in (trajectory.token_ids, trajectory.logprobs, trajectory.loss_mask, trajectory.weight_versions):
            tokens.clear()
        trajectory.routed_experts = ()

    def _end_aborted(self, flight: Flight, now: float) -> None:
        flight.trajectory.finish_reason = FinishReason.ABORT
        flight.trajectory.move_to(Status.ABORTED)
        self.counts.num_aborted += 1
        self._finish(flight, now)

    def _fail(self, flight: Flight, kind: FailureKind, reason: str, now: float) -> None:
        flight.trajectory.fail(reason)
        flight.trajectory.metadata["failure_kind"] = kind.value
        if flight.trajectory.finish_reason is None:
            flight.trajectory.finish_reason = FinishReason.ERROR
        self.counts.num_failed[kind.value] = self.counts.num_failed.get(kind.value, 0) + 1
        self._finish(flight, now)

    def _fail_all_queued(self, reason: str, now: float) -> None:
        for flight in [f for f in self._flights.values() if f.phase is Phase.QUEUED]:
            self._fail(flight, FailureKind.ENGINE_DEAD, reason, now)

    def _finish(self, flight: Flight, now: float) -> None:
        if flight.phase is Phase.QUEUED:
            self._num_queued -= 1
        flight.phase = Phase.FINAL
        flight.trajectory.metadata["total_s"] = now - flight.submitted_at
        if flight.trajectory.status in (Status.COMPLETED, Status.TRUNCATED):
            self.counts.num_finished += 1
        submission, group = flight.submission, flight.group
        del self._flights[flight.flight_id], submission.flights[flight.flight_id]
        submission.num_pending[group.group_id] -= 1
        if submission.num_pending[group.group_id] == 0:
            submission.num_groups_pending -= 1
            self._finished.append(FinishedGroup(handle_id=submission.handle_id, group=group))
