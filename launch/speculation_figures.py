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
from launch.speculation_pairs import Pair
from launch.speculation_turns import DRAFTING, NGRAM, NONE, ON_HOLD, STOCK, Results, Turn

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
        record |= _worst(results, ratios)
    if results.settled:
        record["settled_ratio"] = pooled_ratio(results.settled, DRAFTING)
    if results.corrupted:
        record |= _corrupted(results, ratios)
        noticed = [tokens for tokens in results.alarm_tokens if tokens is not None]
        record["alarm_tokens"] = max(noticed) if len(noticed) == len(results.alarm_tokens) else None
    record |= _accept_lengths(results)
    record["num_near_ties"] = sum(len(turn.repeat.differences) for turn in all_turns(results))
    record["repeats"] = ratios
    record["options"] = asdict(options)
    pairs = {f"worst_{count}": some for count, some in results.within.items()}
    pairs |= {"corrupted": results.corrupted_within} if results.corrupted_within else {}
    record["pairs"] = {name: [asdict(pair) for pair in some] for name, some in pairs.items()}
    record["turns"] = {name: [_turn_record(turn) for turn in turns] for name, turns in _by_name(results).items()}
    return record


def _worst(results: Results, ratios: dict[str, list[float]]) -> dict[str, float]:
    """Figures of useless drafts; see launch.bench_speculation. Adds the turns' ratios to `ratios`."""
    kept = {count: undisturbed(turns) for count, turns in results.worst.items()}
    together = [turn for turns in kept.values() for turn in turns]
    hold = pooled_ratio(together, ON_HOLD), _error(together, ON_HOLD)
    governed = {count: governed_ratio(pairs) for count, pairs in results.within.items()}
    least = min(governed, key=lambda count: governed[count][0])
    record = _product("worst_case_ratio", governed[least], hold) | {"worst_case_batch": least}
    record |= _with_error("hold_ratio", *hold)
    for count, (ratio, error) in governed.items():
        record |= _with_error(f"governed_ratio_{count}", ratio, error)
        record[f"drafted_share_{count}"] = statistics.fmean(pair.drafted_share for pair in results.within[count])
    record |= _with_error("services_ratio", pooled_ratio(together, DRAFTING), _error(together, DRAFTING))
    for count, turns in kept.items():
        ratios[f"services_ratio_{count}"] = _ratios(turns, "tokens_per_s", DRAFTING, NONE)
        record |= _with_error(f"services_ratio_{count}", pooled_ratio(turns, DRAFTING), _error(turns, DRAFTING))
    record["turns_left_out"] = sum(map(len, results.worst.values())) - len(together)
    return record


def _corrupted(results: Results, ratios: dict[str, list[float]]) -> dict[str, float]:
    """Figures of what a corrupted draft costs once it was noticed. Adds the turns' ratios to `ratios`."""
    kept = undisturbed(results.corrupted)
    hold = pooled_ratio(kept, ON_HOLD), _error(kept, ON_HOLD)
    governed = governed_ratio(results.corrupted_within)
    ratios["corrupted_services_ratio"] = _ratios(kept, "tokens_per_s", DRAFTING, NONE)
    return (
        _product("corrupted_ratio", governed, hold)
        | _with_error("corrupted_hold_ratio", *hold)
        | _with_error("corrupted_governed_ratio", *governed)
        | _with_error("corrupted_services_ratio", pooled_ratio(kept, DRAFTING), _error(kept, DRAFTING))
    )


def _product(name: str, governed: tuple[float, float], hold: tuple[float, float | None]) -> dict[str, float]:
    """The ratio of a service that can draft to one that cannot, from what each part of it costs."""
    (ratio, error), (held, held_error) = governed, hold
    both = None if held_error is None else math.hypot(error * held, held_error * ratio)
    return _with_error(name, ratio * held, both)


def governed_ratio(pairs: Sequence[Pair]) -> tuple[float, float]:
    """Throughput of governed turns over that of turns on hold, of one engine, and its standard error.

    Turns count the same however many steps lie in them. Tokens that useless drafts gain are not counted.
    """
    governed, on_hold = (
        statistics.fmean(getattr(pair, name) for pair in pairs) for name in ("governed_s", "on_hold_s")
    )
    ratio = on_hold / governed
    residuals = [pair.on_hold_s - ratio * pair.governed_s for pair in pairs]
    return ratio, statistics.stdev(residuals) / math.sqrt(len(pairs)) / governed if len(pairs) > 1 else math.inf


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


def _with_error(name: str, value: float, error: float | None) -> dict[str, float]:
    return {name: value} if error is None else {name: value, f"{name}_error": error}


def _error(turns: Sequence[Turn], way: str) -> float | None:
    """Standard error of a way's ratio: of the starts if there are several, else of turns; None of one."""
    by_start: dict[int, list[float]] = defaultdict(list)
    for turn, ratio in zip(turns, _ratios(turns, "tokens_per_s", way, NONE), strict=True):
        by_start[turn.start].append(ratio)
    several = list(by_start.values())
    values = [statistics.fmean(ratios) for ratios in several] if len(several) > 1 else several[0]
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


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
