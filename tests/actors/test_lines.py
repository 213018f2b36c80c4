from __future__ import annotations

import asyncio
import hmac
import os
import signal
from contextlib import aclosing
from dataclasses import replace

import pytest
import ray
from ray.exceptions import RayActorError

from actors.call_line import CALLS, CallLines, CallServer, LineBroken
from actors.line import LENGTH_BYTES, MAX_NAME_BYTES, NONCE_BYTES, LineServer
from actors.token_line import TOKENS, Subscription, TokenSender, follow
from rollout.errors import InvalidRequest, LongrollError
from rollout.gateway.outbox import Outboxes
from rollout.streaming import ChunkEnd, TokenDelta
from tests.actors.gateway_fakes import Remote

HOST = "127.0.0.1"


class Line:
    def __init__(self):
        self.outboxes = Outboxes(patience_s=60.0)
        self.server = LineServer({TOKENS: TokenSender(self.outboxes)})

    def put(self, subscriber, start, *tokens):
        self.outboxes.of(subscriber).put("s", start, tokens, [-0.5] * len(tokens))

    async def follow(self, subscriber="a"):
        return follow(await self.server.open(HOST), Subscription(subscriber=subscriber, coalesce_s=0.0))


def run(work):
    asyncio.run(asyncio.wait_for(work, 20))


def test_a_delta_arrives_as_it_was_sent():
    async def work():
        line = Line()
        end = ChunkEnd(is_stopped=True, num_cached_tokens=7)
        top, prompt = [((5, -0.25), (6, -1.5))], (None, ((1, -2.0),))
        line.outboxes.of("a").put("s", 0, (5,), (-0.25,), top, prompt, end)
        async with aclosing(await line.follow()) as tokens:
            assert await anext(tokens) == (
                TokenDelta(
                    stream_id="s",
                    start=0,
                    token_ids=(5,),
                    logprobs=(-0.25,),
                    top_logprobs=tuple(top),
                    prompt_logprobs=prompt,
                    end=end,
                ),
            )

    run(work())


def test_subscribers_get_their_own_and_a_broken_line_is_taken_up_by_the_next():
    async def work():
        line = Line()
        async with aclosing(await line.follow("a")) as mine, aclosing(await line.follow("b")) as other:
            line.put("a", 0, 1)
            line.put("b", 0, 2)
            assert [(await anext(mine))[0].token_ids, (await anext(other))[0].token_ids] == [(1,), (2,)]
        await asyncio.sleep(0.05)
        line.put("a", 1, 3)
        async with aclosing(await line.follow("a")) as mine:
            assert (await anext(mine))[0].token_ids == (3,), "the line that was closed took nothing"

    run(work())


def test_who_has_not_the_key_gets_nothing():
    async def work():
        line = Line()
        address = await line.server.open(HOST)
        assert await line.server.open(HOST) == address
        line.put("a", 0, 1)
        wrong = follow(replace(address, key="00" * 32), Subscription(subscriber="a", coalesce_s=0.0))
        with pytest.raises((EOFError, OSError)):
            await anext(wrong)
        async with aclosing(await line.follow()) as tokens:
            assert (await anext(tokens))[0].token_ids == (1,)

    run(work())


def frame(payload):
    return len(payload).to_bytes(LENGTH_BYTES, "big") + payload


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\xff" * LENGTH_BYTES,
        frame(b"x" * (MAX_NAME_BYTES + 1)),
        frame(b"nobody"),
        frame(b"\xff"),
        frame(TOKENS.encode()) + frame(b"\xc1"),
    ],
    ids=["silent", "huge", "long", "unknown", "not text", "not MessagePack"],
)
def test_who_talks_nonsense_is_hung_up_on(sent):
    async def work():
        line = Line()
        address = await line.server.open(HOST)
        reader, writer = await asyncio.open_connection(HOST, address.port)
        nonce = await reader.readexactly(NONCE_BYTES)
        writer.write(hmac.digest(bytes.fromhex(address.key), nonce, "sha256") + sent)
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()

    run(work())


def test_a_shard_that_is_gone_ends_its_lines():
    async def work():
        line = Line()
        async with aclosing(await line.follow()) as tokens:
            line.put("a", 0, 1)
            await anext(tokens)
            line.server.close()
            with pytest.raises(EOFError):
                await anext(tokens)
        with pytest.raises(OSError):
            await anext(await line.follow())  # nobody listens any more

    run(work())


class Callee:
    """An actor that is called; `through_ray` counts calls that did not come over its line."""

    def __init__(self):
        self.server = LineServer({CALLS: CallServer({"say": self.said, "hang": self.hung, "fail": self.failed})})
        self.through_ray, self.order, self.is_dead, self.release = 0, [], False, asyncio.Event()

    async def line_address(self):
        if self.is_dead:
            raise RuntimeError("dead, says Ray")
        return await self.server.open(HOST)

    async def say(self, word):
        self.through_ray += 1
        return await self.said(word)

    async def said(self, word):
        self.order.append(word)
        return f"{word}!"

    async def hung(self):
        await self.release.wait()
        return "at last"

    async def failed(self, error):
        raise error


async def open_line():
    """(callee, its handle, lines) once the line is open."""
    callee = Callee()
    actor, lines = Remote(callee), CallLines()
    for _ in range(200):
        await lines.call(actor, "say", "first")  # through Ray, while the line is opened
        if lines.num_open:
            return callee, actor, lines
        await asyncio.sleep(0.005)
    raise AssertionError("no line")


def test_calls_go_over_the_line_once_it_is_open():
    async def work():
        callee, actor, lines = await open_line()
        before, callee.order = callee.through_ray, []
        hung = asyncio.ensure_future(lines.call(actor, "hang"))
        words = [str(number) for number in range(20)]
        answers = await asyncio.gather(*(lines.call(actor, "say", word) for word in words))
        assert answers == [f"{word}!" for word in words] and callee.order == words, "none waits for another, in order"
        assert callee.through_ray == before and not hung.done()
        callee.release.set()
        assert await hung == "at last"
        lines.close()

    run(work())


def test_errors_come_back_in_their_own_class():
    async def work():
        _, actor, lines = await open_line()
        with pytest.raises(InvalidRequest, match="x: got 1, expected 2"):
            await lines.call(actor, "fail", InvalidRequest("x", 1, "2"))
        with pytest.raises(LongrollError, match="ZeroDivisionError: oh"):
            await lines.call(actor, "fail", ZeroDivisionError("oh"))
        with pytest.raises(LongrollError, match="KeyError"):
            await lines.call(actor, "no such method")
        lines.close()

    run(work())


@pytest.mark.parametrize("is_dead", [True, False])
def test_a_broken_line_takes_its_calls_and_the_next_ones_go_through_ray(is_dead):
    async def work():
        callee, actor, lines = await open_line()
        hung = asyncio.ensure_future(lines.call(actor, "hang"))
        await asyncio.sleep(0.01)
        callee.is_dead, before = is_dead, callee.through_ray
        callee.server.close()
        with pytest.raises(RuntimeError if is_dead else LineBroken, match="dead, says Ray" if is_dead else "broke"):
            await hung
        assert await lines.call(actor, "say", "after") == "after!" and callee.through_ray == before + 1
        await asyncio.sleep(0.01)
        assert await lines.call(actor, "say", "later") == "later!", "nobody listens: Ray it is"
        lines.close()

    run(work())


class Sleeper:
    """A real actor that never answers."""

    def __init__(self):
        self.server = LineServer({CALLS: CallServer({"sleep": self.sleep})})

    async def line_address(self):
        return await self.server.open(HOST)

    async def pid(self):
        return os.getpid()

    async def sleep(self):
        await asyncio.sleep(3600)


@pytest.mark.ray
def test_the_death_of_an_actor_is_told_by_ray(ray_cluster):
    async def work():
        actor, lines = ray.remote(Sleeper).options(num_cpus=0).remote(), CallLines()
        through_ray = asyncio.ensure_future(lines.call(actor, "sleep"))
        pid = await actor.pid.remote()
        while not lines.num_open:
            await asyncio.sleep(0.02)
        over_line = asyncio.ensure_future(lines.call(actor, "sleep"))
        await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        for call in (through_ray, over_line):
            with pytest.raises(RayActorError):
                await call
        with pytest.raises(RayActorError):
            await lines.call(actor, "sleep")
        lines.close()

    asyncio.run(asyncio.wait_for(work(), 60))
