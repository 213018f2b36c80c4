"""How many tokens a step a draft saves on held-out prompts, beside the yardsticks: as a table and as a record.

Owns which trees are tried. Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.table import Table

from rollout.speculation.clover import CloverDraft, TargetLayers
from rollout.speculation.clover_samples import DraftSample
from rollout.speculation.clover_simulation import Acceptance, TreeShape, simulate_draft, simulate_look_up

NGRAMS = ((5, 5), (2, 4), (1, 4))
"""Shortest and longest match of prompt look-up: vLLM's default, and looser ones that find more."""

TREE, CHAIN = "Clover-2, width {width}", "Clover-2, width 1"
UNKEYED = "Clover-2, width {width}, by probability"


def measure(
    draft: CloverDraft,
    target: TargetLayers,
    samples: Sequence[DraftSample],
    *,
    temperature: float,
    width: int,
    depth: int,
    budgets: Sequence[int],
) -> dict[str, Acceptance]:
    """Try the draft as a tree and as a chain of equal depth, and prompt look-up of that length.

    Args:
        draft: The model.
        target: The layers it shares.
        samples: Held-out trajectories, sampled with keyed noise.
        temperature: They were sampled at.
        width: Of the tree.
        depth: Of all.
        budgets: Nodes of further trees, one line each; the first line's is bounded by width and depth only.
    """
    whole = TreeShape(max_width=width, depth=depth, budget=width * depth)
    tree = TREE.format(width=width)
    shapes = {tree: whole, CHAIN: TreeShape(max_width=1, depth=depth, budget=depth)}
    shapes |= {f"{tree}, {budget} nodes": replace(whole, budget=budget) for budget in budgets}
    shapes[UNKEYED.format(width=width)] = replace(whole, is_keyed=False)
    done = simulate_draft(draft, samples, list(shapes.values()), target=target, temperature=temperature)
    lines = dict(zip(shapes, done, strict=True))
    for least, most in NGRAMS:
        name = f"prompt look-up, {least} to {most} tokens"
        lines[name] = simulate_look_up(samples, min_ngram=least, max_ngram=most, depth=depth)
    return lines


def table(lines: Mapping[str, Acceptance], title: str) -> Table:
    """One line for each drafter."""
    depth = max(len(one.by_depth) for one in lines.values())
    result = Table(title=title, title_justify="left")
    for heading in ("drafter", "tokens a step", "drafted a step", *(f"≥ {d + 1} taken" for d in range(depth))):
        result.add_column(heading, justify="left" if heading == "drafter" else "right")
    for name, one in lines.items():
        steps = max(one.num_steps, 1)
        shares = [f"{reached / steps:.0%}" for reached in one.by_depth]
        result.add_row(name, f"{one.tokens_per_step:.2f}", f"{one.num_drafted / steps:.1f}", *shares)
    return result


def record(lines: Mapping[str, Acceptance]) -> dict[str, Any]:
    """The same as JSON."""
    return {name: asdict(one) | {"tokens_per_step": one.tokens_per_step} for name, one in lines.items()}
