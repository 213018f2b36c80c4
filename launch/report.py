"""Every requirement with its target, its figure and its verdict, on one page.

    python -m launch.report [folder=runs/report] [run=missing] [gpu=h200] [gpus=8,16,32,64]
    python -m launch.report run=none                    # only what has been measured already
    python -m launch.report run=parallel,serving        # measure these again

Writes report.html and report.md into `folder`, each with its pictures inside. `folder` also holds the record of every
benchmark (parallel.json, serving.json, …, see launch.report_sources), which may have been made elsewhere and copied
here: each says on which hardware. `run=missing` runs the benchmarks that have no record, one after another; a set from
nothing takes about an hour and a half. Figures for Qwen3-235B come from the planner (launch.plan) and are labelled so.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.arguments import split_arguments
from launch.cluster import run_directory
from launch.hardware import hardware_line
from launch.load_picture import draw_plan, draw_serving, draw_sweep
from launch.report_figures import REQUIREMENTS
from launch.report_pages import Picture, markdown, page, summary_line
from launch.report_rows import Record, Row, planned_rows, rows_of
from launch.report_sources import NAMES, SOURCES, check_names, read_records, run
from rollout.errors import InvalidRequest, LongrollError
from rollout.plan.requirements import Verdict, verdicts


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Where, what is run first, and for which GPUs is planned.

    Attributes:
        folder: Of records and of the report.
        run: Names of benchmarks, "missing" for those without a record, or "none".
        gpu, gpus: Kind and numbers that the planner tries.
    """

    folder: str = "runs/report"
    run: tuple[str, ...] = ("missing",)
    gpu: tuple[str, ...] = ("h200",)
    gpus: tuple[int, ...] = (8, 16, 32, 64)


def wanted(options: Options, records: Mapping[str, Record]) -> tuple[str, ...]:
    """Names of the benchmarks to run. Raises InvalidRequest for an unknown one."""
    if options.run == ("none",):
        return ()
    if options.run == ("missing",):
        return tuple(name for name in NAMES if name not in records)
    check_names(options.run)
    return options.run


def pictures_of(records: Mapping[str, Record], planned: Sequence[Verdict]) -> list[Picture]:
    """Of the records that have one, and of the plan."""
    drawn: list[tuple[str, Callable[[Path], None]]] = [
        ("Planned for Qwen3-235B, as a share of each target", lambda path: draw_plan(planned, path))
    ]
    if "parallel" in records:
        drawn.append(("Latency over streams, measured", lambda path: draw_sweep(records["parallel"], path)))
    if "serving" in records:
        drawn.append(("Requests over time, measured", lambda path: draw_serving(records["serving"], path)))
    pictures = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        for caption, draw in drawn:
            draw(path)
            pictures.append(Picture(caption=caption, png=path.read_bytes()))
    return pictures


def write(folder: Path, records: Mapping[str, Record], planned: Sequence[Verdict]) -> list[Row]:
    """Both files; returns the rows."""
    commands = {source.name: source.shown for source in SOURCES}
    rows = [*planned_rows(planned), *rows_of(REQUIREMENTS, records, commands)]
    pictures = pictures_of(records, planned)
    made = f"Made {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC on {hardware_line()}"
    (folder / "report.html").write_text(page(rows, pictures, made), encoding="utf-8")
    (folder / "report.md").write_text(markdown(rows, pictures, made), encoding="utf-8")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    failed = []
    try:
        options, rest = split_arguments(Options, arguments)
        if rest:
            raise InvalidRequest("argument", rest[0], "one of this command's own options, see --help")
        folder = run_directory(options.folder)
        names = wanted(options, read_records(folder))
        for source in (source for source in SOURCES if source.name in names):
            try:
                run(source, folder, lambda message: print(message, flush=True))
            except LongrollError as error:  # the others are worth a report all the same; its row says what is missing
                print(f"error: {error}", file=sys.stderr)
                failed.append(source.name)
        rows = write(folder, read_records(folder), verdicts(options.gpu, options.gpus))
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(summary_line(rows))
    print(folder / "report.html")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
