"""The records of all trajectories under way, and how each of them ends.

Owns submissions, flights, what is to be scored, and what has finished. When something happens to a trajectory is the
scheduler's to say; who runs next the dispatcher's.
"""

from __future__ import annotations

from collections.abc import Sequence

from rollout.errors import UnknownHandle
from rollout.handles import Progress
from rollout.scheduler.dispatcher import Dispatcher
from rollout.scheduler.intake import Restored
from rollout.scheduler.jobs import Job
from rollout.scheduler.records import Counts, FailureKind, FinishedGroup, Flight, Phase, Restart, ScoreJob, Submission
from rollout.types import ChunkResult, FinishReason, Group, RolloutRequest, Status

UNSCORED = "none"


class FlightBook:
    """See the module.

    Args:
        dispatcher: Knows the jobs of all flights that need an engine.

    Attributes:
        flights: Under way, by flight id.
        submissions: Until they are forgotten, by handle.
        counts: Totals since the start.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self.flights: dict[str, Flight] = {}
        self.submissions: dict[str, Submission] = {}
        self.counts = Counts()
        self._num_opened = 0
        self._score_jobs: list[ScoreJob] = []
        self._finished: list[FinishedGroup] = []
        self._restarts: list[Restart] = []

    def handles_of(self, request: RolloutRequest) -> list[str]:
        """Submissions of the request's run that have one of its groups, in order."""
        if request.run_id is None:
            return []
        wanted = set(request.group_ids)
        same = (s for s in self.submissions.values() if s.request.run_id == request.run_id)
        return [s.handle_id for s in same if not wanted.isdisjoint(s.request.group_ids)]

    def handles_of_run(self, run_id: str) -> list[str]:
        """Submissions of a run, in order."""
        return [s.handle_id for s in self.submissions.values() if s.request.run_id == run_id]

    def is_pending(self, handle_id: str) -> bool:
        """Whether a submission has trajectories that are not final."""
        submission = self.submissions.get(handle_id)
        return submission is not None and bool(submission.flights)

    def progress(self, handle_id: str) -> Progress:
        """How far a submission is. Raises UnknownHandle for one that was forgotten."""
        submission = self.submissions.get(handle_id)
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
        submission = self.submissions.pop(handle_id, None)
        assert submission is None or not submission.flights, f"{handle_id} was forgotten while pending"

    def open(self, submission: Submission, group: Group, known: Sequence[Restored] | None, now: float) -> None:
        """Begin with a group: queue its members, or score or finish what was durable of them."""
        epochs = submission.epochs[group.group_id] = [one.epoch for one in known or ()] or [0] * len(group.trajectories)
        pending = [t for t in group.trajectories if t.status is Status.PENDING]
        submission.num_pending[group.group_id] = len(pending)
        if not pending:
            submission.restored.add(group.group_id)
            self._finish_group(submission, group)
        for trajectory in pending:
            flight = Flight(
                flight_id=f"{submission.handle_id}:{trajectory.trajectory_id}",
                submission=submission,
                group=group,
                trajectory=trajectory,
                submitted_at=now,
                epoch=epochs[trajectory.sample_index],
            )
            submission.flights[flight.flight_id] = self.flights[flight.flight_id] = flight
            submission.num_tokens += len(trajectory.token_ids)
            self.counts.num_tokens_restored += len(trajectory.token_ids)
            ended = known[trajectory.sample_index].ended if known else None
            if ended is None:
                self._dispatcher.add(self._job(flight), now)
            else:
                self.conclude(flight, ended, now)

    def append(self, flight: Flight, result: ChunkResult) -> None:
        """A chunk belongs to the trajectory now."""
        flight.trajectory.append(result)
        flight.submission.num_tokens += len(result.token_ids)
        flight.num_retries = 0
        record = flight.trajectory.metadata
        record.setdefault("ttft_s", result.ttft_s)
        record["shards"] = [*record.get("shards", []), result.shard]
        record["generate_s"] = record.get("generate_s", 0.0) + result.duration_s
        record["num_cached_tokens"] = record.get("num_cached_tokens", 0) + result.num_cached_tokens
        if result.drafts is not None:
            for name in ("trees", "nodes", "accepted"):
                key = f"num_draft_{name}"
                record[key] = record.get(key, 0) + getattr(result.drafts, name)

    def drop_tokens(self, flight: Flight) -> None:
        """A trajectory starts anew, in its next epoch."""
        trajectory = flight.trajectory
        self.counts.num_tokens_discarded += len(trajectory.token_ids)
        flight.submission.num_tokens -= len(trajectory.token_ids)
        for tokens in (trajectory.token_ids, trajectory.logprobs, trajectory.loss_mask, trajectory.weight_versions):
            tokens.clear()
        trajectory.routed_experts = ()
        flight.epoch += 1
        flight.submission.epochs[trajectory.group_id][trajectory.sample_index] = flight.epoch
        self._dispatcher.set_tokens(flight.flight_id, 0)
        self._restarts.append(
            Restart(
                run_id=flight.submission.run_id,
                group_id=trajectory.group_id,
                sample_index=trajectory.sample_index,
                epoch=flight.epoch,
            )
        )

    def conclude(self, flight: Flight, reason: FinishReason, now: float) -> None:
        """Generation has ended by itself: score the trajectory, if it is to be scored."""
        trajectory, request = flight.trajectory, flight.submission.request
        trajectory.finish_reason = reason
        trajectory.move_to(Status.COMPLETED if reason is FinishReason.STOP else Status.TRUNCATED)
        if request.reward == UNSCORED:
            self.finish(flight, now)
            return
        flight.phase = Phase.SCORING
        self._score_jobs.append(
            ScoreJob(flight_id=flight.flight_id, group=flight.group, trajectory=trajectory, reward=request.reward)
        )

    def end_aborted(self, flight: Flight, now: float) -> None:
        """Its client gave it up."""
        flight.trajectory.finish_reason = FinishReason.ABORT
        flight.trajectory.move_to(Status.ABORTED)
        self.counts.num_aborted += 1
        self.finish(flight, now)

    def fail(self, flight: Flight, kind: FailureKind, reason: str, now: float) -> None:
        """It fails, counted by kind."""
        flight.trajectory.fail(reason)
        flight.trajectory.metadata["failure_kind"] = kind.value
        if flight.trajectory.finish_reason is None:
            flight.trajectory.finish_reason = FinishReason.ERROR
        self.counts.num_failed[kind.value] = self.counts.num_failed.get(kind.value, 0) + 1
        self.finish(flight, now)

    def finish(self, flight: Flight, now: float) -> None:
        """It is final, and so may be its group."""
        self._dispatcher.remove(flight.flight_id)
        flight.phase = Phase.FINAL
        flight.trajectory.metadata["total_s"] = now - flight.submitted_at
        if flight.trajectory.status in (Status.COMPLETED, Status.TRUNCATED):
            self.counts.num_finished += 1
        submission, group = flight.submission, flight.group
        del self.flights[flight.flight_id], submission.flights[flight.flight_id]
        submission.num_pending[group.group_id] -= 1
        if submission.num_pending[group.group_id] == 0:
            self._finish_group(submission, group)

    def take_restarts(self) -> list[Restart]:
        """Trajectories whose tokens were dropped since the last call, in order."""
        restarts, self._restarts = self._restarts, []
        return restarts

    def take_score_jobs(self) -> list[ScoreJob]:
        """Trajectories to score, each handed out once; answer with `on_reward` or `on_reward_failed`."""
        jobs, self._score_jobs = self._score_jobs, []
        return jobs

    def take_finished(self) -> list[FinishedGroup]:
        """Groups that have finished since the last call, each handed out once."""
        finished, self._finished = self._finished, []
        return finished

    def _finish_group(self, submission: Submission, group: Group) -> None:
        submission.num_groups_pending -= 1
        self._finished.append(
            FinishedGroup(
                handle_id=submission.handle_id,
                run_id=submission.run_id,
                group=group,
                epochs=tuple(submission.epochs.pop(group.group_id)),
                is_new=group.group_id not in submission.restored,
                is_whole=all(t.status is not Status.ABORTED for t in group.trajectories),
            )
        )

    def _job(self, flight: Flight) -> Job:
        request, trajectory = flight.submission.request, flight.trajectory
        self._num_opened += 1
        return Job(
            job_id=flight.flight_id,
            group_id=f"{flight.submission.handle_id}:{trajectory.group_id}",
            prompt_key=None if request.is_interactive else flight.group.prompt.prompt_id,
            order=self._num_opened,
            priority=request.priority,
            num_prompt_tokens=len(trajectory.prompt_token_ids),
            max_tokens=request.sampling.max_tokens,
            num_tokens=len(trajectory.token_ids),
        )
