"""The picture of the speculation bench: the tail, a rollout, useless drafts and a corrupted draft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from launch.rollout_run import Timeline
from launch.speculation_figures import TARGETS
from launch.speculation_turns import DRAFTING, NGRAM, NONE, ON_HOLD, STOCK, Results, Turn

COLOURS = {DRAFTING: "#2f6fb0", NONE: "#9aa0a6", STOCK: "#c2554d", NGRAM: "#d9822b", ON_HOLD: "#4a9c6d"}


def draw(results: Results, record: Mapping[str, Any], path: Path) -> None:
    """Write a PNG with a panel for each part that was measured.

    Args:
        results: At least one part.
        record: Its figures.
        path: Where to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = []
    if results.tails:
        panels.append(_tails)
    if results.heavy:
        panels.append(_rollout)
    if results.worst:
        panels.append(_worst)
    if results.corrupted:
        panels.append(_corrupted)
    figure, axes = plt.subplots(1, len(panels) or 1, figsize=(5.2 * max(1, len(panels)), 4.4), layout="constrained")
    for axis, panel in zip([axes] if len(panels) < 2 else axes, panels, strict=False):
        panel(axis, results, record)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _tails(axis: Any, results: Results, record: Mapping[str, Any]) -> None:
    """Tokens per second of few sequences, by way."""
    counts = list(results.tails)
    ways = [way for way in COLOURS if way in results.tails[counts[0]][0].repeat.timelines]
    width = 0.8 / len(ways)
    for place, way in enumerate(ways):
        at = [i + (place - (len(ways) - 1) / 2) * width for i in range(len(counts))]
        axis.bar(
            at, [_tokens_per_s(results.tails[count], way) for count in counts], width, color=COLOURS[way], label=way
        )
    axis.set_xticks(range(len(counts)), [str(count) for count in counts])
    axis.set_xlabel("sequences that still run")
    axis.set_ylabel("tokens per second")
    axis.set_title(f"tail: {record['tail_speedup']:.2f} × at least", loc="left", fontsize=11)
    axis.legend(frameon=False)


def _rollout(axis: Any, results: Results, record: Mapping[str, Any]) -> None:
    """How many trajectories had finished, in the repeat with the median speed-up."""
    wanted = record["rollout_speedup"]
    turn = min(results.heavy, key=lambda t: abs(t.repeat.ratio("makespan_s", NONE, DRAFTING) - wanted))
    for way in (NONE, DRAFTING):
        timeline: Timeline = turn.repeat.timelines[way]
        share = [100 * (i + 1) / len(timeline.bars) for i in range(len(timeline.bars))]
        axis.step(timeline.ends_s, share, where="post", color=COLOURS[way], label=way, linewidth=1.8)
        axis.axvline(timeline.makespan_s, color=COLOURS[way], linewidth=0.9, linestyle=":")
    axis.set_xlabel("time (s); dotted: the last one")
    axis.set_ylabel("trajectories finished (%)")
    axis.set_title(f"heavy-tailed rollout: {wanted:.2f} × as fast", loc="left", fontsize=11)
    axis.legend(frameon=False, loc="lower right")


def _worst(axis: Any, results: Results, record: Mapping[str, Any]) -> None:
    """Throughput with useless drafts over that without, within one engine and between two services."""
    ways = {
        "within one engine": ("governed_ratio_", list(results.within), DRAFTING),
        "between two services": ("services_ratio_", list(results.worst), ON_HOLD),
    }
    for label, (name, counts, way) in ways.items():
        values = [record[f"{name}{count}"] for count in counts]
        errors = [record.get(f"{name}{count}_error", 0.0) for count in counts]
        axis.errorbar(counts, values, errors, marker="o", capsize=3, color=COLOURS[way], label=label)
    axis.axhline(TARGETS["worst_case_ratio"], color="#c2554d", linewidth=0.9, linestyle="--")
    axis.axhline(1.0, color="#9aa0a6", linewidth=0.9)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(results.worst), [str(count) for count in results.worst])
    axis.set_xlabel("sequences decoding together")
    axis.set_ylabel("throughput over that without drafting")
    axis.set_title(f"useless drafts: {record['worst_case_ratio']:.3f} at worst", loc="left", fontsize=11)
    axis.legend(frameon=False, loc="lower right")


def _corrupted(axis: Any, results: Results, record: Mapping[str, Any]) -> None:
    """Throughput before the draft was corrupted and after it was noticed, over that without drafting."""
    heights = {"before": record["settled_ratio"], "after the alarm": record["corrupted_ratio"]}
    axis.bar(list(heights), list(heights.values()), 0.5, color=COLOURS[DRAFTING])
    axis.axhline(TARGETS["corrupted_ratio"], color="#c2554d", linewidth=0.9, linestyle="--")
    axis.set_ylabel("throughput over that without drafting")
    tokens = record["alarm_tokens"]
    noticed = "not noticed" if tokens is None else f"noticed after {tokens} tokens"
    axis.set_title(f"corrupted draft: {noticed}", loc="left", fontsize=11)


def _tokens_per_s(turns: Sequence[Turn], way: str) -> float:
    return median(turn.repeat.timelines[way].tokens_per_s for turn in turns)
