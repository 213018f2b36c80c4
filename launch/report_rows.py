"""Each requirement as a row: its target, the figure that answers it, and whether it holds.

A figure of a record is "measured"; those of the planner and of shapes laid out without a device are "planned". A row
without a figure says so. Knows nothing of how records are made (launch.report_sources), read (launch.report_figures) or
shown (launch.report_pages).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rollout.plan.requirements import Verdict as Planned

Record = Mapping[str, Any]
"""What a benchmark wrote as JSON."""
SCENARIO_NAMES = {
    "serving": "online serving, 4K + 1.5K",
    "rl_20k": "RL rollout, 2K + 20K",
    "rl_32k": "RL rollout, 2K + 32K",
}
INDICATOR_NAMES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "memory": "device memory, KV cache + weights",
    "throughput": "throughput",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the report.

    Attributes:
        section, requirement, target: What is required.
        figure: In words, with its unit.
        kind: "measured", "planned", or "missing".
        holds: Whether the target is kept; None where there is no figure, or no target.
        hardware: What the figure holds for.
        source: The command that gives it.
    """

    section: str
    requirement: str
    target: str
    figure: str
    kind: str
    holds: bool | None
    hardware: str
    source: str

    @property
    def verdict(self) -> str:
        return {True: "holds", False: "does not hold", None: "no verdict"}[self.holds]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What a record says about one requirement."""

    text: str
    holds: bool | None
    hardware: str
    kind: str = "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """One row to be filled in from the record of one source; `read` gives None where it has no such figure."""

    section: str
    name: str
    target: str
    source: str
    read: Callable[[Record], Figure | None]


def planned_rows(verdicts: Iterable[Planned]) -> list[Row]:
    """The indicators of every scenario on Qwen3-235B, from the planner."""
    return [
        Row(
            section="Scenarios on Qwen3-235B",
            requirement=f"{SCENARIO_NAMES.get(one.scenario, one.scenario)}: {INDICATOR_NAMES[one.requirement]}",
            target=one.target,
            figure="; ".join(_planned_words(one)),
            kind=one.source,
            holds=one.holds,
            hardware=one.hardware,
            source="python -m launch.plan",
        )
        for one in verdicts
    ]


def _planned_words(one: Planned) -> list[str]:
    """The figure with what limits it, how sure it is, and what would help."""
    words = [f"{one.shown} ({one.limit})"]
    if one.is_close:
        words.append("the target lies within the model's error")
    if one.note:
        words.append(one.note)
    return words


def rows_of(
    requirements: Iterable[Requirement], records: Mapping[str, Record], commands: Mapping[str, str]
) -> list[Row]:
    """Every requirement in order, with the figure of its source's record, or without one."""
    rows = []
    for one in requirements:
        record = records.get(one.source)
        figure = None if record is None else one.read(record)
        rows.append(
            Row(
                section=one.section,
                requirement=one.name,
                target=one.target,
                figure="not measured" if figure is None else figure.text,
                kind="missing" if figure is None else figure.kind,
                holds=None if figure is None else figure.holds,
                hardware="" if figure is None else figure.hardware,
                source=commands[one.source],
            )
        )
    return rows
