"""From the turns of the speculation bench to its figures. A part of launch.bench_speculation. Runs nothing.

A speed-up is the median of the repeats' ratios. Where the claim is "never slower", the turns' times are added up
before they are compared, so that what a governor spends on trying in one turn is not left out with it. Turns in which a
way took a quarter longer than another are left out with all their ways: no governor loses that in a turn, a shared
machine does.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from launch.rollout_run import Timeline
from launch.rollout_turns import quantiles
from launch.speculation_loads import Options
from launch.speculation_turns import DRAFTING, NGRAM, NONE, STOCK, TURNED_OFF, Results, Turn

ACCEPT_LENGTH = "rollout/spec_accept_length"
TARGETS = {"tail_speedup": 2.0, "rollout_speedup": 1.3, "worst_case_ratio": 0.97, "corrupted_ratio": 0.97}
"""The least that each of these figures should be."""
DISTURBED = 1.25
"""Times that ways differ by in a turn, from which on the machine is why: see above."""


def record_of(options: Options, results: Results) -> dict[str, Any]:
    """Everything, with the figures first; a part that was not measured has none."""
    ratios = _speedups(results)
    record: dict[str, Any] = {name: statistics.median(values) for name, values in ratios.items()}
    if results.tails:
        record["tail_speedup"] = min(record[f"tail_speedup_{count}"] for count in results.tails)
    if results.worst:
        kept = {count: undisturbed(turns) for count, turns in results.worst.items()}
        pooled = {count: pooled_ratio(turns, DRAFTING) for count, turns in kept.items()}
        record["worst_case_ratio"] = min(pooled.values())
        record["worst_case_batch"] = min(pooled, key=lambda count: pooled[count])
        together = [turn for turns in kept.values() for turn in turns]
        record["off_ratio"] = pooled_ratio(together, TURNED_OFF)
        record["worst_ratio_all"] = pooled_ratio(together, DRAFTING)
        record |= _error("worst_error_all", together)
        for count, turns in kept.items():
            ratios[f"worst_ratio_{count}"] = _ratios(turns, "tokens_per_s", DRAFTING, NONE)
            record[f"worst_ratio_{count}"] = pooled[count]
            record |= _error(f"worst_error_{count}", turns)
        record["worst_turns_left_out"] = sum(map(len, results.worst.values())) - sum(map(len, kept.values()))
    if results.settled:
        record["settled_ratio"] = pooled_ratio(results.settled, DRAFTING)
    if results.corrupted:
        kept_turns = undisturbed(results.corrupted)
        ratios["corrupted_ratio"] = _ratios(kept_turns, "tokens_per_s", DRAFTING, NONE)
        record["corrupted_ratio"] = pooled_ratio(kept_turns, DRAFTING)
        record |= _error("corrupted_error", kept_turns)
        noticed = [tokens for tokens in results.alarm_tokens if tokens is not None]
        record["alarm_tokens"] = max(noticed) if len(noticed) == len(results.alarm_tokens) else None
    record |= _accept_lengths(results)
    record["num_near_ties"] = sum(len(turn.repeat.differences) for turn in all_turns(results))
    record["repeats"] = ratios
    record["options"] = asdict(options)
    record["turns"] = {name: [_turn_record(turn) for turn in turns] for name, turns in _by_name(results).items()}
    return record


def pooled_ratio(turns: Sequence[Turn], way: str) -> float:
    """Throughput of a way over that without drafting, of all turns together: both generate the same tokens."""
    with_s, without_s = (sum(t.repeat.timelines[name].wall_s for t in turns) for name in (way, NONE))
    return without_s / with_s


def undisturbed(turns: Sequence[Turn]) -> Sequence[Turn]:
    """Those in which no way took a quarter longer than another; all, if these are less than two thirds of them."""
    walls = [[timeline.wall_s for timeline in turn.repeat.timelines.values()] for turn in turns]
    kept = [turn for turn, wall_s in zip(turns, walls, strict=True) if max(wall_s) <= DISTURBED * min(wall_s)]
    return kept if len(kept) >= 2 / 3 * len(turns) else turns


def all_turns(results: Results) -> list[Turn]:
    """Of all parts."""
    return [turn for turns in _by_name(results).values() for turn in turns]


def table(record: Mapping[str, Any]) -> str:
    """One line a figure: its value, what it should be, and the lowest and highest of the repeats."""
    rows = [f"{'figure':<24} {'value':>7} {'target':>7}   lowest … highest of the repeats"]
    for name, value in record.items():
        if not isinstance(value, (int, float)) or name == "num_near_ties":
            continue
        target = f"≥ {TARGETS[name]:.2f}" if name in TARGETS else ""
        spread = record["repeats"].get(name)
        text = f"{min(spread):.3f} … {max(spread):.3f}" if spread else ""
        shown = f"{value:>7}" if isinstance(value, int) else f"{value:>7.3f}"
        rows.append(f"{name:<24} {shown} {target:>7}   {text}".rstrip())
    if "alarm_tokens" in record and record["alarm_tokens"] is None:
        rows.append("the corrupted draft was not noticed")
    return "\n".join([*rows, f"near ties between ways: {record['num_near_ties']}"])


def _speedups(results: Results) -> dict[str, list[float]]:
    """Ratios of the repeats, by figure."""
    ratios: dict[str, list[float]] = {}
    for count, turns in results.tails.items():
        ratios[f"tail_speedup_{count}"] = _ratios(turns, "tokens_per_s", DRAFTING, NONE)
        for way, name in ((STOCK, "vllm"), (NGRAM, "ngram")):
            if all(way in turn.repeat.timelines for turn in turns):
                ratios[f"tail_over_{name}_{count}"] = _ratios(turns, "tokens_per_s", DRAFTING, way)
    if results.answers:
        ratios["answers_speedup"] = _ratios(results.answers, "tokens_per_s", DRAFTING, NONE)
    if results.heavy:
        ratios["rollout_speedup"] = _ratios(results.heavy, "makespan_s", NONE, DRAFTING)
        ratios["rollout_tail_speedup"] = _ratios(results.heavy, "tail_s", NONE, DRAFTING)
    return {name: values for name, values in ratios.items() if math.inf not in values}  # tails of no time


def _ratios(turns: Sequence[Turn], figure: str, over: str, under: str) -> list[float]:
    return [turn.repeat.ratio(figure, over, under) for turn in turns]


def _error(name: str, turns: Sequence[Turn]) -> dict[str, float]:
    """Standard error of the ratio under that name: of the starts if there are several, else of turns; none of one."""
    by_start: dict[int, list[float]] = defaultdict(list)
    for turn, ratio in zip(turns, _ratios(turns, "tokens_per_s", DRAFTING, NONE), strict=True):
        by_start[turn.start].append(ratio)
    several = list(by_start.values())
    values = [statistics.fmean(ratios) for ratios in several] if len(several) > 1 else several[0]
    return {name: statistics.stdev(values) / math.sqrt(len(values))} if len(values) > 1 else {}


def _accept_lengths(results: Results) -> dict[str, float]:
    """Tokens of a step and sequence that was drafted for, by what was generated."""
    parts: dict[str, list[Turn]] = {
        "tail": [turn for turns in results.tails.values() for turn in turns],
        "answers": results.answers,
        "rollout": results.heavy,
    }
    found = {}
    for name, turns in parts.items():
        values = [v for turn in turns if (v := turn.drafts[DRAFTING].get(ACCEPT_LENGTH)) is not None]
        if values:
            found[f"accept_length_{name}"] = statistics.median(values)
    tokens, accepted = results.vllm_ngram
    if tokens:
        found["accept_length_vllm_ngram"] = tokens / (tokens - accepted)
    return found


def _by_name(results: Results) -> dict[str, list[Turn]]:
    named = {f"tail_{count}": turns for count, turns in results.tails.items()}
    named |= {"answers": results.answers, "rollout": results.heavy}
    named |= {f"worst_{count}": turns for count, turns in results.worst.items()}
    named |= {"settled": results.settled, "corrupted": results.corrupted}
    return {name: turns for name, turns in named.items() if turns}


def _turn_record(turn: Turn) -> dict[str, Any]:
    return {
        "length_quantiles": quantiles(turn.repeat.lengths),
        "near_ties": [str(one) for one in turn.repeat.differences],
        "drafts": turn.drafts,
        "start": turn.start,
        "ways": {way: _way_record(timeline) for way, timeline in turn.repeat.timelines.items()},
    }


def _way_record(timeline: Timeline) -> dict[str, Any]:
    return {
        "makespan_s": timeline.makespan_s,
        "tail_s": timeline.tail_s,
        "wall_s": timeline.wall_s,
        "tokens_per_s": timeline.tokens_per_s,
        "num_tokens": timeline.num_tokens,
        "num_chunks": sum(bar.num_chunks for bar in timeline.bars),
    }
