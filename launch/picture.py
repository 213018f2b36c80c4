"""The picture of a run: reward, response length and where the time went, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.history import StepRecord

BLUE, ORANGE, GREEN, GREY = "#2f6fb0", "#d9822b", "#4a9c6d", "#9aa0a6"


def draw(steps: Sequence[StepRecord], path: Path, title: str, evals: tuple[float, float] | None = None) -> None:
    """Write a PNG of three panels.

    Args:
        steps: At least one step.
        path: Where to write.
        title: Shown above.
        evals: Mean held-out reward before and after, drawn as marks at both ends of the reward panel.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (reward, length, time) = plt.subplots(
        3, 1, figsize=(9, 9.5), sharex=True, height_ratios=(3, 2.4, 2.4), layout="constrained"
    )
    figure.suptitle(title, fontsize=13, fontweight="bold")
    x = [record.step for record in steps]
    _reward(reward, x, steps, evals)
    length.plot(x, [s.length_mean for s in steps], color=BLUE, marker="o", markersize=3.5, label="mean")
    length.plot(x, [s.length_p95 for s in steps], color=ORANGE, linestyle="--", linewidth=1.4, label="95th percentile")
    length.set_ylabel("response length (tokens)")
    length.set_ylim(bottom=0)
    _times(time, x, steps)
    time.set_xlabel("step")
    time.xaxis.get_major_locator().set_params(integer=True)
    for axis in (reward, length, time):
        axis.grid(axis="y", color="#e3e5e8", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _reward(axis: Any, x: list[int], steps: Sequence[StepRecord], evals: tuple[float, float] | None) -> None:
    axis.plot(x, [s.reward_mean for s in steps], color=BLUE, marker="o", markersize=3.5, label="reward, mean")
    axis.plot(x, [s.exact_rate for s in steps], color=GREEN, linestyle="--", linewidth=1.4, label="exactly right")
    if evals is not None:
        axis.scatter(
            [x[0] - 0.5, x[-1] + 0.5],
            evals,
            color=ORANGE,
            marker="D",
            s=42,
            zorder=3,
            label="held-out,\nbefore and after",
        )
        for place, value in zip((x[0] - 0.5, x[-1] + 0.5), evals, strict=True):
            axis.annotate(f"{value:.2f}", (place, value), textcoords="offset points", xytext=(0, 8), ha="center")
    axis.set_ylabel("reward")
    axis.set_ylim(0, 1.05 if max(s.reward_mean for s in steps) <= 1 else None)


def _times(axis: Any, x: list[int], steps: Sequence[StepRecord]) -> None:
    bottom = [0.0] * len(steps)
    for name, color in (("rollout", BLUE), ("train", ORANGE), ("sync", GREEN), ("save", GREY)):
        values = [getattr(s, f"{name}_s") for s in steps]
        axis.bar(x, values, bottom=bottom, color=color, width=0.75, label=name)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    axis.set_ylabel("time (s)")
