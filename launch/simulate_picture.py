"""The picture of a simulation: how full every shard was, and how many trajectories had ended, policy by policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rollout.simulate.outcome import Run

COLOURS = {"static": "#9aa0a6", "partial": "#d9822b", "divided": "#2f6fb0"}
OTHERS = ("#2e8b57", "#7b4fa3", "#b03a48", "#5b8c85", "#8a6d3b")  # for rows with speculation, in order
MAX_ROWS = 64  # of shards drawn; more are averaged with their neighbours
NUM_COLUMNS = 480


def draw(runs: Mapping[str, Run], path: Path, title: str) -> None:
    """Write a PNG: one heat map for each policy over the same time axis, and the curves of what had ended.

    Args:
        runs: By name, at least one: a policy, with or without speculation.
        path: Where to write.
        title: Shown above.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    end_s = max(run.outcome.makespan_s for run in runs.values())
    rasters = {
        policy: run.timeline.raster(
            run.outcome.makespan_s, MAX_ROWS, max(1, round(NUM_COLUMNS * run.outcome.makespan_s / end_s))
        )
        for policy, run in runs.items()
    }
    brightest = max(float(raster.max()) for raster in rasters.values())
    heights = [2.0] * len(runs) + [2.6]
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(10, 1.0 + sum(heights)), sharex=True, height_ratios=heights, layout="constrained"
    )
    figure.suptitle(title, fontsize=12, fontweight="bold")
    image: Any = None
    for axis, (policy, raster) in zip(axes, rasters.items(), strict=False):
        outcome = runs[policy].outcome
        num_shards = len(runs[policy].timeline)
        extent = (0, outcome.makespan_s, num_shards, 0)
        image = axis.imshow(
            raster, aspect="auto", extent=extent, vmin=0, vmax=brightest, cmap="viridis", interpolation="nearest"
        )
        axis.set_title(
            f"{policy}: {outcome.makespan_s:,.0f} s, {outcome.tokens_per_s_per_gpu:,.0f} tokens/s a GPU, "
            f"tail {outcome.tail_ratio:.0%}, idle {outcome.idle_share:.0%}",
            loc="left",
            fontsize=10,
        )
        per_row = "" if num_shards <= MAX_ROWS else f"\n({num_shards / len(raster):.0f} a row)"
        axis.set_ylabel(f"shard{per_row}")
        axis.set_xlim(0, end_s)
    figure.colorbar(image, ax=list(axes[:-1]), label="sequences running", pad=0.01)
    _curves(axes[-1], runs)
    axes[-1].set_xlim(0, end_s)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curves(axis: Any, runs: Mapping[str, Run]) -> None:
    others = [name for name in runs if name not in COLOURS]
    colours = COLOURS | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}
    for policy, run in runs.items():
        share = np.arange(1, len(run.finished_s) + 1) / len(run.finished_s)
        axis.plot(run.finished_s, 100 * share, color=colours[policy], label=policy, linewidth=1.8)
        axis.axvline(run.outcome.makespan_s, color=colours[policy], linewidth=0.9, linestyle=":")
    axis.set_ylabel("trajectories ended (%)")
    axis.set_xlabel("time (s); dotted: the last one")
    axis.set_ylim(0, 102)
    axis.grid(color="#e3e5e8", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
