"""Where a trainer's publications go, as its ranks see it, and the controller actor in that place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle

from rollout.errors import ServiceLost, SyncRefused
from rollout.fleet import CONTROLLER_NAME, Rendezvous, SyncReport
from rollout.remote import client_error, find_again
from rollout.sync.manifest import BucketRef, Piece


class Receiver(Protocol):
    """Every call returns when it is done, or raises. Only `stage` and `abandon` are called by all ranks."""

    def live_version(self) -> int: ...

    def num_workers(self) -> int: ...

    def open_transport(self, rendezvous: Rendezvous, world_size: int) -> None: ...

    def begin(self, version: int, base: int | None, pieces: Sequence[tuple[int, Piece]]) -> int: ...

    def stage(self, ref: BucketRef, payload: Sequence[Any] = ()) -> None: ...

    def commit(self, version: int) -> SyncReport: ...

    def remember(self, version: int, refs: Sequence[BucketRef]) -> None: ...

    def abandon(self, version: int) -> None: ...


class ControllerReceiver:
    """The controller actor as a Receiver; its errors are raised in their own class.

    Args:
        controller: Its handle.
        timeout_s: Longest wait for one call; more than the controller's own limits add up to, so that
            it is never taken for dead while it is still at it.
    """

    def __init__(self, controller: ActorHandle, timeout_s: float) -> None:
        self._controller = controller
        self._find = partial(ray.get_actor, CONTROLLER_NAME)
        self._timeout_s = timeout_s

    def live_version(self) -> int:
        version: int = self._get(self._controller.live_version.remote())
        return version

    def num_workers(self) -> int:
        num_workers: int = self._get(self._controller.num_workers.remote())
        return num_workers

    def open_transport(self, rendezvous: Rendezvous, world_size: int) -> None:
        self._get(self._controller.open_transport.remote(rendezvous, world_size))

    def begin(self, version: int, base: int | None, pieces: Sequence[tuple[int, Piece]]) -> int:
        attempt: int = self._get(self._controller.begin_publish.remote(version, base, pieces))
        return attempt

    def stage(self, ref: BucketRef, payload: Sequence[Any] = ()) -> None:
        self._get(self._controller.publish_bucket.remote(ref, payload))

    def commit(self, version: int) -> SyncReport:
        report: SyncReport = self._get(self._controller.commit_publish.remote(version))
        return report

    def remember(self, version: int, refs: Sequence[BucketRef]) -> None:
        self._get(self._controller.remember_snapshot.remote(version, refs))

    def abandon(self, version: int) -> None:
        self._get(self._controller.abandon_publish.remote(version))

    def _get(self, reference: Any) -> Any:
        try:
            return ray.get(reference, timeout=self._timeout_s)
        except Exception as error:  # every error is passed on
            known = client_error(error)
            if isinstance(known, ServiceLost):
                self._controller = find_again(self._find, self._controller, known)
                raise SyncRefused("the controller died during a publication; another one has taken its place") from None
            if known is error:
                raise
            raise known from None
