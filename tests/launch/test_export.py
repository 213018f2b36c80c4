"""The command around the exports, which have tests of their own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from launch.export import main
from rollout.journal.export import load_export
from rollout.journal.opening import open_journal
from rollout.scheduler.intake import make_group
from rollout.simulate.lengths import read_trace
from tests.rollout.journal_cases import chunk_of, config_of, ended, key_of, member, request_of


@pytest.fixture
def dsn(tmp_path: Path) -> str:
    """A journal with a finished group and one that has only begun."""
    dsn, request = f"sqlite:///{tmp_path / 'journal.sqlite'}", request_of("a", "b")

    async def write() -> None:
        async with open_journal(config_of(dsn)) as journal:
            await journal.submit("run", request, "h")
            group = make_group(request, 0)
            for sample in range(2):
                chunk = chunk_of(5 + sample)
                await journal.append_chunk(key_of("a", sample), 0, 0, chunk)
                await journal.finish(key_of("a", sample), 0, ended(member(group, sample, [chunk])))

    asyncio.run(write())
    return dsn


def test_rows_and_a_trace_are_written_and_told(dsn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, trace = tmp_path / "run.parquet", tmp_path / "trace.jsonl"
    assert main([f"journal={dsn}", f"to={rows}", f"trace={trace}"]) == 0
    assert [len(row.trajectory.token_ids) for row in load_export(rows)] == [5, 6, 0, 0]
    assert [work.output_tokens for work in read_trace(trace)] == [(5, 6)]
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{rows}: 4 trajectories of 2 groups"
    assert second == f"{trace}: 2 trajectories of 1 groups; 1 have members without an end of their own"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["to=x.jsonl"], "journal"),
        (["journal={dsn}"], "to, trace"),
        (["journal={dsn}", "to=x.csv"], "export path"),
        (["journal={dsn}", "to=x.jsonl", "run_id=other"], "one of run"),
        (["journal={dsn}", "into=x.jsonl"], "into"),
        (["journal=sqlite:///nowhere/journal.sqlite", "to=x.jsonl"], "nowhere"),
    ],
)
def test_bad_input_is_refused_with_its_name(
    dsn: str, arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(dsn=dsn) for argument in arguments]) == 2
    assert what in capsys.readouterr().err
