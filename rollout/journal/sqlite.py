"""One SQLite file as the journal's database: WAL, one writer, claimed by a lock that dies with its process.

Owns the connection, the claim and the translation of SQLite's errors. Knows nothing of the tables. The file must be on
a local disk: SQLite's WAL does not work over network file systems.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rollout.errors import InvalidRequest
from rollout.journal.errors import JournalBroken, JournalBusy, JournalError, JournalFull, JournalLost

PAGE_BYTES = 8192
WAL_PAGES = 4096  # checkpoint after 32 MiB, so that a page written twice meanwhile reaches the file once
CACHE_KIB = 65536
VACUUM_PAGES = 2048  # pages given back in one step of tidying, which others wait for
RETRY_S = 0.05
_BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
# A quota or a file-size limit (EDQUOT, EFBIG) is reported as a write error, a full disk as SQLITE_FULL.
_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE}


class FileClaim:
    """The right to write a journal file, held by `<file>.lock` until closed or the process ends, however it ends."""

    def __init__(self, path: Path, wait_s: float) -> None:
        """Raises JournalBusy, which names the owner, if the claim is not free within `wait_s` seconds."""
        self._file = open(path.with_name(path.name + ".lock"), "a+")
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    owner = self._owner()
                    self._file.close()
                    raise JournalBusy(
                        f"journal {path}: got an owner, {owner}, expected none; stop it, or use another file"
                    ) from None
                time.sleep(RETRY_S)
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        self._file.flush()

    def _owner(self) -> str:
        self._file.seek(0)
        try:
            record = json.loads(self._file.read())
            return f"process {record['pid']} on {record['host']}"
        except (ValueError, KeyError, TypeError):
            return "a process that has not written its name yet"

    def close(self) -> None:
        self._file.close()


class SqliteDatabase:
    """A connection, used by one thread at a time.

    Args:
        path: The file; None keeps everything in memory, where nothing is durable.
        synchronous: "full" survives a power cut, "normal" the death of the process.
        is_writer: Claim the file and create it if missing; a reader does neither.
        wait_s: Longest wait for an owner that is going.
        check: Look through the whole file for damage first.

    Raises:
        JournalBusy, JournalBroken, JournalLost: The file is owned, damaged, or cannot be opened.
    """

    blob_type = "BLOB"

    def __init__(
        self,
        path: Path | None,
        *,
        synchronous: str = "full",
        is_writer: bool = True,
        wait_s: float = 0.0,
        check: bool = True,
    ) -> None:
        self.name = f"journal {path}" if path is not None else "journal in memory"
        self._path, self._claim = path, None
        if path is not None and is_writer:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._claim = FileClaim(path, wait_s)
        try:
            self._connection = self._connect(is_writer)
            with self._translated():
                if path is not None and is_writer:
                    self._set_up(synchronous)
                if path is not None and check:
                    self._check()
        except BaseException:
            self.close()
            raise

    def _connect(self, is_writer: bool) -> sqlite3.Connection:
        if self._path is None:
            return sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        if not is_writer and not self._path.is_file():
            raise InvalidRequest("journal", str(self._path), "a file that exists")
        uri = f"{self._path.absolute().as_uri()}?mode={'rwc' if is_writer else 'ro'}"
        with self._translated():
            return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, cached_statements=256)

    def _set_up(self, synchronous: str) -> None:
        connection = self._connection
        connection.execute("PRAGMA busy_timeout = 10000")  # a reader may be recovering the log of a killed writer
        if connection.execute("PRAGMA page_count").fetchone()[0] == 0:  # kept by the file from then on
            connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {synchronous.upper()}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")

    def _check(self) -> None:
        """The full check, since a damaged index would let a group in twice; it reads the whole file."""
        faults = [row[0] for row in self._connection.execute("PRAGMA integrity_check(3)").fetchall()]
        if faults != ["ok"]:
            raise self._broken("; ".join(" ".join(fault.split()) for fault in faults))

    def _broken(self, fault: str) -> JournalBroken:
        return JournalBroken(
            f"{self.name}: got a damaged file ({fault}), expected a sound one; stop the service, keep copies of the "
            f"file and its -wal, and restore a backup or salvage it with: sqlite3 {self._path} .recover"
        )

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._translate(error) from error

    def _translate(self, error: sqlite3.Error) -> JournalError:
        code = getattr(error, "sqlite_errorcode", 0)
        if code in _FULL or code & 0xFF == sqlite3.SQLITE_FULL:
            room = (
                "" if self._path is None else f", {shutil.disk_usage(self._path.parent).free:,} bytes free on its disk"
            )
            return JournalFull(
                f"{self.name}: got {error}{room}, expected room to grow; make room, later writes succeed"
            )
        if code & 0xFF in _BROKEN or "decode to UTF-8" in str(error):  # the driver's own error has no code
            return self._broken(str(error))
        return JournalLost(f"{self.name}: got {getattr(error, 'sqlite_errorname', 'an error')}: {error}")

    def has_table(self, name: str) -> bool:
        return bool(self.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (name,)))

    def execute(self, sql: str, parameters: Sequence[object] = ()) -> list[tuple]:
        with self._translated():
            return self._connection.execute(sql, parameters).fetchall()

    def execute_many(self, sql: str, rows: Sequence[Sequence[object]]) -> None:
        with self._translated():
            self._connection.executemany(sql, rows)

    def begin(self) -> None:
        self.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self.execute("COMMIT")

    def rollback(self) -> None:
        if self._connection.in_transaction:  # some errors have ended it already
            self.execute("ROLLBACK")

    def tidy(self) -> None:
        """Give the pages of deleted rows back to the disk, and empty the log, as far as readers allow."""
        if self._path is None:
            return
        while self.execute("PRAGMA freelist_count")[0][0]:
            before = self.execute("PRAGMA freelist_count")[0][0]
            self.execute(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")
            if self.execute("PRAGMA freelist_count")[0][0] >= before:
                break
        self.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        connection = getattr(self, "_connection", None)
        if connection is not None:
            connection.close()
        if self._claim is not None:
            self._claim.close()
