"""A scenario on a fleet: the plan, and the baseline that it is compared with.

Owns the comparison. A plan keeps INT4 weights, an INT8 KV cache and, where it pays, speculation. The baseline is the
best that plain continuous batching does on the same GPUs: bfloat16 weights and KV, no speculation, and the group
size, batch and chunk that suit it, under the same targets. Where the baseline cannot keep a target, that target is
dropped for it, which only makes it faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rollout.memory import KV_INT8
from rollout.plan.candidate import BF16, MAX_DRAFT, int4
from rollout.plan.drafts import NO_DRAFT, Draft
from rollout.plan.memory import ledger, peak_ratio
from rollout.plan.search import RELAXED, Choices, Fleet, Plan, search
from rollout.plan.workload import Targets, Workload
from rollout.simulate.costs import RooflineCosts
from rollout.simulate.speculation import IN_RL, chance_of

REQUIREMENTS = ("ttft", "tpot", "memory", "throughput")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A scenario on a fleet: what was tried, the plan, the baseline, and what they come to.

    There is no plan where the model does not fit, and no baseline where it does not in bfloat16.
    """

    workload: Workload
    fleet: Fleet
    choices: Choices
    plan: Plan | None
    baseline: Plan | None
    memory_ratio: float | None
    throughput_ratio: float | None

    def held(self, targets: Targets) -> dict[str, bool]:
        """Requirement by requirement."""
        if self.plan is None or self.memory_ratio is None:
            return dict.fromkeys(REQUIREMENTS, False)
        faster = self.throughput_ratio
        return {
            "ttft": self.plan.steady.ttft_s <= targets.ttft_s,
            "tpot": self.plan.steady.tpot_s <= targets.tpot_s,
            "memory": self.memory_ratio <= targets.memory_ratio,
            "throughput": faster is not None and faster >= targets.throughput_ratio,
        }


def drafts(accept_length: float = IN_RL.accept_length, draft_tokens: int = IN_RL.num_drafts) -> tuple[Draft, ...]:
    """None, and chains of up to MAX_DRAFT tokens, accepted as one of `draft_tokens` is that gains `accept_length`."""
    chance = chance_of(accept_length, draft_tokens)
    return (NO_DRAFT, *(Draft(num_tokens=n, chance=chance) for n in range(1, MAX_DRAFT + 1)))


def own_choices(
    workload: Workload,
    speculated: tuple[Draft, ...],
    tensor_ranks: tuple[int, ...] = (1,),
    kv_dtypes: tuple[str, ...] = (KV_INT8,),
) -> Choices:
    """What the service can be configured to; `kv_dtypes` as in rollout.memory."""
    return Choices(
        precisions=tuple(int4(kv_dtype=kv_dtype) for kv_dtype in kv_dtypes),
        tensor_ranks=tensor_ranks,
        drafts=speculated,
        is_flipping=workload.is_training,
    )


def judge(fleet: Fleet, workload: Workload, targets: Targets, choices: Choices) -> Judged:
    """Plan a scenario on a fleet and compare it with the baseline."""
    plan = search(fleet, workload, targets, choices)
    if plan is None:
        return Judged(
            workload=workload,
            fleet=fleet,
            choices=choices,
            plan=None,
            baseline=None,
            memory_ratio=None,
            throughput_ratio=None,
        )
    plain = baseline(fleet, workload, targets)
    own = plan.steady.tokens_per_s_per_gpu
    return Judged(
        workload=workload,
        fleet=fleet,
        choices=choices,
        plan=plan,
        baseline=plain,
        memory_ratio=memory_ratio(fleet, plan),
        throughput_ratio=None if plain is None else own / plain.steady.tokens_per_s_per_gpu,
    )


def baseline(fleet: Fleet, workload: Workload, targets: Targets) -> Plan | None:
    """The fastest plain configuration that keeps the targets; with looser ones, at last none, where none does."""
    plain: Plan | None = None
    for first, each in ((1.0, 1.0), (RELAXED, 1.0), (math.inf, 1.0), (math.inf, math.inf)):
        kept = replace(targets, ttft_s=first * targets.ttft_s, tpot_s=each * targets.tpot_s)
        plain = search(fleet, workload, kept, Choices(precisions=(BF16,)))
        if plain is None or plain.keeps(kept):
            break
    return plain


def memory_ratio(fleet: Fleet, plan: Plan) -> float:
    """Weights and KV of a GPU, of what bfloat16 would take in the same group.

    The load is what the bfloat16 GPU can just hold, as in launch.bench_memory; where its weights alone fill it, the
    load of the plan.
    """
    candidate = plan.candidate
    layout = replace(candidate, precision=BF16).layout()
    costs = RooflineCosts(candidate.ranks, fleet.gpu, fleet.shape, fleet.efficiency, layout)
    plain = ledger(costs, fleet.gpu, is_flipping=False)
    return peak_ratio(plan.ledger, plain, plain.kv_tokens or plan.ledger.kv_tokens)


def smallest(fleets: Sequence[Fleet], workload: Workload, targets: Targets, speculated: tuple[Draft, ...]) -> Judged:
    """The first fleet on which everything holds, else the first on which most does."""
    best: Judged | None = None
    for fleet in fleets:
        judged = judge(fleet, workload, targets, own_choices(workload, speculated))
        count = sum(judged.held(targets).values())
        if best is None or count > sum(best.held(targets).values()):
            best = judged
        if count == len(judged.held(targets)):
            break
    assert best is not None, "verdicts() has checked that there is a fleet"
    return best
