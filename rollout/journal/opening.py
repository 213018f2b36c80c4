"""From a DSN to a journal that is claimed, checked and migrated, or to a reader beside its owner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rollout.config import JournalConfig
from rollout.errors import InvalidRequest
from rollout.journal.journal import Journal
from rollout.journal.reading import Reader
from rollout.journal.schema import NEWEST, version_of
from rollout.journal.sqlite import SqliteDatabase
from rollout.journal.store import Database, Store

SQLITE = "sqlite:///"
POSTGRES = ("postgresql://", "postgres://")


def open_journal(config: JournalConfig) -> Journal:
    """Open a journal for writing, creating it if it is not there.

    Raises:
        InvalidRequest: A DSN of no known kind.
        JournalBusy: Another process owns it, and did not go within `owner_wait_s`.
        JournalBroken: Its file is damaged.
        JournalTooNew: A later version of Longroll wrote it.
        JournalLost: Its server cannot be reached.
    """
    return Journal(open_store(config), group_commit_s=config.group_commit_ms / 1000, retention_s=config.retention_s)


def open_store(config: JournalConfig) -> Store:
    """The blocking calls alone; raises as `open_journal` does."""
    database = open_database(config, is_writer=True)
    try:
        return Store(database)
    except BaseException:
        database.close()
        raise


@contextmanager
def open_reader(config: JournalConfig) -> Iterator[Reader]:
    """Read a journal, also while its owner writes it; nothing is claimed or changed.

    Raises:
        InvalidRequest: No journal is there, or its schema is older than this program's; its owner migrates it.
        JournalBroken, JournalTooNew, JournalLost: As in `open_journal`.
    """
    database = open_database(config, is_writer=False)
    try:
        found = version_of(database)
        if found != NEWEST:
            raise InvalidRequest(database.name, f"schema version {found}", f"{NEWEST}; open it for writing once")
        yield Reader(database)
    finally:
        database.close()


def open_database(config: JournalConfig, *, is_writer: bool) -> Database:
    """The database alone, with whatever schema it has; raises as `open_journal` does, but for JournalTooNew."""
    dsn = config.dsn
    if dsn is None:
        return SqliteDatabase(None)
    if dsn.startswith(SQLITE) and len(dsn) > len(SQLITE):
        return SqliteDatabase(
            Path(dsn.removeprefix(SQLITE)),
            synchronous=config.synchronous,
            is_writer=is_writer,
            wait_s=config.owner_wait_s,
            check=config.check_on_open and is_writer,
        )
    if dsn.startswith(POSTGRES):
        from rollout.journal.postgres import PostgresDatabase  # its driver is loaded only where it is used

        return PostgresDatabase(dsn, synchronous=config.synchronous, is_writer=is_writer, wait_s=config.owner_wait_s)
    raise InvalidRequest("journal.dsn", dsn, f"{SQLITE}path, postgresql://…, or null for none")
