"""The journal's calls, inside transactions of whoever holds it. Blocking, and used by one thread at a time.

Every call checks before it writes, so one that raises leaves the transaction as it was and the others of the same
transaction may go on. Owns what each call writes. Knows nothing of threads, clocks, engines or schedulers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from rollout.journal import delivery
from rollout.journal.encoding import EncodedChunk, decode_payload
from rollout.journal.errors import JournalConflict
from rollout.journal.heads import Head, Heads
from rollout.journal.outcome import Outcome
from rollout.journal.reading import Reader
from rollout.journal.records import JournalCounts, RestoredGroup, TrajectoryKey
from rollout.journal.schema import Statements, migrate
from rollout.journal.submission import NewGroup, encode_groups
from rollout.types import RolloutRequest, Status

_INSERT_GROUP = (
    "INSERT INTO groups (group_key, run_id, group_id, handle_id, prompt_tokens, prompt, prompt_digest, request, "
    "digest, priority, num_pending) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_INSERT_TRAJECTORY = "INSERT INTO trajectories (group_key, sample_index, epoch, status) VALUES (?, ?, 0, ?)"
_INSERT_CHUNK = (
    "INSERT INTO chunks (group_key, sample_index, epoch, start, num_tokens, finish_reason, details, payload) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)


class Database(Statements, Protocol):
    """What a store needs of a database; see `sqlite` and `postgres`."""

    def execute_many(self, sql: str, rows: Sequence[Sequence[object]]) -> None: ...

    def tidy(self) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class Pending:
    """What the open transaction has yet to write, and what becomes true when it is durable."""

    chunks: list[tuple[object, ...]] = field(default_factory=list)
    num_chunks: int = 0
    num_tokens: int = 0
    num_bytes: int = 0


class Store:
    """Owns the database connection from here on.

    Raises:
        JournalTooNew: The database was written by a later version; it was not touched.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        migrate(database)
        self.reader = Reader(database)
        self.counts = JournalCounts()
        self._heads = Heads(database)
        self._pending = Pending()
        self._next_key, self._next_finish = self._numbers()

    def _numbers(self) -> tuple[int, int]:
        rows = self._database.execute("SELECT MAX(group_key), MAX(finish_order) FROM groups")
        return (rows[0][0] or 0) + 1, (rows[0][1] or 0) + 1

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is called inside becomes durable when it ends, or none of it if it raises."""
        self._database.begin()
        try:
            yield
            self._flush()
            self._database.commit()
        except BaseException:
            self._pending = Pending()
            self._heads.clear()
            self._database.rollback()
            raise
        done, self._pending = self._pending, Pending()
        self.counts.num_commits += 1
        self.counts.num_chunks += done.num_chunks
        self.counts.num_tokens += done.num_tokens
        self.counts.num_bytes += done.num_bytes

    def _flush(self) -> None:
        if self._pending.chunks:
            self._database.execute_many(_INSERT_CHUNK, self._pending.chunks)
            self._pending.chunks = []

    def submit(self, run_id: str, request: RolloutRequest, handle_id: str) -> list[RestoredGroup]:
        """Record the groups of a request that are new; see `Journal.submit`."""
        groups = encode_groups(run_id, request, handle_id)
        known = self.reader.group_keys(run_id, request.group_ids)
        for group in groups:
            if group.group_id in known:
                self._check_same(run_id, group, known[group.group_id])
        n_samples, fresh = request.n_samples_per_prompt, [g for g in groups if g.group_id not in known]
        keys = range(self._next_key, self._next_key + len(fresh))
        rows = [
            (key, run_id, g.group_id, handle_id, *g.columns, request.priority, n_samples)
            for key, g in zip(keys, fresh, strict=True)
        ]
        if rows:
            self._next_key += len(fresh)
            self._database.execute_many(_INSERT_GROUP, rows)
            members = [(key, i, Status.PENDING.value) for key in keys for i in range(n_samples)]
            self._database.execute_many(_INSERT_TRAJECTORY, members)
            for key, group in zip(keys, fresh, strict=True):
                self._heads.add(run_id, group.group_id, key, n_samples)
        if not known:
            return []
        sql = "UPDATE groups SET handle_id = ?, priority = ? WHERE group_key = ?"
        self._database.execute_many(sql, [(handle_id, request.priority, key) for key in known.values()])
        return self._restored(list(known.values()))

    def _restored(self, keys: list[int]) -> list[RestoredGroup]:
        self._flush()
        outlines = self.reader.load_outlines(keys)
        open_keys = [key for key, one in zip(keys, outlines, strict=True) if not one.is_acknowledged]
        loaded = iter(self.reader.load(open_keys))
        return [one if one.is_acknowledged else next(loaded) for one in outlines]

    def _check_same(self, run_id: str, group: NewGroup, key: int) -> None:
        sql = "SELECT prompt_digest, request FROM groups WHERE group_key = ?"
        prompt_digest, request = self._database.execute(sql, (key,))[0]
        what = f"group {group.group_id} of run {run_id}"
        group.check_same(what, prompt_digest, request)

    def append_chunk(self, key: TrajectoryKey, epoch: int, start: int, chunk: EncodedChunk) -> bool:
        """Record a chunk; see `Journal.append_chunk`."""
        head = self._heads.get(key)
        if epoch != head.epoch:
            raise JournalConflict(f"chunk of {key} at token {start}: got epoch {epoch}, expected {head.epoch}")
        if start < head.num_tokens:
            self._check_duplicate(key, head, start, chunk)
            self.counts.num_duplicates += 1
            return False
        if head.is_final or start != head.num_tokens:
            expected = "none after its end was recorded" if head.is_final else f"one at token {head.num_tokens}"
            raise JournalConflict(f"chunk of {key}: got one at token {start}, expected {expected}")
        place = (head.group_key, key.sample_index, epoch, start)
        columns = (chunk.num_tokens, chunk.finish_reason, chunk.details, chunk.payload)
        self._pending.chunks.append(place + columns)
        self._pending.num_chunks += 1
        self._pending.num_tokens += chunk.num_tokens
        self._pending.num_bytes += len(chunk.payload) + len(chunk.details)
        head.num_tokens += chunk.num_tokens
        return True

    def _check_duplicate(self, key: TrajectoryKey, head: Head, start: int, chunk: EncodedChunk) -> None:
        self._flush()
        rows = self._database.execute(
            "SELECT num_tokens, finish_reason, details, payload FROM chunks "
            "WHERE group_key = ? AND sample_index = ? AND epoch = ? AND start = ?",
            (head.group_key, key.sample_index, head.epoch, start),
        )
        what = f"chunk of {key} at token {start}"
        if not rows:
            raise JournalConflict(f"{what}: got an overlap, expected one at token {head.num_tokens}")
        stored = EncodedChunk(num_tokens=rows[0][0], finish_reason=rows[0][1], details=rows[0][2], payload=rows[0][3])
        decode_payload(what, (key, head.epoch, start), stored)
        if not chunk.says_the_same_as(stored):
            raise JournalConflict(
                f"{what}: got {chunk.num_tokens} tokens ending by {chunk.finish_reason}, expected the "
                f"{stored.num_tokens} ending by {stored.finish_reason} that are durable, with their values"
            )

    def finish(self, key: TrajectoryKey, epoch: int, outcome: Outcome) -> bool:
        """Record a trajectory's end; see `Journal.finish`."""
        head = self._heads.get(key)
        num_tokens = json.loads(outcome.rest)["num_tokens"]
        if (epoch, num_tokens) != (head.epoch, head.num_tokens):
            raise JournalConflict(
                f"end of {key}: got epoch {epoch} with {num_tokens} tokens, expected epoch {head.epoch} with the "
                f"{head.num_tokens} that are recorded"
            )
        if head.is_final:
            self._check_same_end(key, head, outcome)
            return False
        place = (head.group_key, key.sample_index)
        self._database.execute(
            "UPDATE trajectories SET status = ?, finish_reason = ?, reward = ?, outcome = ?, digest = ? "
            "WHERE group_key = ? AND sample_index = ?",
            (outcome.status, outcome.finish_reason, outcome.reward, outcome.rest, outcome.digest, *place),
        )
        self._database.execute(
            "UPDATE groups SET num_pending = num_pending - 1, finish_order = CASE WHEN num_pending = 1 THEN ? END "
            "WHERE group_key = ?",
            (self._next_finish, head.group_key),
        )
        self._next_finish += 1
        head.is_final = True
        return True

    def _check_same_end(self, key: TrajectoryKey, head: Head, outcome: Outcome) -> None:
        row: tuple[Any, ...] = self._database.execute(
            "SELECT status, finish_reason, reward, outcome, digest FROM trajectories "
            "WHERE group_key = ? AND sample_index = ?",
            (head.group_key, key.sample_index),
        )[0]
        if row[3] is None:
            raise JournalConflict(f"end of {key}: got one, expected none after its group was compacted")
        stored = Outcome(status=row[0], finish_reason=row[1], reward=row[2], rest=row[3], digest=row[4])
        if not outcome.says_the_same_as(stored):
            raise JournalConflict(
                f"end of {key}: got {outcome.status} with reward {outcome.reward}, expected {stored.status} with "
                f"reward {stored.reward} as recorded, for the same reason"
            )

    def restart(self, key: TrajectoryKey, epoch: int) -> bool:
        """Drop a trajectory's tokens; see `Journal.restart`."""
        head = self._heads.get(key)
        if epoch == head.epoch and head.num_tokens == 0:
            return False
        if head.is_final or epoch != head.epoch + 1:
            expected = "none after its end was recorded" if head.is_final else f"epoch {head.epoch + 1}"
            raise JournalConflict(f"restart of {key}: got epoch {epoch}, expected {expected}")
        self._flush()
        place = (head.group_key, key.sample_index)
        self._database.execute("DELETE FROM chunks WHERE group_key = ? AND sample_index = ?", place)
        sql = "UPDATE trajectories SET epoch = ? WHERE group_key = ? AND sample_index = ?"
        self._database.execute(sql, (epoch, *place))
        head.epoch, head.num_tokens = epoch, 0
        return True

    def lease(self, run_id: str, consumer: str, max_groups: int, lease_s: float, now: float) -> list[tuple[int, str]]:
        """Row and id of groups handed out; see `Journal.lease`."""
        self._flush()
        return delivery.lease(self._database, run_id, consumer, max_groups, lease_s, now)

    def acknowledge(self, run_id: str, group_ids: Sequence[str], checkpoint: str, now: float) -> int:
        """See `Journal.acknowledge`."""
        fresh = delivery.acknowledge(self._database, run_id, group_ids, checkpoint, now)
        for group_id in fresh:
            self._heads.forget(run_id, group_id)
        return len(fresh)

    def release(self, run_id: str, consumer: str) -> int:
        """See `Journal.release`."""
        return delivery.release(self._database, run_id, consumer)

    def compact_some(self, before: float) -> int:
        """See `delivery.compact_some`."""
        self._flush()
        return delivery.compact_some(self._database, before)

    def tidy(self) -> None:
        """Give room back to the disk. Outside transactions only."""
        self._database.tidy()

    def close(self) -> None:
        self._database.close()
