"""The best configuration of a fleet for a workload under its targets.

Owns the enumeration and the preference: most tokens per second of a GPU among what keeps the targets; where nothing
does, among what keeps the time per token, with a first token later than its target but not much later than it could
be; where nothing does that either, what comes nearest. Speculation and batch interact, so all combinations are
priced: some thousands of them, of tens of microseconds each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rollout.errors import InvalidRequest
from rollout.plan.candidate import BATCHES, CHUNKS, Candidate, Precision, groups
from rollout.plan.drafts import NO_DRAFT, Draft
from rollout.plan.memory import Ledger, ledger
from rollout.plan.steady import Steady, steady
from rollout.plan.workload import Targets, Workload
from rollout.simulate.accelerators import Accelerator
from rollout.simulate.costs import QWEN3_235B_A22B, Efficiency, MoeShape, RooflineCosts

# Where the target of the first token is out of reach, it may take so many times the target, or so many times the least
# that is possible, whichever is later.
RELAXED, RELAXED_LEAST = 5.0, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What is planned on.

    Attributes:
        gpu: Its accelerator.
        num_gpus: All of them for engines.
        efficiency: What is reached of the data sheet.
        shape: Of the model.
    """

    gpu: Accelerator
    num_gpus: int
    efficiency: Efficiency
    shape: MoeShape = QWEN3_235B_A22B


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What may be configured.

    Attributes:
        precisions: Of weights and KV.
        tensor_ranks: GPUs that share an attention. More than 1 is told of, but not run: see launch/checks.py.
        drafts: Speculation.
        is_flipping: Whether new weights are written into the served ones.
    """

    precisions: tuple[Precision, ...]
    tensor_ranks: tuple[int, ...] = (1,)
    drafts: tuple[Draft, ...] = (NO_DRAFT,)
    is_flipping: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A configuration, what it holds and what it does."""

    candidate: Candidate
    ledger: Ledger
    steady: Steady

    def keeps(self, targets: Targets) -> bool:
        return self.steady.ttft_s <= targets.ttft_s and self.steady.tpot_s <= targets.tpot_s


def search(fleet: Fleet, workload: Workload, targets: Targets, choices: Choices) -> Plan | None:
    """The best plan; None if the model fits in no group of the fleet."""
    found = list(plans(fleet, workload, choices))
    least_s = min((p.steady.ttft_s for p in found if p.steady.tpot_s <= targets.tpot_s), default=math.inf)
    latest_s = max(RELAXED * targets.ttft_s, RELAXED_LEAST * least_s)
    return max(found, key=lambda plan: _rank(plan, targets, latest_s), default=None)


def frontier(fleet: Fleet, workload: Workload, choices: Choices) -> list[Plan]:
    """Plans than which none is both faster a token and higher in throughput; by ascending time of a token."""
    best: list[Plan] = []
    for plan in sorted(
        plans(fleet, workload, choices), key=lambda p: (p.steady.tpot_s, -p.steady.tokens_per_s_per_gpu)
    ):
        if not best or plan.steady.tokens_per_s_per_gpu > best[-1].steady.tokens_per_s_per_gpu:
            best.append(plan)
    return best


def plans(fleet: Fleet, workload: Workload, choices: Choices) -> Iterator[Plan]:
    """Everything that fits and keeps up with its prefills."""
    for precision in choices.precisions:
        for blank in groups(fleet.num_gpus, fleet.shape, precision, choices.tensor_ranks):
            costs = RooflineCosts(blank.ranks, fleet.gpu, fleet.shape, fleet.efficiency, blank.layout())
            held = ledger(costs, fleet.gpu, choices.is_flipping)
            most = held.sequences(workload)
            for candidate in _sized(blank, most, choices.drafts):
                found = steady(candidate, workload, fleet.gpu, fleet.shape, fleet.efficiency, costs)
                if found is not None and math.isfinite(found.ttft_s):
                    yield Plan(candidate=candidate, ledger=held, steady=found)


def _sized(blank: Candidate, most: int, drafts: Sequence[Draft]) -> Iterator[Candidate]:
    sizes = [batch for batch in BATCHES if batch < most]
    sizes += [most] if 0 < most <= BATCHES[-1] else []
    for batch in sizes:
        for chunk in CHUNKS:
            yield from (replace(blank, batch=batch, chunk=chunk, draft=draft) for draft in drafts)


def _rank(plan: Plan, targets: Targets, latest_s: float) -> tuple[int, float]:
    found = plan.steady
    if found.tpot_s > targets.tpot_s:
        return 0, -found.tpot_s
    if found.ttft_s > latest_s:
        return 1, -found.ttft_s
    return (3 if found.ttft_s <= targets.ttft_s else 2), found.tokens_per_s_per_gpu


def limit_of(plan: Plan) -> str:
    """The largest part of a plan's mean step, in words, with its share."""
    terms, step_s = plan.steady.terms, plan.steady.step_s
    parts = {
        "host (scheduling, launches)": terms.fixed_s,
        "attention weights and projections": terms.attention_s,
        "prefill attention": terms.scores_s,
        "reading KV": terms.kv_s,
        "expert weights and arithmetic": terms.experts_s,
        "expert all-to-all": terms.exchange_s,
        "tensor-parallel all-reduce": terms.reduce_s,
        "drafting": plan.steady.draft_s,
    }
    name = max(parts, key=lambda part: parts[part])
    return f"{name}, {parts[name] / step_s:.0%} of a step"


def headroom(plan: Plan, fleet: Fleet, workload: Workload) -> float:
    """Speed of the same configuration if the data sheet were reached in full, by the planned one."""
    ideal = replace(fleet.efficiency, memory=1.0, kv=1.0, compute=1.0, link=1.0, collective_s=0.0, step_s=0.0, row_s=0)
    found = steady(plan.candidate, workload, fleet.gpu, fleet.shape, ideal)
    if found is None:
        raise InvalidRequest("plan", plan.candidate, "one that keeps up with its prefills")
    return found.tokens_per_s_per_gpu / plan.steady.tokens_per_s_per_gpu
