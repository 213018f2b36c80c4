from __future__ import annotations

import asyncio
import hmac
from contextlib import aclosing
from dataclasses import replace

import pytest

from actors.token_line import LENGTH_BYTES, MAX_SUBSCRIPTION_BYTES, NONCE_BYTES, Subscription, TokenServer, follow
from rollout.gateway.outbox import Outboxes
from rollout.streaming import ChunkEnd, TokenDelta

HOST = "127.0.0.1"


class Line:
    def __init__(self):
        self.outboxes = Outboxes(patience_s=60.0)
        self.server = TokenServer(self.outboxes)

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


@pytest.mark.parametrize("sent", [b"", b"\xff" * LENGTH_BYTES, (MAX_SUBSCRIPTION_BYTES + 1).to_bytes(LENGTH_BYTES)])
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
