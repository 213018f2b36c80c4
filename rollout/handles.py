"""What clients and the controller tell each other about a submission."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rollout.types import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutHandle:
    """A submission that was accepted: the key to its groups."""

    handle_id: str
    group_ids: tuple[str, ...]
    n_samples_per_prompt: int

    @property
    def num_groups(self) -> int:
        return len(self.group_ids)

    def in_order(self, groups: Iterable[Group]) -> list[Group]:
        """Groups of this submission in the order of its prompts."""
        place = {group_id: i for i, group_id in enumerate(self.group_ids)}
        return sorted(groups, key=lambda group: place[group.group_id])


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """Groups handed to the client; they stay with the controller until acknowledged.

    Attributes:
        groups: Finished groups, in the order in which they finished; empty when the wait ran out.
        is_done: No group will follow these.
    """

    groups: tuple[Group, ...]
    is_done: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a submission is. Trajectories are counted in one of the three states."""

    num_pending: int
    num_finished: int
    num_groups_finished: int
    num_groups: int
    num_tokens: int
