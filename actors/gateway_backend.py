"""A gateway's side of the service: completions under way, and the lines that bring their tokens.

Owns the open choices, and a line to each shard once any of them was followed. A completion is one call to the
controller, which answers at its end. Knows nothing of HTTP or text.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from actors.call_line import CallLines
from actors.token_line import Subscription, follow
from rollout.async_client import AsyncRolloutClient
from rollout.errors import LongrollError, QueueFull, ServiceLost
from rollout.gateway.choices import Choice
from rollout.remote import client_error, find_again
from rollout.streaming import FirstToken
from rollout.types import ModelLimits, RolloutRequest

logger = logging.getLogger(__name__)
OVER_LINE = ("complete", "abort")
REFRESH_S = 2.0
RETRY_S = 0.5
TELL_S = 0.5  # first tokens are gathered before the controller is told
MAX_TRIES = 2  # of a completion whose controller died: the same request gives the same tokens


class TokenLines:
    """The lines of one subscriber, to all shards that serve.

    Args:
        subscriber: Its name.
        coalesce_s: How long shards gather tokens.
        find_shards: Asks for the actor handles of the shards that serve, by rank.
    """

    def __init__(self, subscriber: str, coalesce_s: float, find_shards: Callable[[], Any]) -> None:
        self._subscriber, self._coalesce_s, self._find_shards = subscriber, coalesce_s, find_shards
        self._followed: dict[str, Choice] = {}
        self._shards: dict[int, Any] = {}
        self._lines: dict[int, asyncio.Task[None]] = {}
        self._refresher: asyncio.Task[None] | None = None

    def follow(self, choice: Choice) -> None:
        """Give a choice its tokens as they come."""
        self._followed[choice.stream_id] = choice
        self._open_all()
        if self._refresher is None or self._refresher.done():
            self._refresher = asyncio.create_task(self._refresh())

    def leave(self, choice: Choice) -> None:
        """Its tokens are not wanted any more; harmless for a choice that is not followed."""
        self._followed.pop(choice.stream_id, None)

    def close(self) -> None:
        """End all of them."""
        for task in [*self._lines.values(), *([self._refresher] if self._refresher else [])]:
            task.cancel()

    def _open_all(self) -> None:
        for rank, shard in self._shards.items():
            task = self._lines.get(rank)
            if task is None or task.done():
                self._lines[rank] = asyncio.create_task(self._keep(rank, shard))

    async def _refresh(self) -> None:
        """Shards come and go while streams are open."""
        while self._followed:
            with contextlib.suppress(LongrollError):
                self._shards = await self._find_shards()
            self._open_all()
            await asyncio.sleep(REFRESH_S)

    async def _keep(self, rank: int, shard: Any) -> None:
        """One shard's line, opened again when it breaks, until another shard has its rank or no stream is open."""
        while self._shards.get(rank) == shard:
            try:
                await self._read(shard)
            except Exception as error:  # the finished completions come all the same
                logger.warning("shard %d gave no tokens: %r", rank, client_error(error))
            if not self._followed:
                return
            await asyncio.sleep(RETRY_S)

    async def _read(self, shard: Any) -> None:
        wanted = Subscription(subscriber=self._subscriber, coalesce_s=self._coalesce_s)
        async with contextlib.aclosing(follow(await shard.line_address.remote(), wanted)) as tokens:
            async for deltas in tokens:
                for delta in deltas:
                    choice = self._followed.get(delta.stream_id)
                    if choice is not None:
                        choice.add(delta)


class Backend:
    """See the module. Lives in one event loop.

    Args:
        controller: Actor handle of the controller.
        find: Finds the controller that took the place of one that died, raising ValueError while there is none.
        coalesce_s: How long shards gather the tokens of streams.
        max_open_choices: Completions under way at once.
    """

    def __init__(self, controller: Any, find: Callable[[], Any], coalesce_s: float, max_open_choices: int) -> None:
        self._controller, self._find, self._max_open = controller, find, max_open_choices
        self.client_id = f"gateway-{uuid.uuid4().hex}"
        self._calls = CallLines()
        self._tokens = TokenLines(self.client_id, coalesce_s, lambda: self.call("live_shards"))
        self._running: dict[str, asyncio.Task[None]] = {}
        self._replacing: asyncio.Task[Any] | None = None
        self._ending: set[str] = set()  # handles of choices that were given up
        self._aborts: set[asyncio.Task[None]] = set()
        self._limits: ModelLimits | None = None
        self._first_tokens: list[tuple[float, float]] = []  # when it was asked for, and seconds until it came
        self._telling: asyncio.Task[None] | None = None

    @property
    def num_open(self) -> int:
        """Completions under way."""
        return len(self._running)

    async def limits(self) -> ModelLimits:
        """What the model accepts."""
        if self._limits is None:
            self._limits = await self.call("limits")
        return self._limits

    def check_room(self, num_choices: int) -> None:
        """Raise QueueFull unless so many more completions may be under way."""
        if len(self._running) + num_choices > self._max_open:
            raise QueueFull(
                f"request: got {num_choices} choices with {len(self._running)} under way, expected at most "
                f"gateway.max_open_choices = {self._max_open} in all"
            )

    def begin(self, request: RolloutRequest, choice: Choice) -> None:
        """Ask for a completion; its choice is told how it goes."""
        if request.stream is not None:
            self._tokens.follow(choice)
        self._running[choice.stream_id] = asyncio.create_task(self._complete(request, choice))

    def note_first_token(self, ttft_s: float) -> None:
        """A stream has begun so long after it was asked for; the controller is told, with others."""
        self._first_tokens.append((time.monotonic() - ttft_s, ttft_s))
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        await asyncio.sleep(TELL_S)
        some, self._first_tokens = self._first_tokens, []
        now = time.monotonic()
        seen = [FirstToken(ttft_s=ttft_s, age_s=now - sent_at) for sent_at, ttft_s in some]
        with contextlib.suppress(LongrollError):  # another controller learns anew
            await self.call("note_first_tokens", seen)

    def end(self, choice: Choice) -> None:
        """Whoever asked has what it wants, or wants no more: what is still generated is aborted."""
        self._tokens.leave(choice)
        if choice.stream_id in self._running and choice.stream_id not in self._ending and not choice.is_over:
            self._abort(choice.stream_id)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call the controller. Raises the controller's errors in their own class, and ServiceLost."""
        controller = self._controller
        try:
            if method in OVER_LINE:
                return await self._calls.call(controller, method, *arguments)
            return await getattr(controller, method).remote(*arguments)
        except Exception as error:  # every error is passed on, in its own class
            known = client_error(error)
            if isinstance(known, ServiceLost):
                await self._replace(controller, known)
            raise known from None

    async def _replace(self, lost: Any, error: BaseException) -> None:
        """Wait for the controller that takes the place of one that was lost; all who lost it wait together."""
        if self._controller is not lost:
            return
        if self._replacing is None or self._replacing.done():
            self._replacing = asyncio.create_task(asyncio.to_thread(find_again, self._find, lost, error))
        self._controller = await asyncio.shield(self._replacing)

    def publisher(self, bucket_bytes: int) -> AsyncRolloutClient:
        """A client that publishes weights, in pieces of so many bytes."""
        return AsyncRolloutClient(self._controller, bucket_bytes, find=self._find)

    async def close(self) -> None:
        """Abort everything."""
        for handle_id in list(self._running):
            self._abort(handle_id)
        self._tokens.close()
        self._calls.close()
        if self._telling is not None:
            self._telling.cancel()

    async def _complete(self, request: RolloutRequest, choice: Choice) -> None:
        handle_id = choice.stream_id
        try:
            choice.end(await self._surely(request, handle_id))
        except LongrollError as error:
            choice.fail(error)
        except Exception as error:  # whatever it is, somebody waits for the end of the choice
            logger.exception("completion %s failed", handle_id)
            choice.fail(error)
        finally:
            del self._running[handle_id]
            self._ending.discard(handle_id)

    async def _surely(self, request: RolloutRequest, handle_id: str) -> Any:
        for _ in range(MAX_TRIES - 1):
            with contextlib.suppress(ServiceLost):
                return await self.call("complete", request, self.client_id, handle_id)
            logger.warning("completion %s is asked for again, of another controller", handle_id)
        return await self.call("complete", request, self.client_id, handle_id)

    def _abort(self, handle_id: str) -> None:
        async def abort() -> None:
            with contextlib.suppress(LongrollError):  # it has ended meanwhile
                await self.call("abort", handle_id)

        self._ending.add(handle_id)
        task = asyncio.create_task(abort())
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)
