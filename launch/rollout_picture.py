"""The picture of a rollout bench: when each trajectory ran, policy by policy, and how many had finished."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.rollout_run import Timeline

COLOURS = {"vllm": "#c2554d", "static": "#9aa0a6", "partial": "#d9822b", "divided": "#2f6fb0"}
SHARD_COLOURS = ("#2f6fb0", "#d9822b", "#4a9c6d", "#8e6bb0")


def draw(timelines: Mapping[str, Timeline], path: Path, title: str) -> None:
    """Write a PNG: a bar from first to last token of every trajectory, and curves of what had finished.

    Args:
        timelines: By policy, at least one.
        path: Where to write.
        title: Shown above.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [2.6] * len(timelines) + [2.4]
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(10, sum(heights) + 0.8), sharex=True, height_ratios=heights, layout="constrained"
    )
    figure.suptitle(title, fontsize=12, fontweight="bold")
    for axis, (policy, timeline) in zip(axes, timelines.items(), strict=False):
        _bars(axis, timeline)
        axis.set_title(
            f"{policy}: {timeline.makespan_s:.1f} s, the last tenth in {timeline.tail_s:.1f} s, "
            f"{timeline.utilisation:.0%} of the slots in use",
            loc="left",
            fontsize=10,
        )
    _curves(axes[-1], timelines)
    axes[-1].set_xlabel("time (s); dotted: the last one")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axis: Any, timeline: Timeline) -> None:
    """One line a trajectory, in the order in which they began, coloured by the shard on which it ended."""
    bars = sorted(timeline.bars, key=lambda bar: bar.start_s)
    axis.barh(
        range(len(bars)),
        [bar.end_s - bar.start_s for bar in bars],
        left=[bar.start_s for bar in bars],
        height=1.0,
        color=[SHARD_COLOURS[bar.shard % len(SHARD_COLOURS)] for bar in bars],
    )
    axis.set_ylim(len(bars), 0)
    axis.set_ylabel("trajectory")
    axis.spines[["top", "right"]].set_visible(False)


def _curves(axis: Any, timelines: Mapping[str, Timeline]) -> None:
    for policy, timeline in timelines.items():
        share = [100 * (i + 1) / len(timeline.bars) for i in range(len(timeline.bars))]
        axis.step(timeline.ends_s, share, where="post", color=COLOURS.get(policy), label=policy, linewidth=1.8)
        axis.axvline(timeline.makespan_s, color=COLOURS.get(policy), linewidth=0.9, linestyle=":")
    axis.set_ylabel("trajectories finished (%)")
    axis.set_ylim(0, 102)
    axis.grid(color="#e3e5e8", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
