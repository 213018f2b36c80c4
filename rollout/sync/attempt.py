"""One attempt to publish a version: which pieces are still to come, and what has travelled.

Owns the books of an attempt. Knows nothing of shards' answers or of when an attempt is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from rollout.errors import SyncRefused
from rollout.fleet import SyncReport
from rollout.sync.manifest import BucketRef, Piece
from rollout.sync.receivers import Receiver


@dataclass(slots=True, kw_only=True, eq=False)
class Attempt:
    """A publication under way.

    Attributes:
        number, version, base: As in BucketRef.
        receivers: The shards that take part, by rank: those that served when it began.
        pending: Pieces that have not come, with their senders.
        began_at: Seconds on the publisher's clock.
        staged_at: When the last bucket was staged everywhere.
        staging: Every bucket that came, by sender and index, and its staging on all shards.
        num_bytes: Payload bytes staged so far.
        num_rows: Rows that travelled in them.
        end_reason: Why it ended before its decision, if it did; senders whose calls come later are told.
    """

    number: int
    version: int
    base: int | None
    receivers: Mapping[int, Receiver]
    pending: set[tuple[int, Piece]]
    began_at: float
    staged_at: float
    staging: dict[tuple[int, int], tuple[BucketRef, asyncio.Task[None]]] = field(default_factory=dict)
    num_bytes: int = 0
    num_rows: int = 0
    end_reason: str | None = None

    def find(self, ref: BucketRef) -> asyncio.Task[None] | None:
        """Staging of a bucket that came before; None for a new one.

        Raises:
            SyncRefused: Another bucket had its number.
        """
        known = self.staging.get((ref.sender, ref.index))
        if known is None:
            return None
        if known[0] != ref:
            raise SyncRefused(f"{ref}: another bucket of that number came before")
        return known[1]

    def admit(self, ref: BucketRef) -> None:
        """Strike the bucket's pieces off the list of those to come.

        Raises:
            SyncRefused: It is not one of this attempt, or a piece is not expected (any more); nothing changes.
        """
        if ref.base != self.base:
            raise SyncRefused(f"{ref}: got base {ref.base}, expected {self.base}")
        pieces = [(ref.sender, entry.piece) for entry in ref.entries]
        unexpected = next((piece for sender, piece in pieces if (sender, piece) not in self.pending), None)
        if unexpected is not None:
            raise SyncRefused(f"{ref}: {unexpected} was staged before, or not announced by this sender")
        if len(set(pieces)) != len(pieces):
            raise SyncRefused(f"{ref}: got a piece twice in it")
        self.pending.difference_update(pieces)

    def count(self, ref: BucketRef, now: float) -> None:
        """A bucket is staged on every shard."""
        self.num_bytes += ref.num_bytes
        self.num_rows += sum(entry.num_changed for entry in ref.entries)
        self.staged_at = now

    def report(
        self, *, num_tensors: int, num_bytes_full: int, flip_s: float, stall_s: float, ranks_lost: tuple[int, ...]
    ) -> SyncReport:
        """What its sender is told once it is live; arguments as in SyncReport."""
        return SyncReport(
            version=self.version,
            num_tensors=num_tensors,
            num_bytes=self.num_bytes,
            num_bytes_full=num_bytes_full,
            num_rows_changed=self.num_rows,
            stage_s=self.staged_at - self.began_at,
            flip_s=flip_s,
            stall_s=stall_s,
            ranks_lost=ranks_lost,
        )

    def check_complete(self) -> None:
        """Raises SyncRefused unless every piece is staged on every shard."""
        under_way = [ref for ref, task in self.staging.values() if not task.done()]
        if self.pending:
            sender, piece = min(self.pending, key=lambda item: (item[1].name, item[1].first_row))
            raise SyncRefused(
                f"version {self.version}: {len(self.pending)} pieces were never staged, "
                f"for example {piece} of sender {sender}"
            )
        if under_way:
            raise SyncRefused(f"version {self.version}: got the commit while {under_way[0]} was being staged")
