"""Groups that a trainer waits for, read from the scheduler's book for a dashboard. Changes nothing."""

from __future__ import annotations

from rollout.feed import MAX_GROUPS, MAX_ID, Groups, WaitingGroup, shortened
from rollout.scheduler.flight_book import FlightBook
from rollout.scheduler.records import Flight, Phase, Submission


def waiting_groups(book: FlightBook, now: float) -> Groups:
    """What is told of groups that are not finished. Looks at members of the groups shown only."""
    waiting: list[tuple[int, int, Submission, str]] = []  # members pending, place, whose, which
    num_whole = num_last = 0
    for submission in book.submissions.values():
        num_members = submission.request.n_samples_per_prompt
        for group_id, num_pending in submission.num_pending.items():
            if num_pending:
                num_whole += num_pending == num_members
                num_last += num_pending == 1 < num_members
                waiting.append((num_pending, len(waiting), submission, group_id))
    waiting_since = [next(iter(s.flights.values())).submitted_at for s in book.submissions.values() if s.flights]
    return Groups(
        num_waiting=len(waiting),
        num_whole=num_whole,
        num_last=num_last,
        oldest_s=now - min(waiting_since, default=now),
        shown=tuple(
            _group(book, submission, group_id, now)
            for _, _, submission, group_id in sorted(waiting, key=lambda entry: entry[:2])[:MAX_GROUPS]
        ),
    )


def _group(book: FlightBook, submission: Submission, group_id: str, now: float) -> WaitingGroup:
    request = submission.request
    ids = (f"{submission.handle_id}:{group_id}/{index}" for index in range(request.n_samples_per_prompt))
    pending: list[Flight] = [flight for flight_id in ids if (flight := book.flights.get(flight_id)) is not None]
    return WaitingGroup(
        group_id=shortened(group_id, MAX_ID),
        num_members=request.n_samples_per_prompt,
        num_done=request.n_samples_per_prompt - len(pending),
        num_running=sum(flight.phase is Phase.RUNNING for flight in pending),
        num_queued=sum(flight.phase is Phase.QUEUED for flight in pending),
        most_tokens=max((len(flight.trajectory.token_ids) for flight in pending), default=0),
        max_tokens=request.sampling.max_tokens,
        waited_s=now - min((flight.submitted_at for flight in pending), default=now),
    )
