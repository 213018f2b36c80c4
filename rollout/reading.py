"""What a client has read of its submissions, and how it goes on after the service lost its memory.

Owns the acknowledgements that the controller has not heard of yet, and the groups that were seen: of a controller
that took the place of another one only the rest is asked for again, and comes back as far as it is durable. Knows
nothing of how calls are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

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
        is_aborted: The caller gave up what is unfinished.
    """

    handle: RolloutHandle
    request: RolloutRequest | None = None
    taken: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    is_aborted: bool = False

    def missing(self) -> RolloutRequest | None:
        """The request for what the caller has not had, of a submission that can be made again; None for nothing.

        The groups that it has had may be learned from by now, and are not to be asked for again.
        """
        assert self.request is not None, "only a request with a run id can be made again"
        if self.is_aborted:
            return None
        places = [place for place, group_id in enumerate(self.request.group_ids) if group_id not in self.seen]
        if not places:
            return None
        return replace(
            self.request,
            prompts=tuple(self.request.prompts[place] for place in places),
            group_ids=tuple(self.request.group_ids[place] for place in places),
        )

    def again(self, handle: RolloutHandle) -> None:
        """What was missing was asked for again."""
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
