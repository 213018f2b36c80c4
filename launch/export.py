"""A run's trajectories out of its journal, also while it goes on.

    python -m launch.export journal=sqlite:///runs/NAME/journal.sqlite [run_id=…] to=PATH.parquet | to=PATH.jsonl
    python -m launch.export journal=… [run_id=…] trace=PATH.jsonl

`to` writes one row a trajectory with the usual fields (see rollout.journal.export). `trace` writes how long each one
became, of groups that have ended, as `launch.simulate trace=…` replays it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.arguments import split_arguments
from launch.replay import choose_run
from rollout.config import JournalConfig
from rollout.errors import InvalidRequest, LongrollError
from rollout.journal.export import ExportCounts, export_run, export_trace
from rollout.journal.opening import open_reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is written where.

    Attributes:
        journal: DSN of the journal, as in journal.dsn.
        run_id: The run; None = the only one in the journal.
        to: File for the trajectories, .parquet or .jsonl.
        trace: File for their lengths, .jsonl.
    """

    journal: str | None = None
    run_id: str | None = None
    to: str | None = None
    trace: str | None = None


def run(options: Options) -> list[str]:
    """Write what was asked for; returns what to say.

    Raises:
        InvalidRequest: An option is missing or wrong, or there is no such journal or run.
        JournalError: It cannot be read.
    """
    if options.journal is None:
        raise InvalidRequest("journal", "none", "the DSN of a journal, such as sqlite:///runs/NAME/journal.sqlite")
    if options.to is None and options.trace is None:
        raise InvalidRequest("to, trace", "neither", "a file to write")
    said = []
    with open_reader(JournalConfig(dsn=options.journal)) as reader:
        run_id = choose_run(reader, options.run_id)
        for path, write in ((options.to, export_run), (options.trace, export_trace)):
            if path is not None:
                said.append(_told(path, write(reader, run_id, Path(path))))
    return said


def _told(path: str, counts: ExportCounts) -> str:
    left_out = []
    if counts.num_compacted:
        left_out.append(f"{counts.num_compacted} groups were dropped after their retention time")
    if counts.num_unfinished:
        left_out.append(f"{counts.num_unfinished} have members without an end of their own")
    return "; ".join([f"{path}: {counts.num_trajectories} trajectories of {counts.num_groups} groups", *left_out])


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, rest = split_arguments(Options, arguments)
        if rest:
            raise InvalidRequest("argument", rest[0], "one of the options in --help")
        print("\n".join(run(options)))
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
