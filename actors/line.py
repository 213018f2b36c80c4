"""Sockets between actors, for what is too small and too frequent for calls: those take a millisecond or more each.

    server                            client
      nonce (32 bytes)            ─►
                                  ◄─  HMAC-SHA256(key, nonce) (32 bytes)
                                  ◄─  frame: which handler it wants
      … whatever the handler says, in frames, until either end closes

A frame is its length (4 bytes, big-endian) and its bytes. Address and key come by an actor call, so whoever may make
those may connect. Both ends live in an event loop. Knows nothing of what is said.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)
KEY_BYTES = 32
NONCE_BYTES = 32
LENGTH_BYTES = 4
MAX_FRAME_BYTES = 2**30
MAX_NAME_BYTES = 64
GREETING_S = 10.0

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LineAddress:
    """Where an actor listens, and the key, hexadecimal, which no log shall have."""

    host: str
    port: int
    key: str = field(repr=False)


class LineServer:
    """An actor's end.

    Args:
        handlers: By the name that clients ask for; each is called with a connection and ends with it.
    """

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = dict(handlers)
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
                handler = await self._greet(reader, writer)
            if handler is not None:
                await handler(reader, writer)
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            logger.info("line: a connection ended: %r", error)
        except asyncio.CancelledError:  # closed; nobody waits for this task
            pass
        finally:
            self._lines.discard(line)
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Handler | None:
        nonce = secrets.token_bytes(NONCE_BYTES)
        writer.write(nonce)
        if not hmac.compare_digest(await reader.readexactly(NONCE_BYTES), _proof(self._key, nonce)):
            logger.warning("line: refused a connection without the key")
            return None
        return self._handlers.get((await read_frame(reader, MAX_NAME_BYTES)).decode())


async def connect(address: LineAddress, handler: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a handler.

    Raises:
        OSError, EOFError, TimeoutError: It cannot be reached.
    """
    async with asyncio.timeout(GREETING_S):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        nonce = await reader.readexactly(NONCE_BYTES)
    writer.write(_proof(bytes.fromhex(address.key), nonce))
    write_frame(writer, handler.encode())
    return reader, writer


def write_frame(writer: asyncio.StreamWriter, payload: bytes) -> None:
    """Send a frame, as far as the socket takes it; await `drain` where there may be many."""
    writer.write(len(payload).to_bytes(LENGTH_BYTES, "big") + payload)


async def read_frame(reader: asyncio.StreamReader, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """The next frame. Raises EOFError at the end of the line, or if the frame is larger than that."""
    num_bytes = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
    if num_bytes > max_bytes:
        raise EOFError(f"line: got a frame of {num_bytes} bytes, expected at most {max_bytes}")
    return await reader.readexactly(num_bytes)


def _proof(key: bytes, nonce: bytes) -> bytes:
    return hmac.digest(key, nonce, hashlib.sha256)
