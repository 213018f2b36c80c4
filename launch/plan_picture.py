"""The picture of a plan: what throughput costs in time per token, and where a step's time goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rollout.plan.candidate import BF16, int4
from rollout.plan.judge import Judged, drafts
from rollout.plan.search import Choices, Plan, frontier
from rollout.plan.workload import Targets

COLOURS = {"bf16": "#9aa0a6", "INT4 + INT8 KV": "#2f6fb0", "and speculation": "#4a9c6d"}
PARTS = {  # of a step, with their colours
    "host": ("fixed_s", "#9aa0a6"),
    "attention, head": ("attention_s", "#2f6fb0"),
    "prefill attention": ("scores_s", "#7fb2d9"),
    "KV": ("kv_s", "#d9822b"),
    "experts": ("experts_s", "#4a9c6d"),
    "all-to-all": ("exchange_s", "#b05f9e"),
    "all-reduce": ("reduce_s", "#c9a227"),
}
DRAFTING = "#5c4b8a"


def draw(judged: Sequence[Judged], path: Path) -> None:
    """Write a PNG: a row for each scenario.

    Args:
        judged: Scenarios on their fleets, at least one.
        path: Where to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(judged), 2, figsize=(12, 3.6 * len(judged)), width_ratios=(3, 2), layout="constrained", squeeze=False
    )
    figure.suptitle("planned, not measured", fontsize=11, color="#5f6368")
    for (curve, bars), one in zip(axes, judged, strict=True):
        _curves(curve, one)
        _bars(bars, one)
    last = axes[-1][1]
    last.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    for curve, bars in axes:
        for axis in (curve, bars):
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curves(axis: Any, judged: Judged) -> None:
    targets, flips = Targets(), judged.workload.is_training
    for name, choices in (
        ("bf16", Choices(precisions=(BF16,))),
        ("INT4 + INT8 KV", Choices(precisions=(int4(),), is_flipping=flips)),
        ("and speculation", Choices(precisions=(int4(),), drafts=drafts(), is_flipping=flips)),
    ):
        best = frontier(judged.fleet, judged.workload, choices)
        x = [plan.steady.tpot_s * 1e3 for plan in best]
        y = [plan.steady.tokens_per_s_per_gpu for plan in best]
        axis.plot(x, y, color=COLOURS[name], label=name, linewidth=1.8)
    axis.axvline(targets.tpot_s * 1e3, color="#5f6368", linewidth=1.0, linestyle=":")
    if judged.plan is not None:
        steady = judged.plan.steady
        axis.scatter([steady.tpot_s * 1e3], [steady.tokens_per_s_per_gpu], color="#202124", zorder=3, label="the plan")
    axis.set_xlim(0, 3.2 * targets.tpot_s * 1e3)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("time per output token (ms); dotted: the target")
    axis.set_ylabel("tokens/s a GPU")
    axis.grid(color="#e3e5e8", linewidth=0.8)
    fleet = judged.fleet
    axis.set_title(f"{judged.workload.name} on {fleet.num_gpus} × {fleet.gpu.name}", loc="left", fontsize=10)
    axis.legend(frameon=False, loc="upper right")


def _bars(axis: Any, judged: Judged) -> None:
    shown = [(name, plan) for name, plan in (("baseline", judged.baseline), ("plan", judged.plan)) if plan is not None]
    labels: set[str] = set()
    for place, (_, plan) in enumerate(shown):
        left = 0.0
        for part, seconds, colour in _parts(plan):
            axis.barh(place, seconds * 1e3, left=left, color=colour, label=None if part in labels else part)
            labels.add(part)
            left += seconds * 1e3
        gained = plan.candidate.draft.accept_length
        each = f" × {gained:.2f} tokens" if gained > 1 else ""
        axis.text(left, place, f" {plan.candidate.batch} sequences{each}", va="center", fontsize=9)
    axis.set_yticks(range(len(shown)), [name for name, _ in shown])
    axis.invert_yaxis()
    axis.margins(x=0.45)
    axis.set_xlabel("mean step (ms)")
    axis.set_title("where a step's time goes", loc="left", fontsize=10)


def _parts(plan: Plan) -> list[tuple[str, float, str]]:
    parts = [(part, getattr(plan.steady.terms, field), colour) for part, (field, colour) in PARTS.items()]
    return [part for part in [*parts, ("drafting", plan.steady.draft_s, DRAFTING)] if part[1] > 0]
