"""A PostgreSQL database (or one schema of it) as the journal's: one session that holds the claim and does all writing.

The claim is an advisory lock of the session, so it ends with the connection, and a controller that was cut off cannot
write after another has taken over. Owns the session and the translation of PostgreSQL's errors. Knows nothing of the
tables.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import psycopg
from psycopg import errors as pg

from rollout.journal.errors import JournalBroken, JournalBusy, JournalError, JournalFull, JournalLost

RETRY_S = 0.05
CONNECT_TIMEOUT_S = 10
_CLAIM = 0x6C726A6C  # first half of the advisory lock's key; the second is of the schema
_SILENCE_S = 30  # a server that answers nothing for about so long is taken for gone


@lru_cache(maxsize=256)
def _placeholders(sql: str) -> str:
    return sql.replace("?", "%s")


class PostgresDatabase:
    """A session, used by one thread at a time.

    Args:
        dsn: postgresql://…; its `options` may choose a schema (search_path), and each schema is a journal of its own.
        synchronous: "full" = durable when answered, "normal" = the server may lose its last moments in a crash.
        is_writer: Claim the schema; a reader's session is read-only.
        wait_s: Longest wait for an owner that is going.

    Raises:
        JournalBusy, JournalLost: The schema is owned, or the server cannot be reached.
    """

    blob_type = "BYTEA"

    def __init__(self, dsn: str, *, synchronous: str = "full", is_writer: bool = True, wait_s: float = 0.0) -> None:
        self.name = "journal at a PostgreSQL server"
        with self._translated():
            self._connection = psycopg.connect(
                dsn,
                autocommit=True,
                connect_timeout=CONNECT_TIMEOUT_S,
                application_name=f"longroll process {os.getpid()} on {socket.gethostname()}"[:63],
                keepalives_idle=_SILENCE_S,
                tcp_user_timeout=_SILENCE_S * 1000,
            )
        info = self._connection.info
        self.name = f"journal {info.dbname} at {info.host}"
        try:
            schema = self.execute("SELECT current_schema()")[0][0]
            self.name += f", schema {schema}"
            if is_writer:
                self._claim(wait_s)
                self.execute(f"SET synchronous_commit = {'on' if synchronous == 'full' else 'off'}")
            else:
                self.execute("SET default_transaction_read_only = on")
        except BaseException:
            self.close()
            raise

    def _claim(self, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        key = "hashtext(current_schema())"
        while not self.execute(f"SELECT pg_try_advisory_lock({_CLAIM}, {key})")[0][0]:
            if time.monotonic() >= deadline:
                owners = self.execute(
                    "SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid "
                    "WHERE l.granted AND l.locktype = 'advisory' AND l.database = (SELECT oid FROM pg_database "
                    f"WHERE datname = current_database()) AND l.classid = {_CLAIM} AND "
                    f"l.objid::bigint = {key}::bigint & 4294967295"
                )
                owner = owners[0][0] if owners else "a session that has just ended"
                raise JournalBusy(f"{self.name}: got an owner, {owner}, expected none; stop it, or use another schema")
            time.sleep(RETRY_S)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except psycopg.Error as error:
            raise self._translate(error) from error

    def _translate(self, error: psycopg.Error) -> JournalError:
        text = " ".join(str(error).split())
        if isinstance(error, pg.DiskFull):
            return JournalFull(f"{self.name}: got {text}, expected room to grow; make room, later writes succeed")
        if isinstance(error, (pg.DataCorrupted, pg.IndexCorrupted)):
            return JournalBroken(
                f"{self.name}: got damaged data ({text}), expected sound ones; stop the service, see the server's log, "
                "and restore a backup or rebuild what it names"
            )
        return JournalLost(f"{self.name}: got {type(error).__name__}: {text}")

    def has_table(self, name: str) -> bool:
        sql = "SELECT 1 FROM pg_tables WHERE schemaname = current_schema() AND tablename = ?"
        return bool(self.execute(sql, (name,)))

    def execute(self, sql: str, parameters: Sequence[object] = ()) -> list[tuple]:
        with self._translated(), self._connection.cursor(binary=True) as cursor:
            cursor.execute(_placeholders(sql), parameters or None)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description is not None else []

    def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        with self._translated(), self._connection.cursor() as cursor:
            cursor.executemany(_placeholders(sql), rows)  # type: ignore[arg-type]

    def begin(self) -> None:
        self.execute("BEGIN")

    def commit(self) -> None:
        self.execute("COMMIT")

    def rollback(self) -> None:
        if not self._connection.closed:
            self.execute("ROLLBACK")

    def tidy(self) -> None:
        """Nothing: the server's autovacuum reuses the room of deleted rows."""

    def close(self) -> None:
        connection = getattr(self, "_connection", None)
        if connection is not None:
            connection.close()
