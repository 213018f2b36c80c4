"""What the controller makes durable, and how it waits for a journal that cannot write."""

from __future__ import annotations

import asyncio

import pytest

import actors.journal_keeper
from actors.journal_keeper import JournalKeeper
from rollout.config import JournalConfig, SchedulerConfig
from rollout.journal.errors import JournalConflict, JournalFull, JournalLost
from rollout.scheduler.jobs import ShardCapacity
from rollout.scheduler.records import Landing, Restart
from rollout.scheduler.scheduler import Scheduler
from rollout.types import (
    ChunkResult,
    FinishReason,
    ModelLimits,
    Prompt,
    RolloutRequest,
    SamplingParams,
    Status,
    VersionSpan,
)

LIMITS = ModelLimits(vocab_size=100, max_model_len=64)


def a_request(group_ids=("a", "b"), reward="none", run_id="run"):
    return RolloutRequest(
        prompts=tuple(Prompt(token_ids=(1, 2), prompt_id=f"prompt {name}") for name in group_ids),
        n_samples_per_prompt=2,
        sampling=SamplingParams(max_tokens=6),
        run_seed=1,
        group_ids=tuple(group_ids),
        reward=reward,
        run_id=run_id,
    )


def a_result(num_tokens, reason=FinishReason.LENGTH, trajectory_id="t"):
    return ChunkResult(
        trajectory_id=trajectory_id,
        token_ids=tuple(range(10, 10 + num_tokens)),
        logprobs=(-0.5,) * num_tokens,
        spans=(VersionSpan(version=0, start=0, stop=num_tokens),),
        finish_reason=reason,
        shard=0,
    )


def a_landing(start=0, num_tokens=3, epoch=0, reason=FinishReason.LENGTH, run_id="run"):
    return Landing(
        flight_id="h:a/0",
        run_id=run_id,
        group_id="a",
        sample_index=0,
        epoch=epoch,
        start=start,
        result=a_result(num_tokens, reason),
    )


@pytest.fixture
def config(tmp_path):
    return JournalConfig(dsn=f"sqlite:///{tmp_path}/journal.db", synchronous="normal", group_commit_ms=0)


async def generate(keeper, request, num_chunks=None):
    """Run a request as the controller does, every chunk durable first, at most so many chunks of 3 tokens."""
    shards = {0: ShardCapacity(max_running=8, kv_tokens=4096)}
    scheduler = Scheduler(SchedulerConfig(chunk_tokens=3), LIMITS, shards)
    scheduler.submit("h", request, 0.0, await keeper.submit(request, "h"))
    num_done, groups = 0, []
    while dispatches := scheduler.next_dispatches(0.0):
        for dispatch in dispatches:
            if num_done == num_chunks:
                return groups, num_done
            num_done += 1
            result = a_result(dispatch.chunk.max_tokens, trajectory_id=dispatch.chunk.trajectory_id)
            landing = scheduler.land(result, 0.0)
            await keeper.append(landing)
            scheduler.landed(landing.flight_id, 0.0)
        for finished in scheduler.book.take_finished():
            await keeper.finish(finished)
            groups.append(finished)
    for finished in scheduler.book.take_finished():
        await keeper.finish(finished)
        groups.append(finished)
    return groups, num_done


@pytest.mark.parametrize("num_before", range(9))
def test_a_request_goes_on_from_what_is_durable_wherever_it_was_cut(config, num_before):
    async def first():
        keeper = JournalKeeper(config)
        await generate(keeper, a_request(), num_before)
        await keeper.close()

    async def second():
        keeper = JournalKeeper(config)
        got = await generate(keeper, a_request())
        await keeper.close()
        return got

    asyncio.run(first())
    groups, num_chunks = asyncio.run(second())
    assert num_chunks == 8 - num_before  # two chunks for each of four trajectories, none of them twice
    assert sorted(finished.group.group_id for finished in groups) in (["a", "b"], [])
    for finished in groups:
        assert [t.status for t in finished.group.trajectories] == [Status.TRUNCATED] * 2
        assert [len(t.token_ids) for t in finished.group.trajectories] == [6, 6]


def test_lengths_outlive_the_process_and_are_told_once(config):
    async def story():
        first = JournalKeeper(config)
        assert await first.earlier_lengths("run") == []
        await generate(first, a_request())
        assert await first.earlier_lengths("run") == [], "what this process served, its scheduler knows"
        await first.close()
        second = JournalKeeper(config)
        await second.submit(a_request(["c"]), "h")  # under way, so of no length yet
        told = [await second.earlier_lengths(run) for run in ("run", "run", "another", None)]
        await second.close()
        return told

    lengths = [("prompt a", 6)] * 2 + [("prompt b", 6)] * 2
    assert asyncio.run(story()) == [lengths, [], [], []]


def test_groups_that_a_checkpoint_has_learned_from_are_not_generated_again(config):
    async def story():
        keeper = JournalKeeper(config)
        await generate(keeper, a_request())
        assert await keeper.acknowledge("run", ["a"], "step 1") == 1
        assert await keeper.acknowledge("run", ["a"], "step 1") == 0
        with pytest.raises(JournalConflict, match=r"group a of run run: .* learned from \(step 1\); 1 of 2"):
            await keeper.submit(a_request(), "again")
        [(group_id, members)] = (await keeper.submit(a_request(["b"]), "rest")).items()
        assert group_id == "b" and [one.trajectory.status for one in members] == [Status.TRUNCATED] * 2
        await keeper.close()

    asyncio.run(story())


def test_a_last_chunk_that_stopped_leaves_only_scoring(config):
    async def story():
        keeper = JournalKeeper(config)
        await keeper.submit(a_request(), "h")
        await keeper.append(a_landing(num_tokens=2, reason=FinishReason.STOP))
        known = await keeper.submit(a_request(), "again")
        await keeper.close()
        return known

    known = asyncio.run(story())
    assert [one.ended for one in known["a"]] == [FinishReason.STOP, None]
    assert [len(one.trajectory.token_ids) for one in known["a"]] == [2, 0]


def test_requests_without_a_run_and_keepers_without_a_journal_keep_nothing(config):
    async def story(keeper, run_id):
        assert await keeper.submit(a_request(run_id=run_id), "h") == {}
        assert not keeper.keeps("h") and not keeper.keeps("run")
        await keeper.append(a_landing(run_id="h"))
        await keeper.restart(Restart(run_id="h", group_id="a", sample_index=0, epoch=1))
        await keeper.keep_house()
        await keeper.close()

    asyncio.run(story(JournalKeeper(config), None))
    asyncio.run(story(JournalKeeper(JournalConfig()), "run"))


class SlowJournal:
    """Stands for a journal on a full disk or a lost server: refuses the first calls, and then tells their order."""

    def __init__(self, faults):
        self.faults, self.done = list(faults), []

    async def submit(self, run_id, request, handle_id):
        return []

    async def append_chunk(self, key, epoch, start, result):
        await self._write(("chunk", epoch, start))

    async def restart(self, key, epoch):
        await self._write(("restart", epoch))

    async def _write(self, what):
        if self.faults:
            raise self.faults.pop(0)
        self.done.append(what)


def test_it_waits_while_the_journal_cannot_write_and_keeps_the_order(config, monkeypatch):
    monkeypatch.setattr(actors.journal_keeper, "RETRY_S", 0.001)
    journal = SlowJournal([JournalFull("no room"), JournalFull("no room"), JournalLost("gone"), JournalFull("no room")])
    monkeypatch.setattr(actors.journal_keeper, "open_journal", lambda config: journal)

    async def story():
        keeper = JournalKeeper(config)
        await keeper.submit(a_request(), "h")
        steps = [
            keeper.append(a_landing()),
            keeper.restart(Restart(run_id="run", group_id="a", sample_index=0, epoch=1)),
            keeper.append(a_landing(epoch=1)),
            keeper.append(a_landing(epoch=1, start=3)),
        ]
        tasks = [asyncio.create_task(steps[0])]
        await asyncio.sleep(0)  # the first has been refused, and waits
        assert keeper.trouble == "no room" and journal.done == []
        tasks += [asyncio.create_task(step) for step in steps[1:]]
        await asyncio.gather(*tasks)
        return keeper

    keeper = asyncio.run(story())
    assert journal.done == [("chunk", 0, 0), ("restart", 1), ("chunk", 1, 0), ("chunk", 1, 3)]
    assert (keeper.num_waits, keeper.trouble) == (4, None)


def test_a_conflict_is_not_waited_for(config, monkeypatch):
    journal = SlowJournal([JournalConflict("another one")])
    monkeypatch.setattr(actors.journal_keeper, "open_journal", lambda config: journal)

    async def story():
        keeper = JournalKeeper(config)
        await keeper.submit(a_request(), "h")
        with pytest.raises(JournalConflict):
            await keeper.append(a_landing())
        assert keeper.num_waits == 0

    asyncio.run(story())
