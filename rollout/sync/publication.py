"""The publication of a weight version to a fleet: begin → stage … → commit, or abandon.

    IDLE ──begin──► STAGING ──stage(bucket)──► STAGING ──commit──► FLIPPING ──► IDLE (new version)
                       │ any fault: every receiver drops what it staged              │
                       └────────────────────────────► IDLE (old version)             │ a receiver failed
                                                                                     ▼
                                                                                  BROKEN
All tensors are checked by name, shape, dtype (begin) and digest (stage, on every receiver) before
the flip, so nothing that can be known to be wrong reaches a live weight. The flip runs in steps that
all receivers finish together: pause, apply, resume. If a receiver fails in the middle of it, part of
the fleet would hold other weights than the rest: generation then stays paused and the fleet is
BROKEN, which the controller treats as the death of its engines. No version mix is ever served.

Owns the version number and the state. Knows nothing of Ray or vLLM; receivers are coroutines.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import Enum
from typing import Protocol

from rollout.config import InFlight, SyncConfig
from rollout.errors import EngineDead, SyncRefused
from rollout.fleet import Rendezvous, SyncReport
from rollout.sync.manifest import BucketRef, TensorSpec, check_against

logger = logging.getLogger(__name__)


class Receiver(Protocol):
    """One shard, as the publisher sees it. Every call may raise; a raise means that it failed."""

    async def open_transport(self, rendezvous: Rendezvous, world_size: int) -> None: ...

    async def stage(self, ref: BucketRef) -> None: ...

    async def drop_stage(self, version: int) -> None: ...

    async def pause(self, mode: InFlight) -> None: ...

    async def apply(self, version: int) -> None: ...

    async def resume(self) -> None: ...


class State(str, Enum):
    """See the module's diagram."""

    IDLE = "idle"
    STAGING = "staging"
    FLIPPING = "flipping"
    BROKEN = "broken"


class Publisher:
    """Runs publications, one at a time.

    Args:
        receivers: The shards of the fleet.
        serving: Every tensor of the model by checkpoint name.
        config: Timeouts and the in-flight policy.
        live_version: Version served at the start.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        receivers: Sequence[Receiver],
        serving: Mapping[str, TensorSpec],
        config: SyncConfig,
        live_version: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._receivers = tuple(receivers)
        self._serving = serving
        self._config = config
        self._clock = clock
        self._live_version = live_version
        self._state = State.IDLE
        self._version: int | None = None
        self._attempt = 0  # publications begun; tells a late answer of an abandoned one from the open one
        self._pending: set[str] = set()
        self._num_bytes = 0
        self._began_at = 0.0
        self._staging_lock = asyncio.Lock()

    @property
    def live_version(self) -> int:
        return self._live_version

    @property
    def state(self) -> State:
        return self._state

    async def open_transport(self, rendezvous: Rendezvous, world_size: int) -> None:
        """Let every receiver join its sender's transport, for one that needs it; before `begin`.

        Args:
            rendezvous: Where the sender, rank 0, waits for them.
            world_size: The sender and every worker of every receiver.

        Raises:
            SyncRefused: A receiver could not join in time; the old version goes on serving.
            EngineDead: The fleet is broken.
        """
        self._check_not_broken()
        if self._state is State.FLIPPING:
            raise SyncRefused(f"transport: version {self._version} is being flipped at this moment")
        await self._drop()  # whoever was sending has been replaced
        await self._all("open_transport", lambda r: r.open_transport(rendezvous, world_size))

    async def begin(self, version: int, specs: Sequence[TensorSpec]) -> None:
        """Open a publication. One that was left unfinished is abandoned: its sender is gone.

        Args:
            version: Must exceed the live version.
            specs: Every tensor that will be sent.

        Raises:
            SyncRefused: The version is not newer, or the tensors are not those of the model.
            EngineDead: The fleet is broken.
        """
        self._check_not_broken()
        if self._state is State.FLIPPING:
            raise SyncRefused(f"version {version}: version {self._version} is being flipped at this moment")
        if version <= self._live_version:
            raise SyncRefused(f"version: got {version}, expected one above the live version {self._live_version}")
        check_against(self._serving, specs)
        if self._version is not None:
            logger.warning("publication of version %d was left unfinished; dropping it", self._version)
            await self._drop()
        self._state, self._version = State.STAGING, version
        self._attempt += 1
        self._pending = {spec.name for spec in specs}
        self._num_bytes, self._began_at = 0, self._clock()

    async def stage(self, ref: BucketRef) -> None:
        """Let every receiver copy and check a bucket.

        Raises:
            SyncRefused: A digest differs on some receiver, or the bucket does not belong here. The
                publication is over and the old version goes on serving.
        """
        self._expect(ref.version)
        attempt = self._attempt
        async with self._staging_lock:
            try:
                self._expect_attempt(ref.version, attempt)
                check_against(
                    {s.name: self._serving[s.name] for s in ref.tensors if s.name in self._serving}, ref.tensors
                )
                resent = [s.name for s in ref.tensors if s.name not in self._pending]
                if resent:
                    raise SyncRefused(f"bucket {ref.index} of version {ref.version}: {resent[0]} was staged before")
                await self._all("stage", lambda r: r.stage(ref))
                self._expect_attempt(ref.version, attempt)
            except SyncRefused:
                if attempt == self._attempt:
                    await self._drop()
                raise
            self._pending -= {s.name for s in ref.tensors}
            self._num_bytes += sum(s.num_bytes for s in ref.tensors)

    async def commit(self, version: int) -> SyncReport:
        """Flip every receiver to the staged version.

        Raises:
            SyncRefused: Something is missing, or a receiver could not be paused; old version serving.
            EngineDead: A receiver failed inside the flip; the fleet is broken and paused.
        """
        self._expect(version)
        if self._pending:
            missing = len(self._pending)
            example = min(self._pending)
            await self._drop()
            raise SyncRefused(f"version {version}: {missing} tensors were never staged, for example {example}")
        self._state = State.FLIPPING
        staged_at = self._clock()
        try:
            mode = self._config.in_flight
            await self._all("pause", lambda r: r.pause(mode), self._config.pause_timeout_s(mode))
        except SyncRefused:
            await self._resume_after_failed_pause()
            raise
        try:
            await self._all("apply", lambda r: r.apply(version))
            await self._all("resume", lambda r: r.resume())
        except SyncRefused as fault:
            self._state = State.BROKEN
            raise EngineDead(f"version {version}: failed inside the flip, generation stays paused: {fault}") from fault
        report = SyncReport(
            version=version,
            num_tensors=len(self._serving),
            num_bytes=self._num_bytes,
            stage_s=staged_at - self._began_at,
            stall_s=self._clock() - staged_at,
        )
        self._live_version, self._state, self._version = version, State.IDLE, None
        return report

    async def abandon(self, version: int) -> None:
        """Give up a publication; does nothing if it is not the open one."""
        if self._state is State.STAGING and version == self._version:
            await self._drop()

    def _expect(self, version: int) -> None:
        self._check_not_broken()
        if self._state is not State.STAGING or version != self._version:
            raise SyncRefused(
                f"version {version}: got a message while {self._state.value} "
                f"(open publication: {self._version}), expected begin() first"
            )

    def _expect_attempt(self, version: int, attempt: int) -> None:
        self._expect(version)
        if attempt != self._attempt:
            raise SyncRefused(f"version {version}: it was abandoned and begun again meanwhile")

    def _check_not_broken(self) -> None:
        if self._state is State.BROKEN:
            raise EngineDead("the fleet failed inside an earlier flip and must be restarted")

    async def _drop(self) -> None:
        version, self._version = self._version, None
        self._state = State.IDLE
        self._pending = set()
        if version is None:
            return
        results = await self._gather(lambda r: r.drop_stage(version))
        for result in results:
            if isinstance(result, BaseException):
                logger.warning("a shard could not drop version %d: %s", version, result)

    async def _resume_after_failed_pause(self) -> None:
        results = await self._gather(lambda r: r.resume())
        failed = [r for r in results if isinstance(r, BaseException)]
        await self._drop()
        if failed:
            self._state = State.BROKEN
            raise EngineDead(f"a shard could neither be paused nor resumed: {failed[0]}")

    async def _all(
        self, step: str, call: Callable[[Receiver], Awaitable[None]], timeout_s: float | None = None
    ) -> None:
        """Run one step on every receiver; raise SyncRefused unless all of them finished it."""
        timeout_s = timeout_s or self._config.timeout_s
        results = await self._gather(call, timeout_s)
        faults = [
            f"shard {rank}: {_said(fault, timeout_s)}"
            for rank, fault in enumerate(results)
            if isinstance(fault, BaseException)
        ]
        if faults:
            raise SyncRefused(f"{step} failed on {len(faults)} of {len(results)} shards: {'; '.join(faults)}")

    async def _gather(
        self, call: Callable[[Receiver], Awaitable[None]], timeout_s: float | None = None
    ) -> list[object]:
        limited = (asyncio.wait_for(call(r), timeout_s or self._config.timeout_s) for r in self._receivers)
        return list(await asyncio.gather(*limited, return_exceptions=True))


def _said(fault: BaseException, timeout_s: float) -> str:
    if isinstance(fault, TimeoutError):
        return f"no answer within {timeout_s:g} s"
    return str(fault) or type(fault).__name__
