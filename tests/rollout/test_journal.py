"""Every call of the journal, against both databases: what comes back after reopening is what was answered."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from rollout.config import JournalConfig
from rollout.errors import InvalidRequest
from rollout.journal.errors import JournalConflict, JournalFull, JournalLost
from rollout.journal.journal import Journal
from rollout.journal.opening import open_journal, open_reader
from rollout.journal.records import RestoredGroup, TrajectoryKey
from rollout.scheduler.intake import make_group
from rollout.tasks import TaskSpec
from rollout.types import (
    ChunkResult,
    FinishReason,
    Group,
    Prompt,
    SamplingParams,
    Status,
    Trajectory,
    VersionSpan,
)
from tests.rollout.journal_cases import chunk_of, config_of, ended, key_of, member, request_of


def run(config: JournalConfig, use: Callable[[Journal], Awaitable[None]]) -> None:
    """Open, use, close."""

    async def whole() -> None:
        async with open_journal(config) as journal:
            await use(journal)

    asyncio.run(whole())


async def append_all(journal: Journal, key: TrajectoryKey, chunks: list[ChunkResult], epoch: int = 0) -> None:
    start = 0
    for chunk in chunks:
        assert await journal.append_chunk(key, epoch, start, chunk)
        start += len(chunk.token_ids)


async def finish_group(journal: Journal, group_id: str, n: int = 2) -> Group:
    """Give every member of a submitted group a chunk and an end; returns the group as it should come back."""
    request = request_of(group_id, n=n)
    group = make_group(request, 0)
    for i in range(n):
        chunk = chunk_of(4 + i, seed=i)
        await append_all(journal, key_of(group_id, i), [chunk])
        await journal.finish(key_of(group_id, i), 0, ended(member(group, i, [chunk]), reward=float(i)))
    return group


async def restored(journal: Journal) -> list[RestoredGroup]:
    return [group async for group in journal.restore()]


def test_partial_trajectories_come_back_token_for_token(dsn: str) -> None:
    chunks = [chunk_of(7, 1, version=3, exact=True), chunk_of(1, 2, version=4), chunk_of(64, 3, version=4)]
    expected = make_group(request_of("a", "b"), 0)
    first = member(expected, 0, chunks)

    async def write(journal: Journal) -> None:
        assert await journal.submit("run", request_of("a", "b"), "h") == []
        await append_all(journal, key_of("a"), chunks)

    async def read(journal: Journal) -> None:
        groups = await restored(journal)
        assert [(g.run_id, g.handle_id, g.group_id) for g in groups] == [("run", "h", "a"), ("run", "h", "b")]
        one = groups[0]
        assert one.to_group() == expected and one.to_group().trajectories[0] == first
        assert (one.sampling, one.reward, one.run_seed, one.priority) == (
            request_of("a").sampling,
            "reasoning_gym",
            11,
            1,
        )
        stored = one.trajectories[0].chunks
        assert [(c.start, c.num_tokens, c.shard) for c in stored] == [(0, 7, 1), (7, 1, 2), (8, 64, 0)]
        assert stored[0].ttft_s == 0.1 and stored[0].duration_s == 1.7 and stored[0].num_cached_tokens == 5
        assert not one.is_finished and not one.is_acknowledged
        assert groups[1].to_group() == make_group(request_of("a", "b"), 1)

    run(config_of(dsn), write)
    run(config_of(dsn), read)


def test_logprobs_come_back_exactly_whatever_their_width(dsn: str) -> None:
    odd = (-0.1, float("-inf"), -0.0, 1e-310, float("nan"), -1.0)
    chunk = replace(chunk_of(6), logprobs=odd)

    async def write(journal: Journal) -> None:
        await journal.submit("run", request_of("a"), "h")
        await append_all(journal, key_of("a"), [chunk])
        assert not await journal.append_chunk(key_of("a"), 0, 0, chunk), "NaN is equal to itself here"

    async def read(journal: Journal) -> None:
        got = (await restored(journal))[0].trajectories[0].to_trajectory().logprobs
        assert [value.hex() for value in got] == [value.hex() for value in odd]

    run(config_of(dsn), write)
    run(config_of(dsn), read)


def test_a_chunk_is_written_once(dsn: str) -> None:
    async def use(journal: Journal) -> None:
        await journal.submit("run", request_of("a"), "h")
        key, first, second = key_of("a"), chunk_of(5, 1), chunk_of(3, 2)
        await append_all(journal, key, [first, second])
        again = replace(first, shard=7, duration_s=99.0, routing=None)
        assert not await journal.append_chunk(key, 0, 0, again)
        assert not await journal.append_chunk(key, 0, 5, second)
        assert not await journal.append_chunk(key, 0, 8, replace(first, token_ids=(), logprobs=(), spans=()))
        others = {
            "tokens": replace(first, token_ids=(9, *first.token_ids[1:])),
            "log-probabilities": replace(first, logprobs=(-9.0, *first.logprobs[1:])),
            "versions": replace(first, spans=(VersionSpan(version=9, start=0, stop=5),)),
            "end": replace(first, finish_reason=FinishReason.STOP),
            "length": chunk_of(4, 1),
        }
        for name, other in others.items():
            with pytest.raises(JournalConflict, match=r"at token 0: got .* expected the 5"):
                await journal.append_chunk(key, 0, 0, other)
                pytest.fail(name)
        for start, what in ((9, "expected one at token 8"), (2, "got an overlap")):
            with pytest.raises(JournalConflict, match=what):
                await journal.append_chunk(key, 0, start, first)
        for epoch in (-1, 1):
            with pytest.raises(JournalConflict, match=f"got epoch {epoch}, expected 0"):
                await journal.append_chunk(key, epoch, 8, first)
        assert journal.counts.num_chunks == 2 and journal.counts.num_duplicates == 2
        assert (await restored(journal))[0].trajectories[0].num_tokens == 8

    run(config_of(dsn), use)


def test_impossible_chunks_are_the_callers_fault(dsn: str) -> None:
    async def use(journal: Journal) -> None:
        await journal.submit("run", request_of("a"), "h")
        good = chunk_of(4)
        bad = [
            replace(good, logprobs=good.logprobs[:3]),
            replace(good, spans=good.spans[:1]),
            replace(good, spans=(VersionSpan(version=0, start=0, stop=4), VersionSpan(version=1, start=4, stop=4))),
            replace(good, token_ids=(1, 2, 3, 2**31)),
        ]
        for chunk in bad:
            with pytest.raises(InvalidRequest):
                await journal.append_chunk(key_of("a"), 0, 0, chunk)
        for key in (key_of("z"), key_of("a", 2), key_of("a", -1), key_of("a", run_id="other")):
            with pytest.raises(InvalidRequest):
                await journal.append_chunk(key, 0, 0, good)
        assert await journal.append_chunk(key_of("a"), 0, 0, good)

    run(config_of(dsn), use)


def test_a_restart_drops_tokens_and_late_chunks(dsn: str) -> None:
    async def use(journal: Journal) -> None:
        await journal.submit("run", request_of("a"), "h")
        key, old, new = key_of("a"), chunk_of(5, 1), chunk_of(6, 2)
        assert not await journal.restart(key, 0)
        await append_all(journal, key, [old])
        for epoch in (0, 2):
            with pytest.raises(JournalConflict, match=f"got epoch {epoch}, expected epoch 1"):
                await journal.restart(key, epoch)
        assert await journal.restart(key, 1)
        assert not await journal.restart(key, 1)
        with pytest.raises(JournalConflict, match="got epoch 0, expected 1"):
            await journal.append_chunk(key, 0, 5, old)
        await append_all(journal, key, [new], epoch=1)

    async def read(journal: Journal) -> None:
        one = (await restored(journal))[0].trajectories[0]
        assert one.epoch == 1 and one.to_trajectory().token_ids == list(chunk_of(6, 2).token_ids)
        assert not await journal.append_chunk(key_of("a"), 1, 0, chunk_of(6, 2))

    run(config_of(dsn), use)
    run(config_of(dsn), read)


def test_ends_are_written_once_and_only_over_durable_tokens(dsn: str) -> None:
    async def use(journal: Journal) -> None:
        await journal.submit("run", request_of("a"), "h")
        group = make_group(request_of("a"), 0)
        one = member(group, 0, [chunk_of(5)])
        with pytest.raises(InvalidRequest, match="pending"):
            await journal.finish(key_of("a"), 0, one)
        ended(one)
        with pytest.raises(JournalConflict, match="with 5 tokens, expected epoch 0 with the 0"):
            await journal.finish(key_of("a"), 0, one)
        await append_all(journal, key_of("a"), [chunk_of(5)])
        with pytest.raises(InvalidRequest, match="finite"):
            await journal.finish(key_of("a"), 0, replace(one, reward=float("nan")))
        with pytest.raises(InvalidRequest, match="plain data"):
            await journal.finish(key_of("a"), 0, replace(one, metadata={"x": object()}))
        assert await journal.finish(key_of("a"), 0, one)
        assert not await journal.finish(key_of("a"), 0, replace(one, metadata={"generate_s": 9.0}))
        with pytest.raises(
            JournalConflict, match=r"got completed with reward 0\.75, expected completed with reward 0\.5"
        ):
            await journal.finish(key_of("a"), 0, replace(one, reward=0.75))
        with pytest.raises(JournalConflict, match="none after its end"):
            await journal.append_chunk(key_of("a"), 0, 5, chunk_of(5))
        assert not await journal.append_chunk(key_of("a"), 0, 0, chunk_of(5))
        with pytest.raises(JournalConflict, match="none after its end"):
            await journal.restart(key_of("a"), 1)
        failed = make_group(request_of("a"), 0).trajectories[1]
        failed.fail("reward raised \0 \ud800")
        assert await journal.finish(key_of("a", 1), 0, failed)

    async def read(journal: Journal) -> None:
        assert await restored(journal) == []
        group = (await journal.submit("run", request_of("a"), "h2"))[0]
        assert group.is_finished and group.handle_id == "h2"
        first, second = group.to_group().trajectories
        assert (first.status, first.finish_reason, first.reward) == (Status.COMPLETED, FinishReason.STOP, 0.5)
        assert first.metadata == {"prompt": {"index": 0, "task": {"name": "sum"}}, "generate_s": 1.25}
        assert (second.status, second.reward, second.error) == (Status.FAILED, None, "reward raised \0 \ud800")

    run(config_of(dsn), use)
    run(config_of(dsn), read)


def test_a_group_that_comes_again_must_be_the_same(dsn: str) -> None:
    async def use(journal: Journal) -> None:
        request = request_of("a", "b")
        await journal.submit("run", request, "h")
        await append_all(journal, key_of("b"), [chunk_of(3)])
        (one,) = await journal.submit("run", request_of("b", prompts=request.prompts[1:]), "h2")
        assert one.handle_id == "h2" and one.trajectories[0].num_tokens == 3
        a = request_of("a")
        others = {
            "another prompt": replace(a, prompts=(replace(a.prompts[0], token_ids=(9,)),)),
            "another prompt than": replace(a, prompts=(replace(a.prompts[0], metadata={}),)),
            "sampling": replace(a, sampling=SamplingParams()),
            "n_samples_per_prompt 3, expected 2": replace(a, n_samples_per_prompt=3),
            "reward none": replace(a, reward="none"),
            "run_seed 12, expected 11": replace(a, run_seed=12),
        }
        for name, other in others.items():
            with pytest.raises(JournalConflict, match=name):
                await journal.submit("run", other, "h3")
        both = replace(request_of("new", "a"), run_seed=12)
        with pytest.raises(JournalConflict, match="group a of run run"):
            await journal.submit("run", both, "h3")
        assert [g.group_id for g in await restored(journal)] == ["a", "b"], "all of a request, or nothing"
        assert await journal.submit("other", replace(a, run_seed=12), "h3") == [], "runs do not see each other"
        assert [g.handle_id for g in await restored(journal)] == ["h", "h2", "h3"]

    run(config_of(dsn), use)


def test_what_cannot_be_kept_is_refused_and_dataclasses_become_plain(dsn: str) -> None:
    async def use(journal: Journal) -> None:
        for bad in ("a\0b", "a\ud800"):
            with pytest.raises(InvalidRequest, match="surrogates"):
                await journal.submit("run", request_of(bad), "h")
            with pytest.raises(InvalidRequest, match="surrogates"):
                await journal.submit(bad, request_of("a"), "h")
        for metadata in ({"x": object()}, {"x": {1: 2}}):
            prompt = Prompt(token_ids=(1,), prompt_id="p", metadata=metadata)
            with pytest.raises(InvalidRequest, match="prompt p"):
                await journal.submit("run", request_of("a", prompts=(prompt,)), "h")
        with pytest.raises(InvalidRequest, match="run_seed"):
            await journal.submit("run", request_of("a", run_seed=-1), "h")
        spec = TaskSpec(name="chain_sum", seed=1, size=2, options=(("min", 3),))
        prompt = Prompt(token_ids=(1,), prompt_id="ünï\0\ud800", metadata={"task": spec, "index": 0})
        await journal.submit("run", request_of("a", prompts=(prompt,)), "h")
        got = (await restored(journal))[0].prompt
        task = {"name": "chain_sum", "seed": 1, "size": 2, "options": [["min", 3]]}
        assert got == replace(prompt, metadata={"task": task, "index": 0})

    run(config_of(dsn), use)


def test_leases_and_acknowledgements(dsn: str) -> None:
    async def use(journal: Journal) -> None:
        await journal.submit("run", request_of("a", "b", "c"), "h")
        await journal.submit("other", request_of("a"), "h")
        for group_id in ("c", "a"):
            await finish_group(journal, group_id)
        assert await journal.lease_ids("run", "t", 5, 10.0, 0.0) == ["c", "a"], "in the order of finishing"
        assert await journal.lease_ids("run", "u", 5, 10.0, 9.0) == [], "leased"
        assert await journal.lease_ids("run", "u", 1, 10.0, 10.0) == ["c"], "the lease ran out"
        assert await journal.release("run", "t") == 1 and await journal.release("other", "u") == 0
        assert await journal.lease_ids("run", "t", 5, 10.0, 11.0) == ["a"]
        with pytest.raises(JournalConflict, match="group b of run run"):
            await journal.acknowledge("run", ["a", "b"], "step-1", 12.0)
        with pytest.raises(InvalidRequest, match="zz of run run"):
            await journal.acknowledge("run", ["a", "zz"], "step-1", 12.0)
        assert await journal.acknowledge("run", ["a"], "step-1", 12.0) == 1
        assert await journal.acknowledge("run", ["a", "c", "c"], "step-2", 13.0) == 1
        assert await journal.lease_ids("run", "t", 5, 10.0, 1e9) == []
        for got in ((0, 1.0), (1, 0.0), (1, float("inf"))):
            with pytest.raises(InvalidRequest):
                await journal.lease("run", "t", *got, 0.0)

    async def again(journal: Journal) -> None:
        known = await journal.submit("run", request_of("a", "b", "c"), "h2")
        assert [(g.group_id, g.checkpoint) for g in known] == [("a", "step-1"), ("b", None), ("c", "step-2")]
        assert known[0].trajectories[0].num_tokens == 0, "acknowledged groups come without tokens"
        expected = await finish_group(journal, "b")
        assert await journal.lease_ids("other", "t", 5, 10.0, 0.0) == []
        (leased,) = await journal.lease("run", "t", 5, 10.0, 0.0)
        prompts = request_of("a", "b", "c").prompts[1]
        for one in expected.trajectories:
            one.prompt_token_ids, one.metadata["prompt"] = prompts.token_ids, prompts.metadata
        assert leased.to_group() == replace(expected, prompt=prompts)

    run(config_of(dsn), use)
    run(config_of(dsn), again)


def test_compaction_keeps_the_key(dsn: str) -> None:
    async def use(journal: Journal) -> None:
        ids = tuple(f"g{i}" for i in range(20))
        await journal.submit("run", request_of(*ids, "late", "open"), "h")
        for group_id in (*ids, "late"):
            await finish_group(journal, group_id)
        await journal.acknowledge("run", ids, "step-1", 50.0)
        await journal.acknowledge("run", ["late"], "step-2", 60.0)
        assert await journal.compact(149.0) == 0
        assert await journal.compact(150.0) == 20
        assert await journal.compact(150.0) == 0
        known = await journal.submit("run", request_of(*ids, "late", "open"), "h2")
        assert [g.is_compacted for g in known] == [True] * 20 + [False] * 2
        assert all(g.is_acknowledged for g in known[:21])
        assert [one.outline.reward for one in known[0].trajectories] == [0.0, 1.0]
        assert (await journal.trajectory("run", "late/1")).restored.num_tokens == 5
        with pytest.raises(InvalidRequest, match="retention"):
            await journal.trajectory("run", "g0/1")
        with pytest.raises(JournalConflict, match="another prompt"):
            await journal.submit("run", request_of("g0", prompts=(Prompt(token_ids=(8,), prompt_id="x"),)), "h")
        assert await journal.lease_ids("run", "t", 50, 1.0, 1e9) == []
        with pytest.raises(JournalConflict):
            await journal.append_chunk(key_of("g0"), 0, 0, chunk_of(4, seed=0))

    run(config_of(dsn), use)


def test_one_trajectory_with_what_generates_it(dsn: str) -> None:
    async def use(journal: Journal) -> None:
        await journal.submit("run", request_of("a/b"), "h")
        await append_all(journal, key_of("a/b", 1), [chunk_of(5)])
        record = await journal.trajectory("run", "a/b/1")
        expected = member(make_group(request_of("a/b"), 0), 1, [chunk_of(5)])
        assert record.restored.to_trajectory() == expected
        assert (record.prompt, record.sampling) == (request_of("a/b").prompts[0], request_of("a/b").sampling)
        for bad in ("a/b/2", "a/1", "a", "a/x", "/"):
            with pytest.raises(InvalidRequest, match=r"trajectory|group: got"):
                await journal.trajectory("run", bad)

    run(config_of(dsn), use)


def test_many_calls_share_transactions_and_faults_stay_alone(dsn: str) -> None:
    async def use(journal: Journal) -> None:
        ids = tuple(f"g{i}" for i in range(40))
        await journal.submit("run", request_of(*ids), "h")
        before = journal.counts.num_commits
        calls = [journal.append_chunk(key_of(one), 0, 0, chunk_of(8, i)) for i, one in enumerate(ids)]
        bad = journal.append_chunk(key_of("g0", 1), 0, 5, chunk_of(8))
        done = await asyncio.gather(*calls, bad, return_exceptions=True)
        assert done[:-1] == [True] * 40 and isinstance(done[-1], JournalConflict)
        assert journal.counts.num_commits - before == 1 and journal.counts.num_failed == {"JournalConflict": 1}

    run(config_of(dsn, group_commit_ms=200.0), use)  # all calls are queued within it: they are made in one go


def test_calls_in_one_transaction_see_each_other(dsn: str) -> None:
    async def use(journal: Journal) -> None:
        await journal.submit("run", request_of("a", n=1), "h")
        one = ended(member(make_group(request_of("a", n=1), 0), 0, [chunk_of(5)]))
        calls = (
            journal.append_chunk(key_of("a"), 0, 0, chunk_of(5)),
            journal.finish(key_of("a"), 0, one),
            journal.lease("run", "t", 1, 10.0, 0.0),
            journal.append_chunk(key_of("a"), 0, 0, chunk_of(5)),
            journal.acknowledge("run", ["a"], "step-1", 0.0),
        )
        before = journal.counts.num_commits
        new, finished, leased, duplicate, acknowledged = await asyncio.gather(*calls)
        assert journal.counts.num_commits - before == 1, "none had to be tried again alone"
        assert (new, finished, duplicate, acknowledged) == (True, True, False, 1)
        assert leased[0].to_group().trajectories == [one]

    run(config_of(dsn, group_commit_ms=200.0), use)


def test_a_cancelled_call_disturbs_nobody(dsn: str) -> None:
    async def use(journal: Journal) -> None:
        await journal.submit("run", request_of("a"), "h")
        first = asyncio.ensure_future(journal.append_chunk(key_of("a"), 0, 0, chunk_of(5)))
        second = asyncio.ensure_future(journal.append_chunk(key_of("a", 1), 0, 0, chunk_of(6)))
        await asyncio.sleep(0)  # both are queued
        first.cancel()
        assert await second
        assert first.cancelled()
        assert not await journal.append_chunk(key_of("a"), 0, 0, chunk_of(5)), "it became durable all the same"

    run(config_of(dsn, group_commit_ms=50.0), use)


def test_closing_answers_what_was_called_and_refuses_the_rest(dsn: str) -> None:
    async def use() -> None:
        journal = open_journal(config_of(dsn, group_commit_ms=20.0))
        call = asyncio.ensure_future(journal.submit("run", request_of("a"), "h"))
        await asyncio.sleep(0)
        await journal.close()
        await journal.close()
        assert await call == []
        with pytest.raises(JournalLost, match="closed"):
            await journal.submit("run", request_of("a"), "h")

    asyncio.run(use())


def test_a_reader_looks_on_while_the_owner_writes(dsn: str) -> None:
    with pytest.raises(InvalidRequest), open_reader(config_of(dsn)):
        pass

    async def use(journal: Journal) -> None:
        await journal.submit("run", request_of("a"), "h")
        with open_reader(config_of(dsn)) as reader:
            await append_all(journal, key_of("a"), [chunk_of(5)])
            assert reader.run_ids() == ["run"] and reader.trajectory(key_of("a")).restored.num_tokens == 5
            await append_all(journal, key_of("a", 1), [chunk_of(6)])
            assert reader.trajectory(key_of("a", 1)).restored.num_tokens == 6

    run(config_of(dsn), use)


def test_without_a_dsn_the_same_calls_work_in_memory() -> None:
    async def use(journal: Journal) -> None:
        await journal.submit("run", request_of("a"), "h")
        await finish_group(journal, "a")
        assert len(await journal.lease("run", "t", 1, 1.0, 0.0)) == 1
        assert await journal.acknowledge("run", ["a"], "step-1", 0.0) == 1 and await journal.compact(1e6) == 1

    run(JournalConfig(), use)


def test_routing_that_does_not_outlive_the_process_is_left_out() -> None:
    async def use(journal: Journal) -> None:
        await journal.submit("run", request_of("a"), "h")
        chunk = chunk_of(4)
        assert chunk.routing is not None
        await append_all(journal, key_of("a"), [replace(chunk, routing=replace(chunk.routing, ref=object()))])
        assert (await restored(journal))[0].to_group().trajectories[0].routed_experts == ()

    run(JournalConfig(), use)


@pytest.mark.parametrize("dsn", ["mysql://x", "sqlite://relative", "sqlite:///", "journal.db"])
def test_an_unknown_dsn_is_refused(dsn: str) -> None:
    with pytest.raises(InvalidRequest, match=r"journal\.dsn"):
        open_journal(JournalConfig(dsn=dsn))


def test_options_are_checked_and_errors_survive_pickling() -> None:
    for changes in ({"group_commit_ms": -1.0}, {"synchronous": "off"}, {"retention_s": 0.0}):
        with pytest.raises(InvalidRequest, match="journal"):
            JournalConfig(**changes)
    error = pickle.loads(pickle.dumps(JournalFull("journal x: got no room, expected some")))
    assert isinstance(error, JournalFull) and "no room" in str(error)


def test_unpacked_tokens_belong_to_the_caller() -> None:
    async def use(journal: Journal) -> None:
        await journal.submit("run", request_of("a"), "h")
        await append_all(journal, key_of("a"), [replace(chunk_of(3), token_ids=(-7, 2**30, 5))])
        one = (await restored(journal))[0].trajectories[0]
        first: Trajectory = one.to_trajectory()
        assert first.token_ids == [-7, 2**30, 5]
        first.append(chunk_of(4))
        first.metadata["x"] = 1
        assert one.to_trajectory().token_ids == [-7, 2**30, 5] and "x" not in one.to_trajectory().metadata

    run(JournalConfig(), use)
