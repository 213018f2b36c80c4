"""Killed writers, full disks, damaged files, second writers, other schemas: a clear error, and nothing durable lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from rollout.config import JournalConfig
from rollout.journal.errors import JournalBroken, JournalBusy, JournalFull, JournalLost, JournalTooNew
from rollout.journal.journal import Journal
from rollout.journal.opening import open_database, open_journal, open_reader, open_store
from rollout.journal.records import RestoredGroup
from rollout.journal.schema import NEWEST, migrate, version_of
from rollout.scheduler.intake import make_group
from tests.rollout.journal_cases import chunk_of, config_of, ended, key_of, member, request_of
from tests.rollout.journal_child import CHUNK_TOKENS, FILE_BYTES, NUM_SAMPLES, seed_of

ROOT = Path(__file__).resolve().parents[2]
NUM_DAMAGES = 100


@contextlib.contextmanager
def child(mode: str, dsn: str) -> Iterator[subprocess.Popen[str]]:
    """The child process; killed at the end if it is still there."""
    command = [sys.executable, "-m", "tests.rollout.journal_child", mode, dsn]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the child ended early"
    return line


def read_all(config: JournalConfig, run_id: str = "run") -> list[RestoredGroup]:
    with open_reader(config) as reader:
        return reader.load(reader.run_keys(run_id))


def write(config: JournalConfig, *group_ids: str, chunk_tokens: int = 300) -> None:
    """Groups with a finished trajectory and a partial one each."""

    async def whole() -> None:
        async with open_journal(config) as journal:
            request = request_of(*group_ids)
            await journal.submit("run", request, "h")
            for place, group_id in enumerate(group_ids):
                chunks = [chunk_of(chunk_tokens, 2 * place), chunk_of(chunk_tokens, 2 * place + 1)]
                for i in range(2):
                    await journal.append_chunk(key_of(group_id, i), 0, 0, chunks[0])
                    await journal.append_chunk(key_of(group_id, i), 0, chunk_tokens, chunks[1])
                one = ended(member(make_group(request, place), 0, chunks))
                await journal.finish(key_of(group_id), 0, one)

    asyncio.run(whole())


def test_what_was_answered_survives_sigkill(dsn: str) -> None:
    draw = random.Random(5)
    answered: set[tuple[int, int]] = set()
    for _ in range(4):
        with child("write", dsn) as process:
            for _ in range(draw.randrange(1, 120)):
                sample, start = map(int, next_line(process).split())
                answered.add((sample, start))
            process.send_signal(signal.SIGKILL)  # in the middle of whatever it is doing
            assert process.stdout is not None
            rest = process.stdout.read()
            complete = rest[: rest.rfind("\n") + 1]
            answered |= {(int(a), int(b)) for a, b in map(str.split, complete.splitlines())}
        with contextlib.closing(open_store(config_of(dsn, owner_wait_s=20.0))) as store:
            (group,) = store.reader.load(store.reader.unfinished_keys())
        stops = [one.num_tokens for one in group.trajectories]
        assert all(start < stops[sample] for sample, start in answered)
        for sample, trajectory in enumerate(group.to_group().trajectories):
            starts = range(0, stops[sample], CHUNK_TOKENS)
            expected = [chunk_of(CHUNK_TOKENS, seed_of(sample, start)) for start in starts]
            twin = member(make_group(request_of("a", n=NUM_SAMPLES), 0), sample, expected)
            assert trajectory == twin


def test_a_full_disk_is_said_and_survived(tmp_path: Path) -> None:
    config = config_of(f"sqlite:///{tmp_path / 'journal.db'}")
    assert config.dsn is not None
    with child("full", config.dsn) as process:
        outcome = json.loads(next_line(process))
        assert process.wait() == 0
    assert f"{tmp_path / 'journal.db'}" in outcome["error"] and "expected room" in outcome["error"]
    assert 0 < outcome["before"] < FILE_BYTES / 8, "8 bytes a token, besides what SQLite adds"
    (group,) = read_all(config)
    assert group.trajectories[0].num_tokens == outcome["after"] == outcome["before"] + 3 * CHUNK_TOKENS


def test_a_full_server_is_said_and_survived(postgres: str, fresh_schema_dsn: Callable[[], str]) -> None:
    """The server's own error for a full disk, raised by a trigger while a switch is on."""
    dsn = fresh_schema_dsn()

    async def use(journal: Journal, server: psycopg.Connection) -> None:
        await journal.submit("run", request_of("a"), "h")
        await journal.append_chunk(key_of("a"), 0, 0, chunk_of(5))
        server.execute("CREATE TABLE switch AS SELECT 1 AS is_full")
        server.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF EXISTS (SELECT 1 FROM switch) "
            "THEN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END IF; RETURN NEW; END $$"
        )
        server.execute("CREATE TRIGGER refuse BEFORE INSERT ON chunks FOR EACH ROW EXECUTE FUNCTION refuse()")
        with pytest.raises(JournalFull, match="could not extend file"):
            await journal.append_chunk(key_of("a"), 0, 5, chunk_of(6, 1))
        server.execute("DELETE FROM switch")
        assert await journal.append_chunk(key_of("a"), 0, 5, chunk_of(6, 1))

    async def whole() -> None:
        async with open_journal(config_of(dsn)) as journal:
            with psycopg.connect(dsn, autocommit=True) as server:
                await use(journal, server)

    asyncio.run(whole())
    assert read_all(config_of(dsn))[0].trajectories[0].num_tokens == 11


def test_a_lost_session_is_said_and_its_claim_is_free(fresh_schema_dsn: Callable[[], str], postgres: str) -> None:
    dsn = fresh_schema_dsn()

    async def whole() -> None:
        async with open_journal(config_of(dsn)) as journal:
            await journal.submit("run", request_of("a"), "h")
            await journal.append_chunk(key_of("a"), 0, 0, chunk_of(5))
            with psycopg.connect(postgres, autocommit=True) as server:
                server.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'longroll %'"
                )
            async with open_journal(config_of(dsn, owner_wait_s=20.0)) as successor:
                for _ in range(2):
                    with pytest.raises(JournalLost, match="schema"):
                        await journal.append_chunk(key_of("a"), 0, 5, chunk_of(5, 1))
                assert await successor.append_chunk(key_of("a"), 0, 5, chunk_of(6, 2))

    asyncio.run(whole())
    assert read_all(config_of(dsn))[0].trajectories[0].num_tokens == 11


def test_a_damaged_file_never_gives_wrong_records(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    config = config_of(f"sqlite:///{path}")
    write(config, *(f"g{i}" for i in range(3)), chunk_tokens=2000)
    sound, expected = path.read_bytes(), [group.to_group() for group in read_all(config)]
    draw, num_refused = random.Random(0), 0
    for _ in range(NUM_DAMAGES):
        place = draw.randrange(len(sound) - 8)
        path.write_bytes(sound[:place] + bytes(b ^ 0x55 for b in sound[place : place + 8]) + sound[place + 8 :])
        try:
            with contextlib.closing(open_store(config)) as store:
                got = store.reader.load(store.reader.run_keys("run"))
        except JournalBroken as error:
            assert "damaged" in str(error) and ("restore" in str(error))
            num_refused += 1
        else:
            assert [group.to_group() for group in got] == expected, f"byte {place}"
    # Any damage to a chunk's 8 bytes a token is seen; four standard deviations below that share of the trials.
    share = 8 * sum(len(t.token_ids) for group in expected for t in group.trajectories) / len(sound)
    assert num_refused > NUM_DAMAGES * share - 4 * (NUM_DAMAGES * share * (1 - share)) ** 0.5 > 0
    path.write_bytes(sound)
    assert [group.to_group() for group in read_all(config)] == expected, "damage is reported, never repaired silently"


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(b"not a database, but somebody's text " * 1000)
    before = path.read_bytes()
    with pytest.raises(JournalBroken, match=r"journal\.db: got a damaged file .* sqlite3 .* \.recover"):
        open_store(config_of(f"sqlite:///{path}"))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE chunks SET payload = decode(md5('x'), 'hex') WHERE start = 0",
        "UPDATE chunks SET details = replace(details, '1.7', '1.8')",
        "UPDATE chunks SET finish_reason = 'stop' WHERE start = 0",
        "DELETE FROM chunks WHERE start = 0",
        "UPDATE trajectories SET reward = 0.75 WHERE sample_index = 0",
        "DELETE FROM trajectories WHERE sample_index = 1",
        "UPDATE groups SET prompt = replace(prompt, 'sum', 'sam')",
        "UPDATE groups SET request = replace(request, '64', '65')",
    ],
)
def test_damaged_rows_are_named(fresh_schema_dsn: Callable[[], str], damage: str) -> None:
    dsn = fresh_schema_dsn()
    write(config_of(dsn), "g0", chunk_tokens=5)
    with psycopg.connect(dsn, autocommit=True) as server:
        assert server.execute(damage.encode()).rowcount > 0
    with pytest.raises(JournalBroken, match=r"of (trajectory g0/[01] of )?run run"):
        read_all(config_of(dsn))


def test_damage_met_in_a_transaction_fails_its_own_call_only(fresh_schema_dsn: Callable[[], str]) -> None:
    dsn = fresh_schema_dsn()

    async def whole() -> None:
        async with open_journal(config_of(dsn, group_commit_ms=200.0)) as journal:
            await journal.submit("run", request_of("a", n=1), "h")
            await journal.submit("run", request_of("b", n=1), "h")
            await journal.append_chunk(key_of("a"), 0, 0, chunk_of(5))
            one = ended(member(make_group(request_of("a", n=1), 0), 0, [chunk_of(5)]))
            await journal.finish(key_of("a"), 0, one)
            with psycopg.connect(dsn, autocommit=True) as server:
                server.execute("UPDATE trajectories SET reward = 0.75 WHERE group_key = 1")
                calls = (
                    journal.append_chunk(key_of("b"), 0, 0, chunk_of(6)),
                    journal.lease("run", "t", 1, 10.0, 0.0),
                    journal.append_chunk(key_of("b"), 0, 6, chunk_of(7)),
                )
                first, leased, second = await asyncio.gather(*calls, return_exceptions=True)
                assert (first, second) == (True, True) and isinstance(leased, JournalBroken)
                assert server.execute("SELECT lease_consumer FROM groups").fetchall() == [(None,), (None,)]
                assert journal.counts.num_chunks == 3

    asyncio.run(whole())


def test_a_second_writer_is_refused_and_told_who_is_there(dsn: str) -> None:
    with contextlib.closing(open_store(config_of(dsn))):
        with pytest.raises(JournalBusy, match=f"process {os.getpid()} on "):
            open_store(config_of(dsn))
        with child("hold", dsn), pytest.raises(JournalBusy):
            open_store(config_of(dsn))
    open_store(config_of(dsn, owner_wait_s=20.0)).close()


def test_a_killed_owner_does_not_block(dsn: str) -> None:
    with child("hold", dsn) as process:
        assert next_line(process) == "open\n"
        with pytest.raises(JournalBusy, match=f"process {process.pid} on "):
            open_store(config_of(dsn))
        process.kill()
        open_store(config_of(dsn, owner_wait_s=20.0)).close()


def test_an_owner_on_its_way_out_is_waited_for(dsn: str) -> None:
    first = open_store(config_of(dsn))
    leave = threading.Timer(0.2, first.close)
    leave.start()
    open_store(config_of(dsn, owner_wait_s=20.0)).close()
    leave.join()


def test_an_old_schema_is_brought_up_to_date(dsn: str) -> None:
    """The first schema had no leases; what was finished then can be leased now."""
    write(config_of(dsn), "a", "b", chunk_tokens=5)
    expected = [group.to_group() for group in read_all(config_of(dsn))]
    with contextlib.closing(open_database(config_of(dsn), is_writer=True)) as database:
        columns = (
            "group_key, run_id, group_id, handle_id, prompt_tokens, prompt, prompt_digest, request, digest, priority"
        )
        tables = {
            "groups": f"{columns}, num_pending",
            "trajectories": "group_key, sample_index, epoch, status, finish_reason, reward, outcome, digest",
            "chunks": "group_key, sample_index, epoch, start, num_tokens, finish_reason, details, payload",
        }
        rows = {name: database.execute(f"SELECT {names} FROM {name}") for name, names in tables.items()}
        for name in [*tables, "schema_version"]:
            database.execute(f"DROP TABLE {name}")
        assert migrate(database, 1) == 0
        for name, names in tables.items():
            database.execute_many(
                f"INSERT INTO {name} ({names}) VALUES ({', '.join('?' * len(rows[name][0]))})", rows[name]
            )
        database.execute("UPDATE groups SET num_pending = 0 WHERE group_id = 'b'")
    with contextlib.closing(open_store(config_of(dsn))) as store:
        with store.transaction():
            leased = store.lease("run", "t", 5, 1.0, 0.0)
        assert [group_id for _, group_id in leased] == ["b"]
    assert [group.to_group() for group in read_all(config_of(dsn))] == expected


def test_a_newer_schema_is_refused_and_left_alone(dsn: str) -> None:
    write(config_of(dsn), "a", chunk_tokens=5)
    with contextlib.closing(open_database(config_of(dsn), is_writer=True)) as database:
        database.execute("UPDATE schema_version SET version = ?", (NEWEST + 1,))
    path = Path(dsn.removeprefix("sqlite:///")) if dsn.startswith("sqlite") else None
    before = path.read_bytes() if path else b""
    with pytest.raises(JournalTooNew, match=f"got version {NEWEST + 1}, expected at most {NEWEST}"):
        open_store(config_of(dsn))
    with pytest.raises(JournalTooNew), open_reader(config_of(dsn)):
        pass
    assert path is None or path.read_bytes() == before
    with contextlib.closing(open_database(config_of(dsn), is_writer=True)) as database:
        database.execute("UPDATE schema_version SET version = ?", (NEWEST,))
        assert version_of(database) == NEWEST
    assert read_all(config_of(dsn))[0].trajectories[0].num_tokens == 10


def test_half_a_migration_is_none(dsn: str) -> None:
    with contextlib.closing(open_database(config_of(dsn), is_writer=True)) as database:
        migrate(database, 1)
        database.execute("CREATE TABLE blocker (x BIGINT)")
        database.execute("CREATE INDEX groups_retained ON blocker (x)")  # the last name that migration 2 wants
        with pytest.raises(JournalLost):
            migrate(database)
        assert version_of(database) == 1
        assert "finish_order" not in json.dumps(table_columns(database, dsn))
        database.execute("DROP TABLE blocker")
        assert migrate(database) == 1 and version_of(database) == NEWEST


def table_columns(database: object, dsn: str) -> list[str]:
    """Columns of the table of groups."""
    sql = (
        "SELECT name FROM pragma_table_info('groups')"
        if dsn.startswith("sqlite")
        else "SELECT attname FROM pg_attribute WHERE attrelid = 'groups'::regclass"
    )
    return [row[0] for row in database.execute(sql)]  # type: ignore[attr-defined]


def test_durability_is_what_was_asked_for(dsn: str) -> None:
    """SQLite: 2 = FULL, 1 = NORMAL. Whether a disk keeps its promise is not for a test to find out."""
    name = "PRAGMA synchronous" if dsn.startswith("sqlite") else "SHOW synchronous_commit"
    for synchronous, expected in (("full", (2, "on")), ("normal", (1, "off"))):
        config = config_of(dsn, synchronous=synchronous)
        with contextlib.closing(open_database(config, is_writer=True)) as database:
            assert database.execute(name)[0][0] in expected
            if dsn.startswith("sqlite"):
                assert database.execute("PRAGMA journal_mode")[0][0] == "wal"
