"""The journal's databases as fixtures: every test that asks for `dsn` runs against SQLite and against PostgreSQL."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rollout.journal_cases import fresh_schema, postgres_server

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """DSN of a real server, started when first asked for."""
    with postgres_server() as dsn:
        yield dsn


@pytest.fixture
def fresh_schema_dsn(postgres: str) -> Callable[[], str]:
    """Makes empty journals in PostgreSQL."""
    return lambda: fresh_schema(postgres, f"journal_{next(_NUMBERS)}")


@pytest.fixture(params=["sqlite", "postgres"])
def dsn(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty journal's DSN."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'journal.db'}"
    return request.getfixturevalue("fresh_schema_dsn")()
