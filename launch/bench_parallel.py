"""Static benchmark of the gateway: latencies over concurrency × lengths, and the share of requests within targets.

    python -m launch.bench_parallel [concurrency=1,2,4,8,16,32] [lengths=64:64,128:128] [per_stream=4] [ttft_ms=200]
        [tpot_ms=50] [url=http://127.0.0.1:8000] [out=PATH] [picture=PATH] [overrides …]

Without `url` it starts the service of the overrides (experiment=tiny_grpo unless told otherwise) and stops it
afterwards; with `url` the API key is taken from LONGROLL_API_KEY. For every pair of lengths (prompt:output, in tokens)
and every concurrency, `concurrency` streams send one request after another, `per_stream` times, after one that does not
count. Prompts have nothing in common, so no prefix is cached. TTFT is the time from sending to the first event with a
token, TPOT the mean time per output token after it; both as the client sees them, over HTTP.

`share_within` is the share of all requests that were answered in full within both targets.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from launch.arguments import split_arguments
from launch.hardware import hardware_line
from launch.http_load import Outcome, Target, ask_stream
from launch.load_picture import draw_sweep
from launch.load_runs import closed_loop
from launch.load_statistics import Summary, Targets, summarise
from launch.serving_target import serving
from rollout.errors import InvalidRequest, LongrollError


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is swept.

    Attributes:
        url: Of a running gateway; None = start one.
        concurrency: Streams at once.
        lengths: Pairs prompt:output, in tokens.
        per_stream: Requests of each stream that count.
        ttft_ms, tpot_ms: Targets of a request.
        seed: Of the prompts.
        out, picture: JSON and PNG files.
    """

    url: str | None = None
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    lengths: tuple[str, ...] = ("64:64", "128:128")
    per_stream: int = 4
    ttft_ms: float = 200.0
    tpot_ms: float = 50.0
    seed: int = 0
    out: str | None = None
    picture: str | None = None

    @property
    def targets(self) -> Targets:
        return Targets(ttft_s=self.ttft_ms / 1e3, tpot_s=self.tpot_ms / 1e3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One pair of lengths at one concurrency."""

    prompt_tokens: int
    output_tokens: int
    concurrency: int
    summary: Summary


def parse_lengths(text: str) -> tuple[int, int]:
    """Prompt and output tokens of "prompt:output". Raises InvalidRequest."""
    prompt, _, output = text.partition(":")
    if not (prompt.isdecimal() and output.isdecimal() and int(prompt) and int(output)):
        raise InvalidRequest("lengths", text, "prompt:output, two numbers of tokens such as 64:128")
    return int(prompt), int(output)


async def sweep(target: Target, options: Options) -> tuple[list[Cell], list[Outcome]]:
    """Every cell, one after another; also all outcomes that count."""
    cells, everything = [], []
    for lengths in options.lengths:
        prompt_tokens, output_tokens = parse_lengths(lengths)
        for concurrency in options.concurrency:
            asks = ask_stream(prompt_tokens, output_tokens, f"parallel/{concurrency}/{options.seed}")
            await closed_loop(target, list(islice(asks, concurrency)), concurrency)
            outcomes = await closed_loop(target, islice(asks, concurrency * options.per_stream), concurrency)
            cell = Cell(
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                concurrency=concurrency,
                summary=summarise(outcomes, options.targets),
            )
            print(row(cell), flush=True)
            cells.append(cell)
            everything += outcomes
    return cells, everything


HEADER = (
    f"{'tokens':>11} {'streams':>7} {'within':>7} {'TTFT p50':>9} {'p95':>7} {'TPOT p50':>9} {'p95':>7} {'tokens/s':>9}"
)


def row(cell: Cell) -> str:
    s = cell.summary
    lengths = f"{cell.prompt_tokens}+{cell.output_tokens}"
    return (
        f"{lengths:>11} {cell.concurrency:>7} {s.share_within:>7.1%} {s.ttft_ms.p50:>7.0f}ms {s.ttft_ms.p95:>5.0f}ms "
        f"{s.tpot_ms.p50:>7.1f}ms {s.tpot_ms.p95:>5.1f}ms {s.tokens_per_s:>9.0f}"
        + (f"   {s.num_errors} errors, {s.num_refused} refused" if s.num_errors or s.num_refused else "")
    )


def record_of(options: Options, cells: Sequence[Cell], outcomes: Sequence[Outcome]) -> dict[str, object]:
    """As written to `out`; share_within first. What was refused was not answered in time either."""
    return {
        "share_within": sum(map(options.targets.are_met, outcomes)) / len(outcomes),
        "num_requests": len(outcomes),
        "num_errors": sum(cell.summary.num_errors for cell in cells),
        "num_refused": sum(cell.summary.num_refused for cell in cells),
        "hardware": hardware_line(),
        "options": asdict(options),
        "cells": [asdict(cell) for cell in cells],
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, overrides = split_arguments(Options, arguments)
        for lengths in options.lengths:
            parse_lengths(lengths)
        with serving(options.url, overrides, has_targets=False) as served:
            print(HEADER, flush=True)
            cells, outcomes = asyncio.run(sweep(served.target, options))
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    record = record_of(options, cells, outcomes)
    print(
        f"{record['share_within']:.1%} of {record['num_requests']} requests within {options.ttft_ms:g} ms to the first "
        f"token and {options.tpot_ms:g} ms a token"
    )
    if options.out is not None:
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    if options.picture is not None:
        draw_sweep(record, Path(options.picture))
    return 0


if __name__ == "__main__":
    sys.exit(main())
