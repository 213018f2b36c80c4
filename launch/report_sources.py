"""The benchmarks behind the report: their commands, and what they wrote.

Owns running those that are wanted and reading the JSON of those that have run. Knows nothing of rows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from launch.report_rows import Record
from rollout.errors import InvalidRequest, LongrollError

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A benchmark: its module with arguments, and the argument before the path of its JSON file."""

    name: str
    command: tuple[str, ...]
    out: str = "out="

    @property
    def shown(self) -> str:
        return " ".join(("python", "-m", *self.command))


SOURCES = (
    Source(name="parallel", command=("launch.bench_parallel",)),
    Source(name="serving", command=("launch.bench_serving",)),
    Source(name="locust", command=("launch.bench_locust",)),
    Source(name="first_token", command=("launch.first_token", "profile=true")),
    Source(name="memory", command=("launch.bench_memory",)),
    Source(name="rollout", command=("launch.bench_rollout",)),
    Source(name="speculation", command=("launch.bench_speculation",)),
    Source(name="decode", command=("launch.bench_decode",)),
    Source(name="kernels", command=("kernels.bench",), out="--json="),
    Source(
        name="evaluate",
        command=("launch.evaluate", "experiment=tiny_grpo", "settings=int4+int8_kv", "problems=2048"),
    ),
)
NAMES = tuple(source.name for source in SOURCES)


def check_names(names: Collection[str]) -> None:
    """Raises InvalidRequest for a source that does not exist."""
    for name in names:
        if name not in NAMES:
            raise InvalidRequest("run", name, f"some of {', '.join(NAMES)}, or none")


def run(source: Source, folder: Path, say: Callable[[str], None]) -> None:
    """Run a benchmark; its record comes to lie in `folder`.

    Raises:
        LongrollError: It failed without a record. One that ends with an error after it wrote its record, such as an
            accuracy that is too low, has answered.
    """
    path = folder / f"{source.name}.json"
    path.unlink(missing_ok=True)
    say(f"{source.name}: {source.shown}")
    done = subprocess.run([sys.executable, "-m", *source.command, f"{source.out}{path}"], cwd=REPOSITORY)
    if not path.is_file():
        raise LongrollError(f"{source.name}: got exit code {done.returncode} and no {path.name}, expected a record")


def read_records(folder: Path) -> dict[str, Record]:
    """Of every source that has a file here.

    Raises:
        InvalidRequest: A file is not a JSON object.
    """
    records: dict[str, Record] = {}
    for name in NAMES:
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise InvalidRequest(str(path), str(error), "a JSON object") from None
        if not isinstance(record, dict):
            raise InvalidRequest(str(path), type(record).__name__, "a JSON object")
        records[name] = record
    return records
