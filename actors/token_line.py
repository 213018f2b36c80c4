"""Tokens of streams on their way from shards to gateways, over a line that a gateway keeps to each shard.

A subscriber says once who it is, and is sent what its outbox gives, when it gives it. What is lost with a connection is
lost: the finished trajectory has the last word (see rollout.streaming). Frames are MessagePack.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import msgspec

from actors.line import LineAddress, connect, read_frame, write_frame
from rollout.gateway.outbox import Outboxes
from rollout.streaming import TokenDelta

TOKENS = "tokens"  # what the line is called at a shard
MAX_SUBSCRIPTION_BYTES = 2**12
TAKE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """Whose tokens are wanted, and how long one may be kept for others to join it."""

    subscriber: str
    coalesce_s: float


class TokenSender:
    """A shard's end; the handler of its line server.

    Args:
        outboxes: Of its subscribers.
    """

    def __init__(self, outboxes: Outboxes) -> None:
        self._outboxes = outboxes

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wanted = msgspec.msgpack.decode(await read_frame(reader, MAX_SUBSCRIPTION_BYTES), type=Subscription)
        await _until_gone(reader, self._send(wanted, writer))

    async def _send(self, wanted: Subscription, writer: asyncio.StreamWriter) -> None:
        encoder = msgspec.msgpack.Encoder()
        while True:
            deltas = await self._outboxes.of(wanted.subscriber).take(TAKE_S, wanted.coalesce_s)
            if deltas:
                write_frame(writer, encoder.encode(deltas))
                await writer.drain()


async def follow(address: LineAddress, wanted: Subscription) -> AsyncGenerator[tuple[TokenDelta, ...]]:
    """Tokens as they come.

    Raises:
        OSError, EOFError, TimeoutError: The shard cannot be reached, has closed the line, or does not know the key.
    """
    decoder = msgspec.msgpack.Decoder(tuple[TokenDelta, ...])
    reader, writer = await connect(address, TOKENS)
    try:
        write_frame(writer, msgspec.msgpack.encode(wanted))
        while True:
            yield decoder.decode(await read_frame(reader))
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _until_gone(reader: asyncio.StreamReader, sending: Any) -> None:
    """Send until the subscriber closes its end: what was taken for one that is gone would be lost to its next line."""
    tasks = [asyncio.ensure_future(sending), asyncio.ensure_future(reader.read(1))]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
