"""Pictures of the report: latencies over concurrency, requests over time, planned figures beside their targets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.picture import BLUE, GREEN, GREY, ORANGE
from rollout.plan.requirements import Verdict

COLOURS = (BLUE, ORANGE, GREEN, "#8e6bb0")


def draw_sweep(record: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of two panels, TTFT and TPOT over concurrency, from a record of launch.bench_parallel."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    options, cells = record["options"], record["cells"]
    figure.suptitle(f"{record['share_within']:.1%} of the requests within both targets", fontsize=12, fontweight="bold")
    pairs = sorted({(cell["prompt_tokens"], cell["output_tokens"]) for cell in cells})
    for axis, what, target in zip(axes, ("ttft", "tpot"), (options["ttft_ms"], options["tpot_ms"]), strict=True):
        for colour, (prompt, output) in zip(COLOURS, pairs, strict=False):
            mine = [c for c in cells if (c["prompt_tokens"], c["output_tokens"]) == (prompt, output)]
            x = [c["concurrency"] for c in mine]
            for share, style in (("p50", "--"), ("p95", "-")):
                label = f"{prompt}+{output} tokens, {share}"
                axis.plot(
                    x,
                    [c["summary"][f"{what}_ms"][share] for c in mine],
                    style,
                    color=colour,
                    marker="o",
                    markersize=3.5,
                    label=label,
                )
        axis.axhline(target, color="#c2554d", linewidth=1, linestyle=":")
        axis.annotate(f"target {target:g} ms", (1, target), xytext=(0, 3), textcoords="offset points", fontsize=8)
        axis.set_xscale("log", base=2)
        streams = sorted({cell["concurrency"] for cell in cells})
        axis.set_xticks(streams, [str(number) for number in streams])
        axis.set_xlabel("streams at once")
        axis.set_ylabel(f"{what.upper()} (ms)")
        axis.set_ylim(bottom=0)
        _plain(axis)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_serving(record: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of requests in a second over time, phase by phase, from a record of launch.bench_serving."""
    plt = _pyplot()
    phases = record["phases"]
    figure, axes = plt.subplots(
        len(phases), 1, figsize=(9, 2.3 * len(phases) + 0.6), layout="constrained", squeeze=False
    )
    figure.suptitle(f"capacity {record['capacity_per_s']:.1f} requests/s", fontsize=12, fontweight="bold")
    for axis, (name, phase) in zip(axes[:, 0], phases.items(), strict=True):
        end_s = max([*phase["ends_s"], *phase["refused_s"], 1.0])
        step_s = max(1.0, end_s / 60)
        edges = [i * step_s for i in range(int(end_s / step_s) + 2)]
        groups = [("completed", phase["ends_s"], BLUE), ("refused (429)", phase["refused_s"], GREY)]
        shown = [one for one in groups if one[1]]
        axis.hist(
            [times for _, times, _ in shown],
            bins=edges,
            weights=[[1 / step_s] * len(times) for _, times, _ in shown],
            stacked=True,
            color=[colour for *_, colour in shown],
            label=[label for label, *_ in shown],
        )
        axis.axhline(phase["rate"], color=ORANGE, linewidth=1.2, linestyle="--", label="offered")
        summary = phase["summary"]
        axis.set_title(
            f"{name}: {summary['share_within']:.1%} of the admitted within targets, {summary['num_errors']} errors",
            loc="left",
            fontsize=10,
        )
        axis.set_ylabel("requests/s")
        _plain(axis)
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes[-1, 0].set_xlabel("time (s)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _plain(axis: Any) -> None:
    axis.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def draw_plan(planned: Sequence[Verdict], path: Path) -> None:
    """Write a PNG of every planned figure over its target: left of the line a target is met.

    Throughput is drawn as target over figure, so that left is better there too.
    """
    plt = _pyplot()
    shown = [(one, share) for one in planned if (share := share_of_target(one)) is not None]
    figure, axis = plt.subplots(figsize=(9, 0.32 * len(shown) + 1.2), layout="constrained")
    labels = [f"{one.scenario} {one.requirement}, {one.hardware}" for one, _ in shown]
    axis.barh(
        range(len(shown)), [share for _, share in shown], color=[BLUE if one.holds else ORANGE for one, _ in shown]
    )
    for place, (one, share) in enumerate(shown):
        axis.annotate(
            f"{one.shown} ({one.target})",
            (share, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axis.axvline(1.0, color="#c2554d", linewidth=1, linestyle=":")
    axis.set_yticks(range(len(shown)), labels, fontsize=8)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_xlim(0, 1.45 * max([1.0, *(share for _, share in shown)]))
    axis.set_xlabel("share of the target; blue: met")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def share_of_target(one: Verdict) -> float | None:
    """Figure over target, or for what shall be large target over figure: at most 1 where it is met. None of nothing."""
    found = re.search(r"\d+(\.\d+)?", one.target)
    if not one.planned or found is None:
        return None
    number = float(found.group())
    figure = one.planned * {"ttft": 1e3, "tpot": 1e3, "memory": 1e2, "throughput": 1.0}[one.requirement]
    return number / figure if one.requirement == "throughput" else figure / number
