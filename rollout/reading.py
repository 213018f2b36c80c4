"""What a client has read of its submissions, and how it goes on after the service lost its memory.

Owns the acknowledgements that the controller has not heard of yet, and the groups that were seen: a controller
that took the place of another one delivers again what is durable. Knows nothing of how calls are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from rollout.handles import Delivery, RolloutHandle
from rollout.types import Group, RolloutRequest


@dataclass(slots=True, kw_only=True)
class Reading:
    """One submission, as its reader sees it.

    Attributes:
        handle: Under which the controller knows it now.
        request: To be made again when the controller has lost it; None for one without a run id.
        taken: Groups of the last delivery that the caller has had; acknowledged with the next call.
        seen: Groups that the caller has had from any controller.
    """

    handle: RolloutHandle
    request: RolloutRequest | None = None
    taken: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def again(self, handle: RolloutHandle) -> None:
        """The request was made again."""
        self.handle, self.taken = handle, []

    def new_groups(self, delivery: Delivery) -> Iterator[tuple[Group, bool]]:
        """Groups that the caller has not had, each counted as received; and whether it is the last of all."""
        self.taken = []
        for group in delivery.groups:
            self.taken.append(group.group_id)
            if group.group_id not in self.seen:
                self.seen.add(group.group_id)
                yield group, delivery.is_done and len(self.taken) == len(delivery.groups)


class Reader:
    """All submissions of one client, by the handle that its caller has."""

    def __init__(self) -> None:
        self._readings: dict[str, Reading] = {}

    def opened(self, handle: RolloutHandle, request: RolloutRequest) -> None:
        """A submission was accepted."""
        self._readings[handle.handle_id] = Reading(
            handle=handle, request=request if request.run_id is not None else None
        )

    def of(self, handle: RolloutHandle) -> Reading:
        """The submission of a handle; also of one that another client submitted."""
        return self._readings.setdefault(handle.handle_id, Reading(handle=handle))

    def forget(self, handle: RolloutHandle) -> None:
        self._readings.pop(handle.handle_id, None)
