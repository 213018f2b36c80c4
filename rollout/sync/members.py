"""Which shards serve the live version, group by group.

Owns the set of serving ranks and the receivers of all ranks. Groups come and go whole: the ranks of
one wait for each other in every forward. Knows nothing of publications.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from rollout.errors import EngineDead
from rollout.sync.receivers import Receiver

logger = logging.getLogger(__name__)
OnDead = Callable[[frozenset[int], str], None]


class Members:
    """The shards of a fleet, all of them serving at first.

    Args:
        receivers: By rank.
        groups: Expert-parallel group of every rank.
        on_dead: Told which ranks serve no longer, and why, when a publication finds that out.
    """

    def __init__(
        self, receivers: Mapping[int, Receiver], groups: Mapping[int, int], on_dead: OnDead | None = None
    ) -> None:
        self._receivers = dict(receivers)
        self.groups = dict(groups)
        self._on_dead = on_dead
        self._serving = set(receivers)

    @property
    def serving(self) -> frozenset[int]:
        """Ranks that hold the live version; no others may be given requests."""
        return frozenset(self._serving)

    def receivers(self) -> dict[int, Receiver]:
        """Those of the serving ranks, in the order of ranks."""
        return {rank: self._receivers[rank] for rank in sorted(self._serving)}

    def waiting_beside(self, rank: int) -> dict[int, Receiver]:
        """Receivers of the ranks in `rank`'s group that do not serve."""
        group = self.groups[rank]
        return {
            other: receiver
            for other, receiver in self._receivers.items()
            if self.groups[other] == group and other not in self._serving
        }

    def lose(self, ranks: Iterable[int]) -> frozenset[int]:
        """Their groups serve no longer. Returns the ranks that served until now."""
        groups = {self.groups[rank] for rank in ranks}
        lost = frozenset(rank for rank in self._serving if self.groups[rank] in groups)
        self._serving -= lost
        return lost

    def give_up(self, ranks: Iterable[int], reason: str) -> None:
        """Like `lose`, and tell the owner of the fleet."""
        lost = self.lose(ranks)
        if not lost:
            return
        logger.error("shards %s serve no longer: %s", sorted(lost), reason)
        if self._on_dead is not None:
            self._on_dead(lost, reason)

    def note_deaths(self, faults: Mapping[int, BaseException]) -> None:
        """Give up those whose answer says that they are gone; other faults mean less."""
        dead = [rank for rank, fault in faults.items() if isinstance(fault, EngineDead)]
        if dead:
            self.give_up(dead, f"died in a publication: {faults[dead[0]]}")

    def replace(self, receivers: Mapping[int, Receiver]) -> None:
        """Shards were started anew; they serve once they were welcomed."""
        self.lose(receivers)
        self._receivers |= receivers

    def add(self, receivers: Mapping[int, Receiver], group: int) -> None:
        """A group that was not there before; it serves once it was welcomed."""
        self.groups |= dict.fromkeys(receivers, group)
        self.replace(receivers)

    def welcome(self, ranks: Iterable[int]) -> None:
        """They hold the live version."""
        self._serving |= set(ranks)
