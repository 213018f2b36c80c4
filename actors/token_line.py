"""Tokens of streams on their way from shards to gateways, over a socket of their own.

A call between actors takes a millisecond or more whatever is in it, and each of the answers would have to be asked for.
Here a subscriber connects once to each shard, which sends it what its outbox gives, when it gives it:

    shard                             subscriber
      nonce (32 bytes)             ─►
                                   ◄─  HMAC-SHA256(key, nonce) (32 bytes)
                                   ◄─  frame: Subscription
      frame: tuple[TokenDelta, …]  ─►  … until either end closes

A frame is its length (4 bytes, big-endian) and MessagePack. Address and key come by an actor call, so whoever may make
those may connect. Both ends live in an event loop. What is lost with a connection is lost: the finished trajectory has
the last word (see rollout.streaming).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import msgspec

from rollout.gateway.outbox import Outboxes
from rollout.streaming import TokenDelta

logger = logging.getLogger(__name__)
KEY_BYTES = 32
NONCE_BYTES = 32
LENGTH_BYTES = 4
MAX_FRAME_BYTES = 2**28
MAX_SUBSCRIPTION_BYTES = 2**12
GREETING_S = 10.0
TAKE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LineAddress:
    """Where a shard listens, and the key, hexadecimal."""

    host: str
    port: int
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """Whose tokens are wanted, and how long one may be kept for others to join it."""

    subscriber: str
    coalesce_s: float


class TokenServer:
    """A shard's end.

    Args:
        outboxes: Of its subscribers.
    """

    def __init__(self, outboxes: Outboxes) -> None:
        self._outboxes = outboxes
        self._key = secrets.token_bytes(KEY_BYTES)
        self._server: asyncio.Server | None = None
        self._address: LineAddress | None = None
        self._opening = asyncio.Lock()
        self._lines: set[asyncio.Task[Any]] = set()

    async def open(self, host: str) -> LineAddress:
        """Listen on this address of the host, from the first call on. Returns where to connect."""
        async with self._opening:
            if self._address is None:
                self._server = await asyncio.start_server(self._serve, host, 0)
                host, port = self._server.sockets[0].getsockname()[:2]
                self._address = LineAddress(host=host, port=port, key=self._key.hex())
        return self._address

    def close(self) -> None:
        """Listen no more, and end all lines."""
        if self._server is not None:
            self._server.close()
        for line in self._lines:
            line.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = asyncio.current_task()
        assert line is not None, "a connection is served in a task"
        self._lines.add(line)
        try:
            async with asyncio.timeout(GREETING_S):
                wanted = await self._greet(reader, writer)
            if wanted is not None:
                await self._until_gone(reader, self._send(wanted, writer))
        except (OSError, EOFError, TimeoutError, msgspec.DecodeError) as error:
            logger.info("token line: a connection ended: %r", error)
        except asyncio.CancelledError:  # closed; nobody waits for this task
            pass
        finally:
            self._lines.discard(line)
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Subscription | None:
        nonce = secrets.token_bytes(NONCE_BYTES)
        writer.write(nonce)
        proof = await reader.readexactly(NONCE_BYTES)
        if not hmac.compare_digest(proof, _proof(self._key, nonce)):
            logger.warning("token line: refused a connection without the key")
            return None
        return msgspec.msgpack.decode(await _read(reader, MAX_SUBSCRIPTION_BYTES), type=Subscription)

    async def _send(self, wanted: Subscription, writer: asyncio.StreamWriter) -> None:
        encoder = msgspec.msgpack.Encoder()
        while True:
            deltas = await self._outboxes.of(wanted.subscriber).take(TAKE_S, wanted.coalesce_s)
            if deltas:
                _write(writer, encoder.encode(deltas))
                await writer.drain()

    async def _until_gone(self, reader: asyncio.StreamReader, sending: Any) -> None:
        """Send until the subscriber closes its end: what was taken for one that is gone would be lost to its next."""
        tasks = [asyncio.ensure_future(sending), asyncio.ensure_future(reader.read(1))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def follow(address: LineAddress, wanted: Subscription) -> AsyncGenerator[tuple[TokenDelta, ...]]:
    """Tokens as they come.

    Raises:
        OSError, EOFError, TimeoutError: The shard cannot be reached, has closed the line, or does not know the key.
    """
    decoder = msgspec.msgpack.Decoder(tuple[TokenDelta, ...])
    async with asyncio.timeout(GREETING_S):
        reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        async with asyncio.timeout(GREETING_S):
            nonce = await reader.readexactly(NONCE_BYTES)
        writer.write(_proof(bytes.fromhex(address.key), nonce))
        _write(writer, msgspec.msgpack.encode(wanted))
        while True:
            yield decoder.decode(await _read(reader, MAX_FRAME_BYTES))
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _proof(key: bytes, nonce: bytes) -> bytes:
    return hmac.digest(key, nonce, hashlib.sha256)


def _write(writer: asyncio.StreamWriter, payload: bytes) -> None:
    writer.write(len(payload).to_bytes(LENGTH_BYTES, "big") + payload)


async def _read(reader: asyncio.StreamReader, max_bytes: int) -> bytes:
    num_bytes = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
    if num_bytes > max_bytes:
        raise EOFError(f"token line: got a frame of {num_bytes} bytes, expected at most {max_bytes}")
    return await reader.readexactly(num_bytes)
