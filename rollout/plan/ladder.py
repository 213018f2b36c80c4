"""What each optimisation brings: the best plan with one more of them at a time.

Owns the order, which is that of the requirements. Every rung is searched anew, so that each gets the batch and the
group size that suit it.
"""

from __future__ import annotations

from dataclasses import dataclass

from rollout.plan.candidate import int4
from rollout.plan.drafts import Draft
from rollout.plan.judge import baseline
from rollout.plan.search import Choices, Fleet, Plan, search
from rollout.plan.workload import Targets, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One configuration, and its best plan; None where it fits nowhere."""

    name: str
    plan: Plan | None


def ladder(
    fleet: Fleet, workload: Workload, targets: Targets, speculated: tuple[Draft, ...], tensor_ranks: tuple[int, ...]
) -> list[Rung]:
    """From plain bfloat16 to everything, and what more tensor parallelism would bring.

    Args:
        speculated: Drafts that are tried.
        tensor_ranks: Tried on the last rung, whether the service runs them or not.
    """
    flips = workload.is_training
    rungs = [Rung(name="bf16 (baseline)", plan=baseline(fleet, workload, targets))]
    for name, choices in (
        ("+ INT4 weights", Choices(precisions=(int4(kv_dtype="bfloat16"),), is_flipping=flips)),
        ("+ INT8 KV", Choices(precisions=(int4(),), is_flipping=flips)),
        ("+ speculation", Choices(precisions=(int4(),), drafts=speculated, is_flipping=flips)),
        (
            "+ tensor parallelism",
            Choices(precisions=(int4(),), drafts=speculated, is_flipping=flips, tensor_ranks=tensor_ranks),
        ),
    ):
        rungs.append(Rung(name=name, plan=search(fleet, workload, targets, choices)))
    return rungs
