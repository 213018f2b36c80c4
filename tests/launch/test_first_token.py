"""Reading a trace, and the table of the first token's path; the path itself is measured by the command."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from launch.first_token import GATEWAY, OUTSIDE, lines, parts_ms
from launch.trace_table import BETWEEN, OTHER, kind_of, own_times, prompt_steps, read_trace, spans, table

OPERATORS = frozenset({"cpu_op"})


def event(name: str, start: float, duration: float, category: str = "cpu_op", thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "pid": 7, "tid": thread}


TRACE = [
    event("execute_context_0(0)_generation_1(1)", 0, 90, "user_annotation"),
    event("execute_context_1(64)_generation_0(0)", 100, 1000, "user_annotation"),
    event("aten::linear", 110, 200),
    event("aten::mm", 120, 150),
    event("_C::cpu_fused_moe", 400, 100),
    event("aten::empty", 420, 10),
    event("aten::add", 600, 50),
    event("aten::mm", 2000, 500),  # of another step
    {"ph": "M", "name": "process_name", "pid": 7},
]


def test_operators_count_without_what_they_call() -> None:
    assert own_times(spans(TRACE[2:6], OPERATORS)) == {
        "aten::linear": 50.0,
        "aten::mm": 150.0,
        "_C::cpu_fused_moe": 90.0,
        "aten::empty": 10.0,
    }


def test_threads_do_not_lie_inside_each_other() -> None:
    both = [event("a", 0, 100), event("b", 10, 20, thread=2)]
    assert own_times(spans(both, OPERATORS)) == {"a": 100.0, "b": 20.0}


def test_table_is_of_one_step_and_adds_up(tmp_path: Path) -> None:
    path = tmp_path / "rank0.pt.trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": TRACE}, file)
    events = read_trace(path)
    (step,) = prompt_steps(events)
    assert (step.start_us, step.end_us) == (100, 1100)
    parts = table(events, step.start_us, step.end_us)
    assert parts == pytest.approx({BETWEEN: 0.65, "matrix products": 0.2, "experts": 0.09, OTHER: 0.06})
    assert list(parts) == [BETWEEN, "matrix products", "experts", OTHER]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_C::cpu_attention_with_kv_cache", "attention"),
        ("aten::mm", "matrix products"),
        ("aten::topk", "experts"),
        ("gloo:all_reduce", "exchange between ranks"),
        ("aten::_softmax", "sampling"),
        ("aten::add", OTHER),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_parts_add_up_to_what_the_client_saw() -> None:
    parts = parts_ms(0.060, 0.050, {"experts": 30.0, BETWEEN: 20.0}, recorded_s=0.100)
    assert parts == pytest.approx({GATEWAY: 10.0, "experts": 15.0, BETWEEN: 10.0, OUTSIDE: 25.0})
    assert sum(parts.values()) == pytest.approx(60.0)
    assert parts_ms(0.060, 0.050, {}, 0.0) == pytest.approx({GATEWAY: 10.0, OUTSIDE: 50.0})
    assert "60.00 ms" in lines(60.0, parts).splitlines()[-1]
