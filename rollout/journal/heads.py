"""Where each trajectory stands: what the next write must fit. A cache in front of the database.

The journal has one writer, so what is here agrees with the database as long as no transaction fails; then all of it is
forgotten and read again when needed. Knows nothing of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rollout.errors import InvalidRequest
from rollout.journal.records import TrajectoryKey
from rollout.journal.schema import Statements
from rollout.types import Status


@dataclass(slots=True)
class Head:
    """The end of one trajectory.

    Attributes:
        group_key: Its group's row.
        epoch: The current one.
        num_tokens: Durable tokens of that epoch.
        is_final: Its end is recorded.
    """

    group_key: int
    epoch: int
    num_tokens: int
    is_final: bool


class Heads:
    """The heads of groups under way."""

    def __init__(self, database: Statements) -> None:
        self._database = database
        self._groups: dict[tuple[str, str], list[Head]] = {}

    def get(self, key: TrajectoryKey) -> Head:
        """Raises InvalidRequest for a trajectory that was never submitted."""
        members = self._groups.get((key.run_id, key.group_id))
        if members is None:
            members = self._groups[key.run_id, key.group_id] = self._read(key)
        if not 0 <= key.sample_index < len(members):
            raise InvalidRequest("sample index", key.sample_index, f"one of {len(members)} of group {key.group_id}")
        return members[key.sample_index]

    def add(self, run_id: str, group_id: str, group_key: int, num_samples: int) -> None:
        """A group was submitted."""
        members = [Head(group_key=group_key, epoch=0, num_tokens=0, is_final=False) for _ in range(num_samples)]
        self._groups[run_id, group_id] = members

    def forget(self, run_id: str, group_id: str) -> None:
        self._groups.pop((run_id, group_id), None)

    def clear(self) -> None:
        self._groups.clear()

    def _read(self, key: TrajectoryKey) -> list[Head]:
        rows: list[tuple[Any, ...]] = self._database.execute(
            "SELECT g.group_key, t.epoch, t.status, (SELECT MAX(c.start + c.num_tokens) FROM chunks c WHERE "
            "c.group_key = t.group_key AND c.sample_index = t.sample_index AND c.epoch = t.epoch) "
            "FROM groups g JOIN trajectories t ON t.group_key = g.group_key "
            "WHERE g.run_id = ? AND g.group_id = ? ORDER BY t.sample_index",
            (key.run_id, key.group_id),
        )
        if not rows:
            raise InvalidRequest("group", f"{key.group_id} of run {key.run_id}", "one that was submitted")
        return [
            Head(group_key=group, epoch=epoch, num_tokens=end or 0, is_final=status != Status.PENDING.value)
            for group, epoch, status, end in rows
        ]
