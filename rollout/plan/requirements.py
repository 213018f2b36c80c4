"""Which requirements hold, on how many of which GPU: planned figures, row by row.

Owns the rows. What is compared with what is in `judge`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rollout.errors import InvalidRequest
from rollout.plan.calibration import calibrated
from rollout.plan.candidate import TENSOR_RANKS
from rollout.plan.drafts import Draft
from rollout.plan.judge import Judged, drafts, judge, smallest
from rollout.plan.search import RELAXED, Fleet, limit_of, plans
from rollout.plan.workload import SCENARIOS, Targets, Workload
from rollout.simulate.accelerators import ACCELERATORS
from rollout.simulate.costs import QWEN3_235B_A22B, Efficiency, MoeShape

GPUS = (8, 16, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One requirement of one scenario on one fleet.

    Attributes:
        scenario, requirement: Which; requirements are ttft, tpot, memory and throughput.
        target: In words.
        planned: Seconds, seconds, ratio to bfloat16, ratio to the baseline. None: the baseline fits these GPUs not.
        shown: The same in words.
        holds: Whether the target is kept.
        hardware: Number and kind of GPUs.
        limit: What takes most of the time, or of the memory.
        note: Where it does not hold, what would.
        is_close: The target lies within the error of the model's fit.
        source: "planned": computed, not measured.
    """

    scenario: str
    requirement: str
    target: str
    planned: float | None
    shown: str
    holds: bool
    hardware: str
    limit: str
    note: str = ""
    is_close: bool = False
    source: str = "planned"


def verdicts(
    accelerators: Sequence[str] = ("h200",),
    gpus: Sequence[int] = GPUS,
    scenarios: Iterable[Workload] = SCENARIOS,
    efficiency: Efficiency | None = None,
    shape: MoeShape = QWEN3_235B_A22B,
    targets: Targets | None = None,
    speculated: tuple[Draft, ...] | None = None,
) -> list[Verdict]:
    """Judge every scenario on every kind of accelerator.

    Args:
        accelerators: Keys of ACCELERATORS.
        gpus: Fleets, smallest first. The first on which all four requirements hold is told of; if there is none,
            the first on which most do.
        scenarios: What is to be served.
        efficiency: Of the data sheets; None = fitted to published figures.
        shape: Of the model.
        targets: None = those of the requirements.
        speculated: Drafts that are tried; None = those that `judge.drafts` assumes.

    Raises:
        InvalidRequest: An unknown accelerator, or no fleet.
    """
    unknown = [name for name in accelerators if name not in ACCELERATORS]
    if unknown or not gpus:
        raise InvalidRequest("accelerators, gpus", (unknown, gpus), f"some of {', '.join(ACCELERATORS)}; numbers")
    wanted = targets or Targets()
    reached = efficiency or calibrated().efficiency
    found = []
    for workload in scenarios:
        for name in accelerators:
            fleets = [Fleet(gpu=ACCELERATORS[name], num_gpus=n, efficiency=reached, shape=shape) for n in gpus]
            found += rows(smallest(fleets, workload, wanted, speculated or drafts()), wanted)
    return found


def rows(judged: Judged, targets: Targets) -> list[Verdict]:
    """The four requirements of a scenario on a fleet."""
    held, plan = judged.held(targets), judged.plan
    hardware = f"{judged.fleet.num_gpus} × {judged.fleet.gpu.name}"
    ttft = tpot = None
    limits = dict.fromkeys(held, "the weights do not fit")
    if plan is not None:
        ttft, tpot = plan.steady.ttft_s, plan.steady.tpot_s
        slowest = limit_of(plan)
        share = plan.ledger.weights / plan.ledger.limit
        limits = {
            "ttft": f"a prompt alone takes {plan.steady.prefill_s * 1e3:,.0f} ms",
            "tpot": slowest,
            "memory": f"weights are {share:.0%} of what a GPU may hold",
            "throughput": slowest,
        }
    faster = judged.throughput_ratio
    if plan is not None and faster is None:
        limits["throughput"] = "bf16 does not fit these GPUs: there is no baseline"
    notes = _notes(judged, targets, held)
    figures = {"ttft": ttft, "tpot": tpot, "memory": judged.memory_ratio, "throughput": faster}
    bounds = {
        "ttft": targets.ttft_s,
        "tpot": targets.tpot_s,
        "memory": targets.memory_ratio,
        "throughput": targets.throughput_ratio,
    }
    wanted = {
        "ttft": f"≤ {targets.ttft_s * 1e3:.0f} ms",
        "tpot": f"≤ {targets.tpot_s * 1e3:.0f} ms",
        "memory": f"≤ {targets.memory_ratio:.0%} of bf16",
        "throughput": f"≥ {targets.throughput_ratio:g} × bf16",
    }
    return [
        Verdict(
            scenario=judged.workload.name,
            requirement=name,
            target=wanted[name],
            planned=figures[name],
            shown=shown(name, figures[name]),
            holds=held[name],
            hardware=hardware,
            limit=limits[name],
            note=notes.get(name, ""),
            is_close=_is_close(name, figures[name], bounds[name]),
        )
        for name in held
    ]


def _is_close(requirement: str, figure: float | None, bound: float) -> bool:
    """Whether a figure of time is nearer to its bound than the model is to what was published; bytes are exact."""
    if figure is None or requirement == "memory":
        return False
    return abs(math.log(figure / bound)) < calibrated().error


def _notes(judged: Judged, targets: Targets, held: dict[str, bool]) -> dict[str, str]:
    """What would make the requirements hold that do not."""
    fleet, workload, plan = judged.fleet, judged.workload, judged.plan
    if plan is None:
        return {}
    notes = {}
    if not held["ttft"]:
        notes["ttft"] = _first_token_note(judged, targets)
    if held["ttft"] and not held["throughput"] and judged.throughput_ratio is not None:
        later = replace(targets, ttft_s=RELAXED * targets.ttft_s)
        loose = judge(fleet, workload, later, judged.choices)
        if loose.throughput_ratio is not None:
            notes["throughput"] = f"{loose.throughput_ratio:.2f} × where a first token may take {later.ttft_s:g} s"
    return notes


def _first_token_note(judged: Judged, targets: Targets) -> str:
    choices = replace(judged.choices, tensor_ranks=TENSOR_RANKS)
    found = [p for p in plans(judged.fleet, judged.workload, choices) if p.steady.tpot_s <= targets.tpot_s]
    if not found:
        return "no configuration keeps the time of a token either"
    kept = [p for p in found if p.steady.ttft_s <= targets.ttft_s]
    if not kept:
        least = min(found, key=lambda p: p.steady.ttft_s)
        ranks = least.candidate.tensor_ranks
        return f"at least {least.steady.ttft_s * 1e3:,.0f} ms on these GPUs, tensor parallel {ranks}"
    best = max(kept, key=lambda p: p.steady.tokens_per_s_per_gpu)
    speed = f"{best.steady.tokens_per_s_per_gpu:,.0f} tokens/s/GPU"
    if best.candidate.tensor_ranks == 1:
        return f"kept at {best.candidate.batch} sequences a GPU, {speed}"
    return f"would be kept with tensor parallelism {best.candidate.tensor_ranks}, which is not run: {speed}"


def shown(requirement: str, figure: float | None) -> str:
    """A figure with its unit."""
    if figure is None:
        return "none"
    if requirement in ("ttft", "tpot"):
        return f"{figure * 1e3:,.1f} ms"
    return f"{figure:.0%}" if requirement == "memory" else f"{figure:.2f} ×"
