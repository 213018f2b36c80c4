"""A run exported and read back is the run."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from pyarrow import parquet

from rollout.errors import InvalidRequest
from rollout.journal.errors import JournalBroken
from rollout.journal.export import SCHEMA, export_run, export_trace, load_export
from rollout.journal.opening import open_database, open_journal, open_reader
from rollout.scheduler.intake import make_group
from rollout.simulate.lengths import read_trace
from rollout.types import Trajectory
from tests.rollout.journal_cases import chunk_of, config_of, ended, key_of, member, request_of

GROUPS = tuple(f"g{i}" for i in range(11))
"""More than one slice of an export, the last of them not full."""


def write(dsn: str) -> list[Trajectory]:
    """Groups in every state; returns the trajectories that an export holds."""
    request = request_of(*GROUPS)

    async def whole() -> list[Trajectory]:
        kept = []
        async with open_journal(config_of(dsn)) as journal:
            await journal.submit("run", request, "h")
            await journal.submit("other", request_of("g0"), "h")
            for place, group_id in enumerate(GROUPS):
                group = make_group(request, place)
                for sample in range(2):
                    chunk = chunk_of(3 + place, seed=place + sample, exact=sample == 1)
                    await journal.append_chunk(key_of(group_id, sample), 0, 0, chunk)
                    one = member(group, sample, [chunk])
                    if place:
                        await journal.finish(key_of(group_id, sample), 0, ended(one, reward=None if sample else 0.25))
                kept += group.trajectories
            await journal.acknowledge("run", ["g1"], "step-1", 0.0)
            await journal.acknowledge("run", ["g2"], "step-2", 100.0)
            assert await journal.compact(150.0) == 1
        return [one for one in kept if one.group_id != "g1"]

    return asyncio.run(whole())


@pytest.mark.parametrize("name", ["run.jsonl", "run.parquet"])
def test_an_export_read_back_is_the_run(dsn: str, tmp_path: Path, name: str) -> None:
    expected, path = write(dsn), tmp_path / name
    path.write_text("an older export")
    with open_reader(config_of(dsn)) as reader:
        counts = export_run(reader, "run", path)
    assert (counts.num_groups, counts.num_trajectories, counts.num_compacted) == (10, 20, 1)
    rows = list(load_export(path))
    assert [row.trajectory for row in rows] == expected
    assert {row.run_id for row in rows} == {"run"} and rows[0].prompt_id == "p-g0"
    assert [row.checkpoint for row in rows[:4]] == [None, None, "step-2", "step-2"]
    assert [one.name for one in tmp_path.glob("*.draft")] == []


def test_both_formats_have_the_usual_fields(tmp_path: Path) -> None:
    dsn = f"sqlite:///{tmp_path / 'journal.db'}"
    write(dsn)
    with open_reader(config_of(dsn)) as reader:
        for name in ("run.jsonl", "run.parquet"):
            export_run(reader, "run", tmp_path / name)
    usual = {"token_ids", "logprobs", "loss_mask", "weight_versions", "routed_experts", "finish_reason", "status"}
    usual |= {"group_id", "sample_index", "seed", "reward", "metadata"}
    first = json.loads((tmp_path / "run.jsonl").read_text().splitlines()[0])
    assert usual <= set(first) == set(SCHEMA.names)
    assert parquet.read_schema(tmp_path / "run.parquet").names == SCHEMA.names


def test_an_export_that_fails_leaves_the_older_one(tmp_path: Path) -> None:
    config = config_of(f"sqlite:///{tmp_path / 'journal.db'}")
    assert config.dsn is not None
    write(config.dsn)
    path = tmp_path / "run.jsonl"
    with open_reader(config) as reader:
        with pytest.raises(InvalidRequest, match="one of other, run"):
            export_run(reader, "none", path)
        with pytest.raises(InvalidRequest, match="parquet"):
            export_run(reader, "run", tmp_path / "run.csv")
        export_run(reader, "run", path)
    before = path.read_bytes()
    database = open_database(config, is_writer=True)
    database.execute("UPDATE chunks SET finish_reason = 'stop' WHERE group_key = 11")
    database.close()
    with open_reader(config) as reader, pytest.raises(JournalBroken, match="trajectory g10/0 of run run"):
        export_run(reader, "run", path)
    assert path.read_bytes() == before and not list(tmp_path.glob("*.draft"))


def test_a_trace_has_the_lengths_of_groups_that_have_ended(dsn: str, tmp_path: Path) -> None:
    expected, path = write(dsn), tmp_path / "trace.jsonl"
    with open_reader(config_of(dsn)) as reader:
        counts = export_trace(reader, "run", path)
        with pytest.raises(InvalidRequest, match="none"):
            export_trace(reader, "none", path)
    # g0 is unfinished, g1 compacted.
    assert (counts.num_groups, counts.num_trajectories, counts.num_compacted, counts.num_unfinished) == (9, 18, 1, 1)
    lengths = {t.trajectory_id: len(t.token_ids) for t in expected if t.group_id != "g0"}
    work = read_trace(path)
    assert {f"{one.group_id}/{i}": n for one in work for i, n in enumerate(one.output_tokens)} == lengths
    assert {one.prompt_tokens for one in work} == {3}
