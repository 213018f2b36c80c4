"""One end of a weight transport between devices, trainer's or worker's, that never blocks its owner.

Joining a group and broadcasting both wait for the other ranks, and a rank can be dead, or busy in a
forward pass that waits for this very process. So both run in background threads, on a stream apart
from the computation's; closing aborts whatever is under way. Knows nothing of buckets or versions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from actors.background import in_background
from rollout.errors import SyncRefused

T = TypeVar("T")


class Communicator(Protocol):
    """What is used of vLLM's PyNcclCommunicator."""

    disabled: bool  # True when NCCL could not be loaded, or after destroy(); calls then do nothing

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None: ...

    def destroy(self) -> None: ...


@functools.cache
def _transfer_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: the allocator keeps freed blocks apart by stream."""
    return torch.cuda.Stream(device)


@contextmanager
def transfer_stream(device: torch.device) -> Iterator[Any]:
    """Make a device's transfer stream current in this thread; wait for it at the end. None on CPU."""
    if device.type != "cuda":
        yield None
        return
    with torch.cuda.device(device):
        stream = _transfer_stream(device)
        with torch.cuda.stream(stream):
            yield stream
        stream.synchronize()


class Link:
    """A communicator that is being opened, is open, or is closed. One action at a time.

    Args:
        connect: Joins the group; waits for the other ranks.
        device: Made current while `connect` and every action run.
    """

    def __init__(self, connect: Callable[[], Communicator], device: torch.device) -> None:
        self._device = device
        self._is_closed = False
        self._connected = in_background("longroll-link", partial(self._open, connect))

    @property
    def connected(self) -> Future[Communicator]:
        """Done when the group has been joined; its exception says why it could not be."""
        return self._connected

    def run(self, action: Callable[[Communicator, Any], T]) -> Future[T]:
        """Start an action with the communicator and its stream; on success the stream has finished.

        Raises:
            SyncRefused: The link is not open.
        """
        if self._is_closed or not self._connected.done() or self._connected.exception() is not None:
            raise SyncRefused("weight transport: got one that is not open")
        return in_background("longroll-transfer", partial(self._act, action, self._connected.result()))

    def close(self) -> None:
        """Abort what is under way and leave the group, in the background; may be called again."""
        if not self._is_closed:
            self._is_closed = True
            self._connected.add_done_callback(_destroy)

    def _open(self, connect: Callable[[], Communicator]) -> Communicator:
        with transfer_stream(self._device):
            communicator = connect()
        if communicator.disabled:
            raise SyncRefused("weight transport: got no NCCL library in this process (vLLM's pynccl)")
        return communicator

    def _act(self, action: Callable[[Communicator, Any], T], communicator: Communicator) -> T:
        with transfer_stream(self._device) as stream:
            result = action(communicator, stream)
        if self._is_closed:  # an aborted collective returns as if it had worked
            raise SyncRefused("weight transport: it was closed in the middle of a transfer")
        return result


def _destroy(connected: Future[Communicator]) -> None:
    if connected.exception() is None:
        in_background("longroll-link-close", connected.result().destroy)
