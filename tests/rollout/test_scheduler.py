"""Invariants of the scheduler under arbitrary orders of events, and its single rules."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.config import OnStale, SchedulerConfig
from rollout.errors import EngineDead, InvalidRequest, QueueFull, UnknownHandle
from rollout.routing import RoutingRef, covers
from rollout.scheduler.intake import Restored
from rollout.scheduler.jobs import ShardCapacity
from rollout.scheduler.ledger import Ledger
from rollout.scheduler.records import Dispatch, FailureKind
from rollout.scheduler.scheduler import Scheduler
from rollout.types import (
    ChunkResult,
    FinishReason,
    Group,
    ModelLimits,
    Prompt,
    RolloutRequest,
    SamplingParams,
    Status,
    Trajectory,
    VersionSpan,
)

LIMITS = ModelLimits(vocab_size=100, max_model_len=64)


def make_request(num_prompts=2, n=2, max_tokens=8, reward="none", priority=0, prompt=(1, 2, 3), run_id=None):
    return RolloutRequest(
        prompts=tuple(Prompt(token_ids=prompt, prompt_id=f"p{i}") for i in range(num_prompts)),
        n_samples_per_prompt=n,
        sampling=SamplingParams(max_tokens=max_tokens),
        run_seed=1,
        group_ids=tuple(f"g{i}" for i in range(num_prompts)),
        reward=reward,
        priority=priority,
        run_id=run_id,
    )


def make_scheduler(num_shards=2, partial_rollout=True, engine_wait_s=0.0, version=0, **options):
    config = SchedulerConfig(**options)
    capacity = ShardCapacity(max_running=config.max_running_per_shard, kv_tokens=4096)
    shards = dict.fromkeys(range(num_shards), capacity)
    return Scheduler(
        config, LIMITS, shards, partial_rollout=partial_rollout, engine_wait_s=engine_wait_s, version=version
    )


def answer(dispatch: Dispatch, num_tokens=None, reason=FinishReason.LENGTH, version=0):
    """What an engine would return: token ids are absolute positions, so gaps and repeats show."""
    chunk = dispatch.chunk
    num = chunk.max_tokens if num_tokens is None else num_tokens
    start = len(chunk.token_ids)
    first = 0 if start == chunk.num_prompt_tokens else start - 1
    return ChunkResult(
        trajectory_id=chunk.trajectory_id,
        token_ids=tuple(range(start, start + num)),
        logprobs=(-1.0,) * num,
        spans=(VersionSpan(version=version, start=0, stop=num),) if num else (),
        finish_reason=reason,
        shard=dispatch.shard,
        routing=RoutingRef(ref=None, num_bytes=0, first_token=first, num_tokens=start + num - 1 - first),
    )


def check_record(trajectory):
    num_prompt = len(trajectory.prompt_token_ids)
    assert trajectory.token_ids == list(range(num_prompt, num_prompt + len(trajectory.token_ids)))
    assert len(trajectory.logprobs) == len(trajectory.loss_mask) == len(trajectory.token_ids)
    covered = [i for span in trajectory.weight_versions for i in range(span.start, span.stop)]
    assert covered == list(range(len(trajectory.token_ids)))
    num_rows = num_prompt + len(trajectory.token_ids) - 1 if trajectory.token_ids else 0
    assert covers(trajectory.routed_experts, num_rows)
    if trajectory.status is Status.FAILED:
        assert trajectory.error and trajectory.reward is None


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    chunk_tokens=st.sampled_from([None, 1, 3, 5]),
    partial=st.booleans(),
    max_running=st.integers(1, 4),
    reward=st.sampled_from(["none", "reasoning_gym"]),
    num_shards=st.integers(1, 3),
)
def test_every_trajectory_ends_once_and_no_token_is_lost(seed, chunk_tokens, partial, max_running, reward, num_shards):
    rng = random.Random(seed)
    scheduler = make_scheduler(
        num_shards, partial, chunk_tokens=chunk_tokens, max_running_per_shard=max_running, max_retries=1
    )
    handles = [f"h{i}" for i in range(3)]
    for handle in handles:
        scheduler.submit(handle, make_request(reward=reward, priority=rng.randint(0, 1)), 0.0)
    running: dict[str, Dispatch] = {}
    groups: list[tuple[str, Group]] = []
    num_received = 0
    for step in range(5000):
        for dispatch in scheduler.next_dispatches(step):
            assert dispatch.chunk.trajectory_id not in running
            assert dispatch.shard in scheduler.live_shards
            running[dispatch.chunk.trajectory_id] = dispatch
        for shard in range(num_shards):
            assert scheduler.running_on(shard) == sorted(f for f, d in running.items() if d.shard == shard)
            assert len(scheduler.running_on(shard)) <= max_running
        for job in scheduler.book.take_score_jobs():
            if rng.random() < 0.8:
                scheduler.on_reward(job.flight_id, 1.0, {}, step)
            else:
                scheduler.on_reward_failed(job.flight_id, FailureKind.REWARD_RAISED, "it raised", step)
        groups += [(f.handle_id, f.group) for f in scheduler.book.take_finished()]
        if not running:
            break
        draw = rng.random()
        if draw < 0.02:
            shard = rng.choice(scheduler.live_shards)
            lost = [running.pop(f) for f in list(running) if running[f].shard == shard]
            scheduler.on_shard_death(shard, "killed", step)
            for dispatch in lost:  # an answer that was on its way is no longer waited for
                scheduler.on_chunk(answer(dispatch), step)
        elif draw < 0.04:
            to_abort = scheduler.abort(rng.choice(handles), step)
            assert {f for ids in to_abort.values() for f in ids} <= set(running)
        else:
            dispatch = running.pop(rng.choice(sorted(running)))
            reason = rng.choice(
                [FinishReason.LENGTH, FinishReason.LENGTH, FinishReason.STOP, FinishReason.ABORT, FinishReason.ERROR]
            )
            budget = dispatch.chunk.max_tokens
            num = budget if reason is FinishReason.LENGTH else rng.randint(0, budget)
            num_received += num
            scheduler.on_chunk(answer(dispatch, num, reason), step)
    assert Counter((h, g.group_id) for h, g in groups) == Counter((h, f"g{i}") for h in handles for i in range(2))
    trajectories = [t for _, group in groups for t in group.trajectories]
    for trajectory in trajectories:
        assert trajectory.status is not Status.PENDING
        check_record(trajectory)
    counts = scheduler.counts
    by_status = Counter(t.status for t in trajectories)
    assert counts.num_finished == by_status[Status.COMPLETED] + by_status[Status.TRUNCATED]
    assert counts.num_aborted == by_status[Status.ABORTED]
    assert sum(counts.num_failed.values()) == by_status[Status.FAILED]
    assert counts.num_tokens_generated == num_received
    kept = sum(len(t.token_ids) for t in trajectories)
    assert kept + counts.num_tokens_discarded == num_received
    assert (scheduler.num_queued, scheduler.num_running) == (0, 0)
    for handle in handles:
        assert scheduler.book.progress(handle).num_pending == 0
        scheduler.book.forget(handle)


def test_chunks_continue_on_the_same_shard_until_the_budget():
    scheduler = make_scheduler(chunk_tokens=3)
    scheduler.submit("h", make_request(num_prompts=1, n=1, max_tokens=8), 0.0)
    budgets, shards = [], set()
    while dispatches := scheduler.next_dispatches(0.0):
        [dispatch] = dispatches
        budgets.append(dispatch.chunk.max_tokens)
        shards.add(dispatch.shard)
        scheduler.on_chunk(answer(dispatch), 0.0)
    [finished] = scheduler.book.take_finished()
    [trajectory] = finished.group.trajectories
    assert (budgets, len(shards), trajectory.status) == ([3, 3, 2], 1, Status.TRUNCATED)
    check_record(trajectory)


def test_load_is_spread_evenly_and_priority_comes_first():
    scheduler = make_scheduler(max_running_per_shard=2)
    scheduler.submit("late", make_request(num_prompts=4, n=1), 0.0)
    scheduler.submit("urgent", make_request(num_prompts=2, n=1, priority=-1), 1.0)
    dispatches = scheduler.next_dispatches(1.0)
    assert [d.chunk.trajectory_id.split(":")[0] for d in dispatches] == ["urgent", "urgent", "late", "late"]
    assert Counter(d.shard for d in dispatches) == {0: 2, 1: 2}


def test_engine_abort_keeps_or_drops_tokens_as_configured():
    for partial, expected in ((True, 4), (False, 0)):
        scheduler = make_scheduler(partial_rollout=partial, chunk_tokens=2)
        scheduler.submit("h", make_request(num_prompts=1, n=1), 0.0)
        scheduler.on_chunk(answer(scheduler.next_dispatches(0.0)[0]), 0.0)
        scheduler.on_chunk(answer(scheduler.next_dispatches(0.0)[0], 2, FinishReason.ABORT), 0.0)
        [dispatch] = scheduler.next_dispatches(0.0)
        assert len(dispatch.chunk.token_ids) - dispatch.chunk.num_prompt_tokens == expected
        assert scheduler.counts.num_tokens_discarded == 4 - expected


def test_restart_queued_drops_the_tokens_of_a_waiting_continuation():
    scheduler = make_scheduler(partial_rollout=False, chunk_tokens=2)
    scheduler.submit("h", make_request(num_prompts=1, n=1), 0.0)
    scheduler.on_chunk(answer(scheduler.next_dispatches(0.0)[0]), 0.0)
    scheduler.restart_queued(0.0)
    [dispatch] = scheduler.next_dispatches(0.0)
    assert len(dispatch.chunk.token_ids) == dispatch.chunk.num_prompt_tokens
    assert scheduler.book.progress("h").num_tokens == 0


def test_client_abort_keeps_tokens_of_running_chunks_and_finished_groups():
    scheduler = make_scheduler(max_running_per_shard=1)
    scheduler.submit("h", make_request(num_prompts=4, n=1), 0.0)
    first, second = scheduler.next_dispatches(0.0)
    scheduler.on_chunk(answer(first, 2, FinishReason.STOP), 0.0)
    assert scheduler.abort("h", 0.0) == {second.shard: [second.chunk.trajectory_id]}
    assert scheduler.abort("h", 0.0) == {second.shard: [second.chunk.trajectory_id]}
    scheduler.on_chunk(answer(second, 3, FinishReason.ABORT), 0.0)
    by_id = {f.group.group_id: f.group.trajectories[0] for f in scheduler.book.take_finished()}
    assert [by_id[f"g{i}"].status.value for i in range(4)] == ["completed", "aborted", "aborted", "aborted"]
    assert [len(by_id[f"g{i}"].token_ids) for i in range(4)] == [2, 3, 0, 0]


def test_engine_death_retries_elsewhere_then_fails_with_the_reason():
    scheduler = make_scheduler(num_shards=3, max_retries=1, chunk_tokens=2)
    scheduler.submit("h", make_request(num_prompts=1, n=1), 0.0)
    [dispatch] = scheduler.next_dispatches(0.0)
    scheduler.on_chunk(answer(dispatch), 0.0)
    [dispatch] = scheduler.next_dispatches(0.0)
    scheduler.on_shard_death(dispatch.shard, "killed", 0.0)
    [again] = scheduler.next_dispatches(0.0)
    assert again.shard != dispatch.shard and again.chunk.token_ids == dispatch.chunk.token_ids
    flight_id = dispatch.chunk.trajectory_id  # a late word of the dead shard is not about the chunk that runs now
    scheduler.on_chunk_failed(flight_id, dispatch.shard, FailureKind.ENGINE_ERROR, "too late", 0.0)
    assert scheduler.counts.num_stale_results == 1 and scheduler.running_on(again.shard) == [flight_id]
    scheduler.on_shard_death(again.shard, "killed too", 0.0)
    [finished] = scheduler.book.take_finished()
    [trajectory] = finished.group.trajectories
    assert trajectory.status is Status.FAILED and "killed too" in trajectory.error and trajectory.reward is None
    assert len(trajectory.token_ids) == 2 and scheduler.counts.num_failed == {"engine_dead": 1}


def test_without_engines_everything_fails_and_submissions_are_refused():
    scheduler = make_scheduler(num_shards=1)
    scheduler.submit("h", make_request(), 0.0)
    scheduler.next_dispatches(0.0)
    scheduler.on_shard_death(0, "out of memory", 0.0)
    assert len(scheduler.book.take_finished()) == 2
    with pytest.raises(EngineDead, match="out of memory"):
        scheduler.submit("h2", make_request(), 0.0)
    scheduler.on_shard_up(0, ShardCapacity(max_running=4, kv_tokens=4096))
    scheduler.submit("h2", make_request(), 0.0)
    assert len(scheduler.next_dispatches(0.0)) == 4


@pytest.mark.parametrize(
    "change",
    [
        dict(logprobs=()),
        dict(spans=()),
        dict(token_ids=(), logprobs=(), spans=()),
        dict(spans=(VersionSpan(version=0, start=1, stop=8),)),
        dict(token_ids=(1,) * 9, logprobs=(0.0,) * 9, spans=(VersionSpan(version=0, start=0, stop=9),)),
    ],
)
def test_an_inconsistent_result_fails_its_trajectory_only(change):
    scheduler = make_scheduler()
    scheduler.submit("h", make_request(num_prompts=2, n=1), 0.0)
    bad, good = scheduler.next_dispatches(0.0)
    result = answer(bad)
    fields = {name: getattr(result, name) for name in result.__dataclass_fields__} | change
    scheduler.on_chunk(ChunkResult(**fields), 0.0)
    scheduler.on_chunk(answer(good), 0.0)
    statuses = [f.group.trajectories[0].status for f in scheduler.book.take_finished()]
    assert statuses == [Status.FAILED, Status.TRUNCATED]
    assert scheduler.counts.num_failed == {"engine_error": 1}


def test_submission_is_all_or_nothing():
    scheduler = make_scheduler(max_queued_trajectories=5)
    good = make_request().prompts[0]
    for bad in ((), (1, 100), (-1,), tuple(range(60))):
        request = RolloutRequest(
            prompts=(good, Prompt(token_ids=bad, prompt_id="bad")),
            n_samples_per_prompt=1,
            sampling=SamplingParams(max_tokens=8),
            run_seed=0,
            group_ids=("a", "b"),
        )
        with pytest.raises(InvalidRequest, match="prompt bad"):
            scheduler.submit("h", request, 0.0)
    with pytest.raises(QueueFull, match="max_queued_trajectories = 5"):
        scheduler.submit("h", make_request(num_prompts=3, n=2), 0.0)
    assert scheduler.next_dispatches(0.0) == []


def test_a_death_while_a_chunk_lands_neither_loses_nor_repeats_it():
    scheduler = make_scheduler(chunk_tokens=3)
    scheduler.submit("h", make_request(num_prompts=1, n=1, max_tokens=8, run_id="run"), 0.0)
    [first] = scheduler.next_dispatches(0.0)
    landing = scheduler.land(answer(first), 0.0)
    where = (landing.run_id, landing.group_id, landing.sample_index, landing.epoch, landing.start)
    assert where == ("run", "g0", 0, 0, 0) and len(landing.result.token_ids) == 3
    assert scheduler.next_dispatches(0.0) == [], "its successor waits until it is durable"
    scheduler.on_shard_death(first.shard, "killed", 0.0)
    assert scheduler.next_dispatches(0.0) == [] and scheduler.counts.num_retries == 0
    scheduler.landed(landing.flight_id, 0.0)
    [second] = scheduler.next_dispatches(0.0)
    assert second.shard != first.shard and len(second.chunk.token_ids) == 3 + 3
    scheduler.landed(landing.flight_id, 0.0)  # doubled
    assert scheduler.land(answer(first), 0.0) is None and scheduler.counts.num_stale_results == 2
    landing = scheduler.land(answer(second), 0.0)
    assert landing.start == 3
    scheduler.landed(landing.flight_id, 0.0)
    scheduler.on_chunk(answer(*scheduler.next_dispatches(0.0)), 0.0)
    [finished] = scheduler.book.take_finished()
    check_record(finished.group.trajectories[0])
    assert len(finished.group.trajectories[0].token_ids) == 8 and scheduler.counts.num_tokens_discarded == 0


@pytest.mark.parametrize(
    ("num_tokens", "reason", "is_kept"),
    [(3, FinishReason.LENGTH, True), (2, FinishReason.STOP, False), (2, FinishReason.ABORT, False)],
)
def test_a_chunk_that_lands_keeps_its_slot_only_if_another_follows(num_tokens, reason, is_kept):
    scheduler = make_scheduler(num_shards=1, max_running_per_shard=1, chunk_tokens=3)
    scheduler.submit("h", make_request(num_prompts=2, n=1), 0.0)
    [first] = scheduler.next_dispatches(0.0)
    scheduler.land(answer(first, num_tokens, reason), 0.0)
    started = scheduler.next_dispatches(0.0)
    assert len(started) == (not is_kept)
    scheduler.landed(first.chunk.trajectory_id, 0.0)
    if is_kept:
        [second] = scheduler.next_dispatches(0.0)
        assert second.chunk.trajectory_id == first.chunk.trajectory_id


def test_a_client_abort_while_a_chunk_lands_keeps_it():
    scheduler = make_scheduler(chunk_tokens=3)
    scheduler.submit("h", make_request(num_prompts=1, n=1), 0.0)
    landing = scheduler.land(answer(*scheduler.next_dispatches(0.0)), 0.0)
    assert scheduler.abort("h", 0.0) == {} and scheduler.book.is_pending("h")
    scheduler.landed(landing.flight_id, 0.0)
    [finished] = scheduler.book.take_finished()
    [trajectory] = finished.group.trajectories
    assert (trajectory.status, len(trajectory.token_ids)) == (Status.ABORTED, 3) and not finished.is_whole


def durable(request, group_id, num_tokens, *, version=0, epoch=0, ended=None, status=Status.PENDING):
    """Every member of a group as a journal would give it back, with so many tokens each."""
    place = request.group_ids.index(group_id)
    prompt, members = request.prompts[place].token_ids, []
    for index, num in enumerate(num_tokens):
        trajectory = Trajectory(group_id=group_id, sample_index=index, seed=index + 1, prompt_token_ids=prompt)
        if num:
            trajectory.append(
                ChunkResult(
                    trajectory_id="any",
                    token_ids=tuple(range(len(prompt), len(prompt) + num)),
                    logprobs=(-1.0,) * num,
                    spans=(VersionSpan(version=version, start=0, stop=num),),
                    finish_reason=FinishReason.LENGTH,
                    shard=0,
                )
            )
        if status is not Status.PENDING:
            trajectory.move_to(status)
        members.append(Restored(trajectory=trajectory, epoch=epoch, ended=ended))
    return members


def test_a_restored_group_that_is_complete_finishes_at_once_and_is_not_new():
    scheduler = make_scheduler()
    request = make_request(run_id="run")
    members = durable(request, "g0", (8, 8), status=Status.TRUNCATED)
    scheduler.submit("h", request, 0.0, {"g0": members})
    [finished] = scheduler.book.take_finished()
    assert (finished.group.group_id, finished.run_id) == ("g0", "run")
    assert not finished.is_new and finished.is_whole
    assert finished.group.trajectories == [one.trajectory for one in members]
    dispatched = scheduler.next_dispatches(0.0)
    assert sorted(d.chunk.trajectory_id for d in dispatched) == ["h:g1/0", "h:g1/1"]
    for dispatch in dispatched:
        scheduler.on_chunk(answer(dispatch), 0.0)
    [finished] = scheduler.book.take_finished()
    assert finished.is_new and finished.epochs == (0, 0)
    assert scheduler.book.progress("h").num_groups_finished == 2


def test_a_restored_trajectory_whose_last_chunk_stopped_is_only_scored():
    scheduler = make_scheduler()
    request = make_request(num_prompts=1, n=2, reward="reasoning_gym", run_id="run")
    scheduler.submit("h", request, 0.0, {"g0": durable(request, "g0", (5, 5), ended=FinishReason.STOP, epoch=2)})
    assert scheduler.next_dispatches(0.0) == []
    jobs = scheduler.book.take_score_jobs()
    assert [job.trajectory.status for job in jobs] == [Status.COMPLETED] * 2
    for job in jobs:
        scheduler.on_reward(job.flight_id, 1.0, {}, 0.0)
    [finished] = scheduler.book.take_finished()
    assert finished.is_new and finished.epochs == (2, 2) and scheduler.counts.num_tokens_restored == 10


def test_restored_trajectories_go_on_from_their_tokens():
    scheduler = make_scheduler(chunk_tokens=3)
    request = make_request(num_prompts=1, n=2, run_id="run")
    scheduler.submit("h", request, 0.0, {"g0": durable(request, "g0", (5, 0), epoch=1)})
    assert scheduler.book.progress("h").num_tokens == 5
    got = {d.chunk.trajectory_id: d for d in scheduler.next_dispatches(0.0)}
    assert {name: len(d.chunk.token_ids) - 3 for name, d in got.items()} == {"h:g0/0": 5, "h:g0/1": 0}
    assert [got[f"h:g0/{i}"].chunk.seed for i in range(2)] == [1, 2]
    landing = scheduler.land(answer(got["h:g0/0"]), 0.0)
    assert (landing.start, landing.epoch) == (5, 1)
    scheduler.landed(landing.flight_id, 0.0)
    [trajectory] = [t for t in scheduler.book.submissions["h"].flights.values() if t.trajectory.sample_index == 1]
    assert trajectory.epoch == 1
    assert scheduler.book.progress("h").num_finished == 1


def test_who_has_groups_of_a_run_is_known_until_they_are_forgotten():
    scheduler = make_scheduler()
    scheduler.submit("h", make_request(run_id="run"), 0.0)
    scheduler.submit("other", make_request(run_id="another run"), 0.0)
    scheduler.submit("nameless", make_request(), 0.0)
    book = scheduler.book
    assert book.handles_of(make_request(num_prompts=1, run_id="run")) == ["h"]
    assert book.handles_of(make_request()) == [] and book.handles_of(make_request(run_id="third")) == []
    assert book.is_pending("h") and not book.is_pending("unknown")
    scheduler.abort("h", 0.0)
    assert not book.is_pending("h") and book.handles_of(make_request(run_id="run")) == ["h"]
    book.forget("h")
    assert book.handles_of(make_request(run_id="run")) == []
    runs = {f.handle_id: f.run_id for f in book.take_finished()}
    assert runs == {"h": "run"}
    scheduler.abort("nameless", 0.0)
    assert {f.run_id for f in book.take_finished()} == {"nameless"}


def stale_scheduler(on_stale):
    """One trajectory queued, one running and one landing, all begun under version 0, with at most one version more."""
    scheduler = make_scheduler(
        num_shards=1, chunk_tokens=2, max_running_per_shard=3, max_staleness=1, on_stale=on_stale
    )
    scheduler.submit("h", make_request(num_prompts=3, n=1, run_id="run"), 0.0)
    dispatches = scheduler.next_dispatches(0.0)
    for dispatch in dispatches:
        scheduler.on_chunk(answer(dispatch), 0.0)
    assert scheduler.on_version(1, 0.0) == {} and scheduler.num_too_old_for(1) == 0
    assert scheduler.num_too_old_for(2) == 3
    return scheduler


def test_too_old_trajectories_start_anew_and_only_those():
    scheduler = stale_scheduler(OnStale.REGENERATE)
    running, landing, young = scheduler.next_dispatches(0.0)
    landed = scheduler.land(answer(landing, version=1), 0.0)
    scheduler.on_chunk(answer(young, 2, FinishReason.STOP, version=1), 0.0)
    assert scheduler.on_version(2, 0.0) == {0: [running.chunk.trajectory_id]}
    scheduler.landed(landed.flight_id, 0.0)
    scheduler.on_chunk(answer(running, 1, FinishReason.ABORT, version=1), 0.0)
    assert scheduler.counts.num_regenerated == 2 and scheduler.counts.num_tokens_discarded == 4 + 3
    restarts = scheduler.book.take_restarts()
    assert [(one.run_id, one.group_id, one.epoch) for one in restarts] == [
        ("run", landed.group_id, 1),
        ("run", "g0", 1),
    ]
    again = scheduler.next_dispatches(0.0)
    assert [len(d.chunk.token_ids) for d in again] == [3, 3]
    [finished] = scheduler.book.take_finished()
    assert finished.group.trajectories[0].status is Status.COMPLETED


@pytest.mark.parametrize("is_known", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH])
def test_one_that_ended_while_its_abort_was_on_the_way_is_held_to_the_bound(reason, is_known):
    """New weights are in the engine before the controller knows of them, and its aborts arrive later still."""
    scheduler = stale_scheduler(OnStale.REGENERATE)
    dispatches = scheduler.next_dispatches(0.0)
    for dispatch in dispatches:
        scheduler.on_chunk(answer(dispatch, version=1), 0.0)
    last = scheduler.next_dispatches(0.0)
    if is_known:
        assert scheduler.on_version(2, 0.0) == {0: [d.chunk.trajectory_id for d in last]}
    for dispatch in last:
        scheduler.on_chunk(answer(dispatch, 2 if reason is FinishReason.LENGTH else 1, reason, version=2), 0.0)
    assert scheduler.counts.num_regenerated == 3 and scheduler.book.take_finished() == []
    assert [len(d.chunk.token_ids) for d in scheduler.next_dispatches(0.0)] == [3, 3, 3], "from the prompt"


def test_a_client_abort_does_not_keep_what_is_too_old():
    scheduler = stale_scheduler(OnStale.REGENERATE)
    dispatches = scheduler.next_dispatches(0.0)
    scheduler.abort("h", 0.0)
    for dispatch in dispatches:
        scheduler.on_chunk(answer(dispatch, 1, FinishReason.STOP, version=2), 0.0)
    ended = [finished.group.trajectories[0] for finished in scheduler.book.take_finished()]
    assert [(t.status, t.token_ids) for t in ended] == [(Status.ABORTED, [])] * 3
    assert len(scheduler.book.take_restarts()) == 3


def test_a_drained_shard_takes_chunks_again_when_it_may():
    scheduler = make_scheduler(num_shards=2, max_running_per_shard=2)
    scheduler.submit("h", make_request(num_prompts=2, n=4), 0.0)
    begun = scheduler.next_dispatches(0.0)
    scheduler.drain(1)
    ((shard, cut),) = scheduler.take_cuts(0.0).items()
    assert shard == 1 and sorted(cut) == sorted(d.chunk.trajectory_id for d in begun if d.shard == 1)
    for dispatch in begun:
        if dispatch.shard == 1:
            scheduler.on_chunk(answer(dispatch, 1, FinishReason.ABORT), 0.0)
    assert scheduler.next_dispatches(0.0) == [] and scheduler.running_on(1) == []
    scheduler.undrain(0)  # harmless
    scheduler.undrain(1)
    scheduler.undrain(1)
    again = scheduler.next_dispatches(0.0)
    assert [d.shard for d in again] == [1, 1] and scheduler.take_cuts(0.0) == {}
    assert {len(d.chunk.token_ids) for d in again} == {4}, "what it had goes on first"


def test_too_old_trajectories_fail_counted_if_so_configured():
    scheduler = stale_scheduler(OnStale.DROP)
    scheduler.on_version(2, 0.0)
    statuses = [f.group.trajectories[0].status for f in scheduler.book.take_finished()]
    assert statuses == [Status.FAILED] * 3 and scheduler.counts.num_failed == {"stale": 3}
    assert scheduler.next_dispatches(0.0) == []


def test_a_publication_that_waits_finds_none_too_old_in_the_end():
    scheduler = stale_scheduler(OnStale.WAIT)
    while scheduler.num_too_old_for(2):
        for dispatch in scheduler.next_dispatches(0.0):
            scheduler.on_chunk(answer(dispatch, version=1), 0.0)
    assert scheduler.on_version(2, 0.0) == {}
    assert scheduler.counts.num_regenerated == 0 and len(scheduler.book.take_finished()) == 3


@pytest.mark.parametrize("on_stale", list(OnStale))
def test_restored_tokens_are_held_to_the_bound_too(on_stale):
    scheduler = make_scheduler(max_staleness=1, on_stale=on_stale, version=5)
    request = make_request(num_prompts=2, n=1, run_id="run")
    known = {"g0": durable(request, "g0", (5,), version=3), "g1": durable(request, "g1", (5,), version=4)}
    scheduler.submit("h", request, 0.0, known)
    got = {d.chunk.trajectory_id: len(d.chunk.token_ids) - 3 for d in scheduler.next_dispatches(0.0)}
    assert got == ({"h:g1/0": 5} if on_stale is OnStale.DROP else {"h:g0/0": 0, "h:g1/0": 5})
    assert len(scheduler.book.take_finished()) == (on_stale is OnStale.DROP)


def test_trajectories_wait_for_an_engine_as_long_as_they_may():
    scheduler = make_scheduler(num_shards=1, engine_wait_s=10.0)
    scheduler.submit("h", make_request(num_prompts=1, n=2), 0.0)
    scheduler.next_dispatches(0.0)
    scheduler.on_shard_death(0, "killed", 100.0)
    scheduler.keep_house(109.0)
    assert scheduler.book.take_finished() == [] and scheduler.num_queued == 2
    scheduler.submit("later", make_request(num_prompts=1, n=1), 109.0)
    scheduler.on_shard_up(0, ShardCapacity(max_running=4, kv_tokens=4096))
    scheduler.keep_house(200.0)
    assert len(scheduler.next_dispatches(200.0)) == 3
    scheduler.on_shard_death(0, "killed again", 200.0)
    scheduler.keep_house(210.0)
    assert len(scheduler.book.take_finished()) == 2 and scheduler.counts.num_failed == {"engine_dead": 3}
    with pytest.raises(EngineDead, match="killed again"):
        scheduler.submit("too late", make_request(), 210.0)


def make_group(group_id):
    return Group(group_id=group_id, prompt=Prompt(token_ids=(1,), prompt_id="p"), trajectories=[])


def test_ledger_delivers_again_until_acknowledged():
    ledger = Ledger(client_timeout_s=10)
    ledger.open("h", "c", 2, 0.0)
    assert ledger.peek("h", 5).groups == () and not ledger.peek("h", 5).is_done
    ledger.add("h", make_group("a"))
    assert [g.group_id for g in ledger.peek("h", 5).groups] == ["a"]
    assert [g.group_id for g in ledger.peek("h", 5).groups] == ["a"]
    assert not ledger.acknowledge("h", ["a", "unknown"])
    ledger.add("h", make_group("b"))
    assert ledger.peek("h", 5).is_done
    assert ledger.acknowledge("h", ["a", "b"])
    with pytest.raises(UnknownHandle):
        ledger.peek("h", 5)


def test_ledger_expires_only_the_silent_client():
    ledger = Ledger(client_timeout_s=10)
    ledger.open("silent", "c1", 1, 0.0)
    ledger.open("alive", "c2", 1, 0.0)
    ledger.touch("alive", 9.0)
    assert ledger.expire(11.0).to_abort == ("silent",)
    assert ledger.expire(12.0).to_abort == ()
    ledger.add("silent", make_group("a"))
    ledger.touch("alive", 19.0)
    expired = ledger.expire(21.0)
    assert (expired.closed, expired.num_groups_dropped) == (("silent",), 1)
    assert not ledger.add("silent", make_group("b"))
    assert ledger.num_clients == 1
