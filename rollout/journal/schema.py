"""The tables of a journal, as numbered migrations that every kind of database understands.

    groups        one row a group: what was asked for, how many trajectories are pending, lease, acknowledgement
    trajectories  one row a trajectory: its epoch, and how it ended
    chunks        one row a chunk of a trajectory's newest epoch: tokens, log-probabilities, versions, routing

A migration is never changed once released; append the next one. Owns the statements and the order in which they are
run. Knows nothing of what the columns mean.
"""

from __future__ import annotations

from typing import Protocol

from rollout.journal.errors import JournalTooNew

BLOB = "{blob}"
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        f"""CREATE TABLE groups (
            group_key BIGINT PRIMARY KEY,
            run_id TEXT NOT NULL,
            group_id TEXT NOT NULL,
            handle_id TEXT NOT NULL,
            prompt_tokens {BLOB} NOT NULL,
            prompt TEXT NOT NULL,
            prompt_digest TEXT NOT NULL,
            request TEXT NOT NULL,
            digest TEXT NOT NULL,
            priority BIGINT NOT NULL,
            num_pending BIGINT NOT NULL,
            UNIQUE (run_id, group_id))""",
        """CREATE TABLE trajectories (
            group_key BIGINT NOT NULL,
            sample_index BIGINT NOT NULL,
            epoch BIGINT NOT NULL,
            status TEXT NOT NULL,
            finish_reason TEXT,
            reward DOUBLE PRECISION,
            outcome TEXT,
            digest TEXT,
            PRIMARY KEY (group_key, sample_index))""",
        f"""CREATE TABLE chunks (
            group_key BIGINT NOT NULL,
            sample_index BIGINT NOT NULL,
            epoch BIGINT NOT NULL,
            start BIGINT NOT NULL,
            num_tokens BIGINT NOT NULL,
            finish_reason TEXT NOT NULL,
            details TEXT NOT NULL,
            payload {BLOB} NOT NULL,
            PRIMARY KEY (group_key, sample_index, epoch, start))""",
        "CREATE INDEX groups_unfinished ON groups (group_key) WHERE num_pending > 0",
    ),
    (
        "ALTER TABLE groups ADD COLUMN finish_order BIGINT",
        "ALTER TABLE groups ADD COLUMN lease_consumer TEXT",
        "ALTER TABLE groups ADD COLUMN lease_until DOUBLE PRECISION",
        "ALTER TABLE groups ADD COLUMN checkpoint_name TEXT",
        "ALTER TABLE groups ADD COLUMN acknowledged_at DOUBLE PRECISION",
        "ALTER TABLE groups ADD COLUMN is_compacted BIGINT NOT NULL DEFAULT 0",
        "UPDATE groups SET finish_order = group_key WHERE num_pending = 0",
        "CREATE INDEX groups_deliverable ON groups (run_id, finish_order) "
        "WHERE finish_order IS NOT NULL AND checkpoint_name IS NULL",
        "CREATE INDEX groups_retained ON groups (acknowledged_at) "
        "WHERE acknowledged_at IS NOT NULL AND is_compacted = 0",
    ),
)
NEWEST = len(MIGRATIONS)


class Statements(Protocol):
    """What is needed of a database here."""

    name: str
    blob_type: str

    def execute(self, sql: str, parameters: tuple[object, ...] = ()) -> list[tuple]: ...

    def has_table(self, name: str) -> bool: ...

    def begin(self) -> None: ...

    def commit(self) -> None: ...

    def rollback(self) -> None: ...


def version_of(database: Statements) -> int:
    """Number of the last migration that was applied; 0 for an empty database.

    Raises:
        JournalTooNew: This program does not know it.
    """
    if not database.has_table("schema_version"):
        return 0
    version = int(database.execute("SELECT version FROM schema_version")[0][0])
    if version > NEWEST:
        raise JournalTooNew(
            f"{database.name} schema: got version {version}, expected at most {NEWEST}; "
            "open it with the Longroll that wrote it, or a later one"
        )
    return version


def migrate(database: Statements, target: int = NEWEST) -> int:
    """Apply what is missing up to `target`, all in one transaction. Returns the version found."""
    found = version_of(database)
    if found >= target:
        return found
    database.begin()
    try:
        if found == 0:
            database.execute("CREATE TABLE schema_version (version BIGINT NOT NULL)")
            database.execute("INSERT INTO schema_version (version) VALUES (0)")
        for statements in MIGRATIONS[found:target]:
            for sql in statements:
                database.execute(sql.replace(BLOB, database.blob_type))
        database.execute("UPDATE schema_version SET version = ?", (target,))
        database.commit()
    except BaseException:
        database.rollback()
        raise
    return found
