"""The report: which figure answers which requirement, what counts as holding, and the two files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launch.load_picture import share_of_target
from launch.report import Options, main, wanted, write
from launch.report_figures import REQUIREMENTS
from launch.report_pages import MARKS, summary_line
from launch.report_rows import Row, planned_rows, rows_of
from launch.report_sources import NAMES, SOURCES, Source, read_records, run
from rollout.errors import InvalidRequest, LongrollError
from rollout.plan.requirements import Verdict

SPREAD = {"p50": 20.0, "p95": 60.0, "p99": 80.0, "max": 90.0}
SUMMARY: dict[str, Any] = {
    "num_requests": 1000,
    "num_good": 1000,
    "num_refused": 0,
    "num_errors": 0,
    "duration_s": 300.0,
    "requests_per_s": 7.0,
    "tokens_per_s": 448.0,
    "share_within": 0.97,
    "error_rate": 0.0,
    "share_with_retry_after": None,
    "ttft_ms": SPREAD,
    "tpot_ms": {"p50": 10.0, "p95": 30.0, "p99": 35.0, "max": 40.0},
    "qps_variation": 0.06,
    "offered_variation": 0.05,
    "send_lag_ms": 2.0,
    "errors": [],
}
OVERLOADED = SUMMARY | {"num_refused": 600, "share_with_retry_after": 1.0}
MEMORY = {
    "num_samples": 9,
    "peak_pss_bytes": 2**31,
    "median_pss_bytes": 2**31,
    "growth_bytes": 0,
    "peak_gpu_bytes": None,
}


def cell(concurrency: int, tokens_per_s: float) -> dict[str, Any]:
    summary = SUMMARY | {"tokens_per_s": tokens_per_s}
    return {"prompt_tokens": 64, "output_tokens": 64, "concurrency": concurrency, "summary": summary}


def phase(summary: dict[str, Any]) -> dict[str, Any]:
    return {"rate": 7.0, "summary": summary, "memory": MEMORY, "ends_s": [1.0, 2.0, 3.0], "refused_s": [2.5]}


def records() -> dict[str, Any]:
    """One of each benchmark, every requirement kept."""
    shape = {"kv_token_bf16": 192512, "kv_token_int8": 99264, "weights_ratio": 0.3, "peak_ratio": 0.4}
    serving = {"share": 0.7, "duration_s": 300.0, "window_s": 30.0}
    return {
        "parallel": {
            "share_within": 0.97,
            "num_requests": 128,
            "hardware": "2 cores",
            "options": {"ttft_ms": 200.0, "tpot_ms": 50.0, "lengths": ["64:64"]},
            "cells": [cell(1, 60.0), cell(8, 400.0)],
        },
        "serving": {
            "capacity_per_s": 10.0,
            "is_alive": True,
            "hardware": "2 cores",
            "options": serving,
            "phases": {"steady": phase(SUMMARY), "overload": phase(OVERLOADED)},
        },
        "locust": {
            "tokens_per_s": 500.0,
            "requests_per_s": 8.0,
            "num_requests": 480,
            "num_failures": 0,
            "options": {"users": 32},
            "hardware": "2 cores",
        },
        "first_token": {"ttft_ms": 40.0, "parts_ms": {"prefill": 25.0, "gateway": 5.0}, "hardware": "2 cores"},
        "memory": {
            "weights_ratio": 0.28,
            "peak_ratio": 0.37,
            "options": {"headline": 8, "device_gb": 141.0},
            "shapes": [shape],
            "engines": shape,
        },
        "rollout": {"makespan_speedup": 2.1},
        "speculation": {"tail_speedup": 1.8, "worst_case_ratio": 0.99},
        "decode": {"decode_speedup": 1.2},
        "kernels": {
            "device": "one GPU",
            "results": [
                {"op": "kv_attention", "ratio_to_bf16": 1.6},
                {"op": "int4_linear", "ratio_to_bf16": 2.5},
                {"op": "gumbel_sample", "ratio_to_bf16": None},
            ],
        },
        "evaluate": {
            "options": {"max_loss": 1.0},
            "comparisons": [
                {"setting": "int4+int8_kv", "difference": 0.2, "low": -0.5, "high": 0.9, "num_problems": 2048},
            ],
        },
    }


COMMANDS = {source.name: source.shown for source in SOURCES}


def rows(changed: dict[str, Any] | None = None) -> dict[str, Row]:
    return {row.requirement: row for row in rows_of(REQUIREMENTS, records() | (changed or {}), COMMANDS)}


def planned() -> list[Verdict]:
    made = []
    for scenario in ("serving", "rl_20k", "rl_32k"):
        for requirement, target, figure, shown in (
            ("ttft", "≤ 200 ms", 0.15, "150.0 ms"),
            ("tpot", "≤ 50 ms", 0.06, "60.0 ms"),
            ("memory", "≤ 60 % of bf16", 0.4, "40%"),
            ("throughput", "≥ 2 × bf16", None, "none"),
        ):
            made.append(
                Verdict(
                    scenario=scenario,
                    requirement=requirement,
                    target=target,
                    planned=figure,
                    shown=shown,
                    holds=requirement in ("ttft", "memory"),
                    hardware="16 × h200",
                    limit="reading weights",
                )
            )
    return made


def test_every_requirement_that_is_kept_holds() -> None:
    assert [row for row in rows().values() if row.holds is not True or row.kind == "missing"] == []
    assert {row.kind for row in rows().values()} == {"measured", "planned"}


def test_every_source_answers_something() -> None:
    assert {one.source for one in REQUIREMENTS} == set(NAMES)


def _changed(source: str, *path: str, to: Any) -> dict[str, Any]:
    """A record with one value changed."""
    record = json.loads(json.dumps(records()[source]))
    place = record
    for key in path[:-1]:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[path[-1]] = to
    return {source: record}


FAILURES = (
    ("benchmark_parallel: TTFT and TPOT targets", _changed("parallel", "share_within", to=0.9499)),
    ("time to first token", _changed("parallel", "cells", "1", "summary", "ttft_ms", to=SPREAD | {"p95": 201.0})),
    ("time per output token", _changed("parallel", "cells", "0", "summary", "tpot_ms", to=SPREAD | {"p95": 51.0})),
    ("continuous batching", _changed("parallel", "cells", "1", "summary", "tokens_per_s", to=59.0)),
    (
        "benchmark_serving: throughput and error rate",
        _changed("serving", "phases", "steady", "summary", "num_errors", to=1),
    ),
    (
        "benchmark_serving: variation of QPS",
        _changed("serving", "phases", "steady", "summary", "qps_variation", to=0.1),
    ),
    ("three times the capacity", _changed("serving", "is_alive", to=False)),
    (
        "three times the capacity",
        _changed("serving", "phases", "overload", "summary", "share_with_retry_after", to=0.99),
    ),
    ("three times the capacity", _changed("serving", "phases", "overload", "summary", "share_within", to=0.9)),
    (
        "memory at three times the capacity",
        _changed("serving", "phases", "overload", "memory", "peak_pss_bytes", to=2**32),
    ),
    ("memory of KV cache + weights", _changed("memory", "engines", "peak_ratio", to=0.61)),
    ("memory of KV cache + weights, Qwen3-235B's shapes", _changed("memory", "peak_ratio", to=0.61)),
    ("throughput of long rollouts over plain vLLM", _changed("rollout", "makespan_speedup", to=1.99)),
    ("throughput under Locust", _changed("locust", "num_failures", to=1)),
    ("accuracy regression, INT4 weights and INT8 KV", _changed("evaluate", "comparisons", "0", "low", to=-1.01)),
    ("speculation where it does not pay", _changed("speculation", "worst_case_ratio", to=0.96)),
)


@pytest.mark.parametrize(("requirement", "changed"), FAILURES)
def test_a_target_that_is_missed_does_not_hold(requirement: str, changed: dict[str, Any]) -> None:
    missed = rows(changed)
    assert missed[requirement].holds is False
    assert missed[requirement].verdict == "does not hold"


def test_what_was_not_measured_says_so() -> None:
    (row,) = [row for row in rows_of(REQUIREMENTS, {}, COMMANDS) if row.source.endswith("bench_locust")]
    assert (row.kind, row.figure, row.holds) == ("missing", "not measured", None)
    no_overload = records()["serving"]
    del no_overload["phases"]["overload"]
    assert rows({"serving": no_overload})["three times the capacity"].kind == "missing"


def test_a_kernel_without_a_counterpart_has_no_verdict() -> None:
    alone = {"device": "cpu", "results": [{"op": "kv_attention", "ratio_to_bf16": None, "gb_per_s": 2.0}]}
    row = rows({"kernels": alone})["FlashAttention: blockwise attention over INT8 KV"]
    assert (row.kind, row.holds, row.verdict) == ("measured", None, "no verdict") and "2.0 GB/s" in row.figure


def test_planned_figures_are_drawn_as_shares_of_their_targets() -> None:
    shares = [share_of_target(one) for one in planned()[:4]]
    assert shares == [pytest.approx(0.75), pytest.approx(1.2), pytest.approx(0.4 / 0.6), None]
    faster = replace(planned()[3], planned=2.5)
    assert share_of_target(faster) == pytest.approx(0.8)


def test_planned_rows_are_labelled() -> None:
    made = planned_rows(planned())
    assert len(made) == 12 and {row.kind for row in made} == {"planned"}
    assert all(row.hardware == "16 × h200" for row in made)


class Page(HTMLParser):
    """What a browser would load, and whether tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.num_rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]
        self.num_rows += tag == "tr"
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_both_files_hold_every_row_and_need_nothing_else(tmp_path: Path) -> None:
    spiteful = records()
    spiteful["locust"]["hardware"] = "<b>2 | cores</b>"
    shown = write(tmp_path, spiteful, planned())
    page, parsed = (tmp_path / "report.html").read_text(), Page()
    parsed.feed(page)
    num_sections = len({row.section for row in shown})
    assert parsed.open == [] and parsed.num_rows == len(shown) + num_sections
    assert len(parsed.sources) == 3 and all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert "<b>" not in page and "<script" not in page
    markdown = (tmp_path / "report.md").read_text()
    table = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert len(table) == len(shown) + num_sections
    assert all(len(re.split(r"(?<!\\)\|", line)) == 9 for line in table)
    assert summary_line(shown) in markdown and MARKS[False] in markdown


def test_runs_what_has_no_record(tmp_path: Path) -> None:
    assert wanted(Options(), {}) == NAMES
    assert wanted(Options(), {"parallel": {}}) == NAMES[1:]
    assert wanted(Options(run=("none",)), {}) == ()
    assert wanted(Options(run=("memory",)), {"memory": {}}) == ("memory",)
    with pytest.raises(InvalidRequest):
        wanted(Options(run=("memry",)), {})


def test_a_benchmark_gives_a_record_or_is_an_error(tmp_path: Path) -> None:
    """`python -m json.tool IN OUT` stands for one."""
    made, said = tmp_path / "in.json", list[str]()
    made.write_text('{"decode_speedup": 1.5}')
    (tmp_path / "decode.json").write_text("of another time")
    run(Source(name="decode", command=("json.tool", str(made)), out=""), tmp_path, said.append)
    assert read_records(tmp_path) == {"decode": {"decode_speedup": 1.5}}
    with pytest.raises(LongrollError, match="memory: got exit code"):
        run(Source(name="memory", command=("json.tool", str(tmp_path / "none")), out=""), tmp_path, said.append)
    assert said[0] == f"decode: python -m json.tool {made}"


def test_a_broken_record_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "decode.json").write_text("[1]")
    with pytest.raises(InvalidRequest):
        read_records(tmp_path)
    assert main([f"folder={tmp_path}", "run=none"]) == 2
    assert "decode.json" in capsys.readouterr().err
