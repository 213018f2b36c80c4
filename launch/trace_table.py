"""Where the time of a torch trace goes: operators by kind, without what they call.

Owns reading a Chrome trace of PyTorch's profiler and adding it up. Knows nothing of how it was recorded.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = (
    (
        "exchange between ranks",
        ("all_reduce", "allreduce", "all_gather", "allgather", "reduce_scatter", "gloo", "nccl"),
    ),
    ("attention", ("attention", "flash", "sdpa", "reshape_and_cache", "rotary", "kv_cache")),
    ("experts", ("moe", "expert", "topk", "grouped_mm")),
    ("matrix products", ("mm", "linear", "matmul", "gemm", "onednn", "int4")),
    ("sampling", ("gumbel", "softmax", "argmax", "sample", "sort")),
)
"""Kinds of operators by parts of their names, the first that fits."""
OTHER, BETWEEN = "other operators", "between operators (Python, waiting)"
OPERATOR_CATEGORIES = frozenset({"cpu_op", "kernel", "gpu_memcpy", "gpu_memset"})
STEP = "execute_context_1("
"""How vLLM names a step that begins a request; the number is of requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that took time; microseconds. Spans of one thread lie inside each other or apart."""

    name: str
    start_us: float
    end_us: float
    thread: tuple[Any, Any]


def read_trace(path: Path) -> list[Mapping[str, Any]]:
    """Events of a trace, compressed or not."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        events: list[Mapping[str, Any]] = json.load(file)["traceEvents"]
    return events


def spans(events: Iterable[Mapping[str, Any]], categories: frozenset[str]) -> list[Span]:
    return [
        Span(name=e["name"], start_us=e["ts"], end_us=e["ts"] + e["dur"], thread=(e["pid"], e["tid"]))
        for e in events
        if e.get("ph") == "X" and e.get("cat") in categories
    ]


def prompt_steps(events: Sequence[Mapping[str, Any]]) -> list[Span]:
    """The steps that each began one request, in order; none where another rank ran it."""
    steps = [one for one in spans(events, frozenset({"user_annotation"})) if one.name.startswith(STEP)]
    return sorted(steps, key=lambda one: one.start_us)


def own_times(operators: Sequence[Span]) -> dict[str, float]:
    """Microseconds of every operator by name, without the operators that it called."""
    own: dict[str, float] = defaultdict(float)
    stacks: dict[Any, list[Span]] = defaultdict(list)
    for one in sorted(operators, key=lambda span: (span.start_us, -span.end_us)):
        stack = stacks[one.thread]
        while stack and stack[-1].end_us <= one.start_us:
            stack.pop()
        duration = one.end_us - one.start_us
        own[one.name] += duration
        if stack:
            own[stack[-1].name] -= duration
        stack.append(one)
    return dict(own)


def kind_of(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, parts in KINDS if any(part in lowered for part in parts)), OTHER)


def table(events: Sequence[Mapping[str, Any]], start_us: float, end_us: float) -> dict[str, float]:
    """Milliseconds by kind between two moments, largest first; what no operator accounts for is `BETWEEN`.

    Where several threads work at once, their times add up, and `BETWEEN` may be 0.
    """
    inside = [one for one in spans(events, OPERATOR_CATEGORIES) if start_us <= one.start_us and one.end_us <= end_us]
    by_kind: dict[str, float] = defaultdict(float)
    for name, microseconds in own_times(inside).items():
        by_kind[kind_of(name)] += microseconds / 1e3
    by_kind[BETWEEN] = max(0.0, (end_us - start_us) / 1e3 - sum(by_kind.values()))
    return dict(sorted(by_kind.items(), key=lambda item: -item[1]))
