from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.gateway.choices import Choice, StreamDiverged
from rollout.gateway.idempotency import OVERHEAD_BYTES, Answer, Claim, IdempotencyConflict, IdempotencyStore
from rollout.gateway.outbox import Outbox, Outboxes
from rollout.gateway.sampling import group_id_of, run_seed_of
from rollout.streaming import ChunkEnd, TokenDelta
from rollout.types import FinishReason, Status, Trajectory


def finished(tokens, status=Status.COMPLETED):
    return Trajectory(
        group_id="g",
        sample_index=0,
        seed=0,
        prompt_token_ids=(1,),
        token_ids=list(tokens),
        logprobs=[-float(token) for token in tokens],
        finish_reason=FinishReason.STOP,
        status=status,
    )


def an_end(reason=FinishReason.STOP, num_cached=0):
    return ChunkEnd(is_stopped=reason is FinishReason.STOP, num_cached_tokens=num_cached)


def delta(tokens, start, stop, top=False, end=None):
    some = tuple(tokens[start:stop])
    return TokenDelta(
        stream_id="s",
        start=start,
        token_ids=some,
        logprobs=tuple(-float(token) for token in some),
        top_logprobs=tuple(((token, -float(token)),) for token in some) if top else (),
        end=end,
    )


def a_choice(max_tokens=20, **options):
    return Choice("s", (1,), max_tokens, asyncio.Event(), **options)


@given(st.integers(0, 20), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=12), st.booleans())
def test_every_token_comes_once_whatever_the_stream_does(num, cuts, has_top):
    tokens = list(range(100, 100 + num))
    choice = a_choice(needs_top=has_top)
    for one, other in cuts:
        if min(one, other) < max(one, other) and min(one, other) < num:
            choice.add(delta(tokens, min(one, other), max(one, other), has_top))
            assert choice.token_ids == tokens[: len(choice.token_ids)]
    choice.end(finished(tokens))
    assert choice.token_ids == tokens and choice.logprobs == [-float(token) for token in tokens]
    choice.add(delta(tokens, 0, num, has_top))
    assert choice.is_complete and choice.token_ids == tokens
    assert len(choice.top_logprobs) == (num if has_top else 0)


def test_a_record_that_contradicts_what_was_shown_is_an_error():
    choice = a_choice()
    choice.add(delta([1, 2, 3], 0, 2))
    choice.end(finished([1, 9, 3]))
    assert isinstance(choice.error, StreamDiverged) and choice.is_complete


@given(st.integers(1, 20), st.data())
def test_a_stream_without_seams_ends_its_choice_with_its_last_chunk(num, data):
    tokens = list(range(100, 100 + num))
    cuts = sorted({0, num, *data.draw(st.lists(st.integers(0, num)))})
    ends_of_chunks = data.draw(st.sets(st.sampled_from(cuts[1:]))) | {num}
    reason = data.draw(st.sampled_from((FinishReason.STOP, FinishReason.LENGTH)))
    choice = a_choice(max_tokens=num if reason is FinishReason.LENGTH else num + 1)
    for start, stop in itertools.pairwise(cuts):
        assert not choice.is_complete
        chunk_reason = reason if stop == num else FinishReason.LENGTH
        choice.add(delta(tokens, start, stop, end=an_end(chunk_reason, 3) if stop in ends_of_chunks else None))
    assert choice.is_complete and choice.finish_reason is reason and choice.trajectory is None
    assert choice.num_cached_tokens == 3 * len(ends_of_chunks)
    choice.end(finished(tokens))
    assert choice.token_ids == tokens and choice.error is None and choice.finish_reason is reason


@pytest.mark.parametrize("second", [(0, 3), (1, 3), (3, 4)], ids=["again", "overlapping", "with a gap"])
def test_a_stream_with_a_seam_waits_for_the_record(second):
    choice = a_choice()
    choice.add(delta([1, 2, 3, 4], 0, 2))
    choice.add(delta([1, 2, 3, 4], *second, end=an_end()))
    assert not choice.is_over
    choice.end(finished([1, 9, 3, 4]))
    assert isinstance(choice.error, StreamDiverged), "another version's tokens, which no delta could tell"


def test_an_abort_keeps_what_was_shown():
    choice = a_choice()
    choice.add(delta([1, 2, 3], 0, 3))
    choice.end(finished([1, 2], Status.ABORTED))
    assert choice.token_ids == [1, 2, 3] and choice.error is None


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def put(box, stream_id, start, *tokens):
    box.put(stream_id, start, tokens, [0.0] * len(tokens))


def run(work):
    return asyncio.run(asyncio.wait_for(work, 10))


def test_a_first_token_goes_at_once_and_others_wait_for_company():
    async def work():
        clock = Clock()
        box = Outbox(60.0, clock)
        put(box, "a", 0, 7)
        (first,) = await box.take(10.0, 0.04)
        assert (first.stream_id, first.start, first.token_ids) == ("a", 0, (7,))
        waiting = asyncio.ensure_future(box.take(10.0, 0.04))
        put(box, "a", 1, 8)
        clock.now = 0.03
        put(box, "b", 5, 1)
        put(box, "a", 2, 9)
        await asyncio.sleep(0.005)
        assert not waiting.done()
        clock.now = 0.05
        got = {one.stream_id: (one.start, one.token_ids) for one in await waiting}
        assert got == {"a": (1, (8, 9)), "b": (5, (1,))}
        waiting = asyncio.ensure_future(box.take(10.0, 0.04))
        put(box, "a", 3, 1)
        put(box, "c", 0, 2)
        put(box, "d", 0, 3)
        assert [one.stream_id for one in await waiting] == ["c", "d"], "first tokens go alone"
        clock.now = 0.1
        put(box, "e", 0, 4)
        put(box, "c", 1, 5)
        assert [one.stream_id for one in await box.take(10.0, 0.04)] == ["e", "a", "c"], "all go when some are due"
        clock.now = 20.0
        waiting = asyncio.ensure_future(box.take(0.0, 0.04))
        assert await waiting == ()

    run(work())


def test_the_last_tokens_of_a_chunk_go_at_once():
    async def work():
        clock = Clock()
        box = Outbox(60.0, clock)
        put(box, "a", 4, 1)
        put(box, "b", 4, 1)
        waiting = asyncio.ensure_future(box.take(10.0, 0.04))
        await asyncio.sleep(0)
        assert not waiting.done()
        box.put("a", 5, [2], [0.0], end=an_end(FinishReason.LENGTH))
        put(box, "a", 6, 3)
        ended, successor = await waiting
        assert (ended.start, ended.token_ids, ended.end) == (4, (1, 2), an_end(FinishReason.LENGTH))
        assert (successor.start, successor.token_ids, successor.end) == (6, (3,), None), "of the next chunk"
        clock.now = 0.05
        assert [one.stream_id for one in await box.take(10.0, 0.04)] == ["b"]

    run(work())


def test_tokens_that_do_not_follow_are_kept_apart():
    async def work():
        box = Outbox(60.0)
        put(box, "a", 0, 1, 2)
        put(box, "a", 0, 1, 2, 3)
        assert [(one.start, one.token_ids) for one in await box.take(1.0, 0.0)] == [(0, (1, 2)), (0, (1, 2, 3))]

    run(work())


def test_who_does_not_ask_any_more_is_forgotten(monkeypatch):
    clock = Clock()
    box = Outbox(60.0, clock)
    clock.now = 59.0
    assert not box.is_abandoned
    clock.now = 61.0
    assert box.is_abandoned
    boxes = Outboxes(patience_s=60.0)
    assert boxes.find("a") is boxes.of("a")
    monkeypatch.setattr(boxes.of("a"), "_clock", lambda: float("inf"))
    assert boxes.find("a") is None
    boxes.of("b")
    assert boxes.find("a") is not None, "it was dropped as another came, and asks again"


def answer(text):
    return Answer(status=200, media_type="text/plain", body=text)


def test_the_same_request_gets_the_same_answer():
    async def work():
        clock = Clock()
        store = IdempotencyStore(ttl_s=10.0, max_bytes=10_000, clock=clock)
        claim = await store.claim("a", "k", b"1")
        assert isinstance(claim, Claim)
        second = asyncio.ensure_future(store.claim("a", "k", b"1"))
        await asyncio.sleep(0)
        assert not second.done(), "it waits for the first"
        with pytest.raises(IdempotencyConflict):
            await store.claim("a", "k", b"2")
        claim.keep(answer(b"one"))
        assert (await second).body == b"one"
        assert isinstance(await store.claim("b", "k", b"2"), Claim), "another caller's key is another key"
        clock.now = 11.0
        assert isinstance(await store.claim("a", "k", b"2"), Claim), "it is forgotten after its time"

    run(work())


def test_an_answer_that_failed_is_not_kept():
    async def work():
        store = IdempotencyStore(ttl_s=10.0, max_bytes=10_000)
        claim = await store.claim("a", "k", b"1")
        second = asyncio.ensure_future(store.claim("a", "k", b"1"))
        await asyncio.sleep(0)
        claim.drop()
        assert isinstance(await second, Claim)
        assert store.num_bytes == OVERHEAD_BYTES

    run(work())


def test_answers_are_bounded():
    async def work():
        store = IdempotencyStore(ttl_s=1e9, max_bytes=20_000)
        for number in range(100):
            (await store.claim("a", str(number), b"")).keep(answer(b"x" * 1000))
            assert store.num_bytes <= 20_000
        assert isinstance(await store.claim("a", "99", b""), Answer)
        (await store.claim("a", "large", b"")).keep(answer(b"x" * 100_000))
        assert store.num_bytes <= 20_000

    run(work())


def test_seeds_of_choices():
    assert run_seed_of(5, "a", None) == 5
    assert 0 <= run_seed_of(-1, "a", None) < 2**63
    assert run_seed_of(None, "a", "k") == run_seed_of(None, "a", "k") != run_seed_of(None, "b", "k")
    assert run_seed_of(None, "a", None) != run_seed_of(None, "a", None)
    names = {group_id_of(prompt, sample) for prompt in range(10) for sample in range(10)}
    assert len(names) == 100
