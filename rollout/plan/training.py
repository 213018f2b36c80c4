"""The rest of an RL step: how long rollouts and training take, and what weights and routing weigh on the way.

Owns the sums and the simulation of a step's rollouts by the service's own dispatcher. Knows nothing of how plans are
found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from rollout.errors import InvalidRequest, check_positive
from rollout.plan.candidate import BF16, Candidate
from rollout.plan.search import Fleet, Plan
from rollout.plan.steady import steady
from rollout.plan.workload import Workload
from rollout.routing import num_id_bits
from rollout.simulate.accelerators import ACCELERATORS, NETWORK_BYTES_PER_S, NODE_GPUS
from rollout.simulate.costs import MoeShape, RooflineCosts
from rollout.simulate.lengths import GroupWork, LengthModel, draw_groups
from rollout.simulate.scenario import Scenario
from rollout.simulate.simulation import Simulation

# Megatron on Qwen3-235B-A22B, 256 H800, full recomputation: https://github.com/alibaba/Pai-Megatron-Patch/issues/658.
# The H800's bfloat16 arithmetic is that of the H100. Log-probabilities of the old policy are not in it.
PUBLISHED_TRAIN_TOKENS_PER_S = 1540.0
PUBLISHED_TRAIN_GPU = "h100"
STALL_STEPS = 3.0  # of a flip; python -m launch.bench_sync measured a 99th percentile of 2.95 on the embedded engines


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a training step consumes.

    Attributes:
        prompts: Groups.
        trainer_gpus: Of the engines' kind, apart from them; 0 leaves training out.
        seed: Of the lengths that are drawn.
    """

    prompts: int = 256
    trainer_gpus: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("step", prompts=self.prompts)
        if self.trainer_gpus < 0:
            raise InvalidRequest("trainer_gpus", self.trainer_gpus, "0, or a number of GPUs")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Seconds and bytes of an RL step.

    Attributes:
        steady_s: Rollouts at the plan's steady speed; what would remain without a tail.
        longest_s: One trajectory of the full length with its engine to itself: no scheduling goes below it.
        rollout_s: Rollouts as the simulator runs them through the dispatcher; None where it was not asked.
        train_s: Forward, backward and optimizer; None without trainer GPUs.
        sync_bytes: A full publication, encoded; deltas are smaller.
        sync_s: To bring that to a group over its node's network cards.
        plain_sync_bytes: In bfloat16.
        stall_s: Of decoding, at a flip.
        routing_bytes: Of a token, as recorded.
        packed_routing_bytes: Of a token, as sent with a trajectory.
        step_routing_bytes: Of all trajectories of a step, packed.
    """

    steady_s: float
    longest_s: float
    rollout_s: float | None
    train_s: float | None
    sync_bytes: float
    sync_s: float
    plain_sync_bytes: float
    stall_s: float
    routing_bytes: int
    packed_routing_bytes: int
    step_routing_bytes: float

    @property
    def synchronous_s(self) -> float:
        """A step in which training waits for the rollouts, and the rollouts for training."""
        return (self.rollout_s or max(self.steady_s, self.longest_s)) + (self.train_s or 0.0) + self.stall_s

    @property
    def overlapped_s(self) -> float:
        """A step of staleness 1: rollouts of the next go on while this one is trained on."""
        return max(self.rollout_s or max(self.steady_s, self.longest_s), self.train_s or 0.0) + self.stall_s


def step_plan(plan: Plan, fleet: Fleet, workload: Workload, step: Step, rollout_s: float | None = None) -> StepPlan:
    """Of a plan; `rollout_s` from `simulated_s`, where that was run."""
    shape, candidate = fleet.shape, plan.candidate
    trajectories = step.prompts * workload.group_size
    tokens = trajectories * workload.mean_output
    alone = _alone(plan, fleet, workload)
    rate = PUBLISHED_TRAIN_TOKENS_PER_S * fleet.gpu.flops / ACCELERATORS[PUBLISHED_TRAIN_GPU].flops
    trained = trajectories * (workload.mean_output + workload.prompt_tokens)
    published = _model_bytes(candidate, fleet)
    packed = -(-shape.num_layers * shape.experts_per_token * num_id_bits(shape.num_experts) // 8)
    return StepPlan(
        steady_s=tokens / (plan.steady.tokens_per_s_per_gpu * fleet.num_gpus),
        longest_s=workload.output_tokens * alone,
        rollout_s=rollout_s,
        train_s=trained / (rate * step.trainer_gpus) if step.trainer_gpus else None,
        sync_bytes=published,
        sync_s=published / (NETWORK_BYTES_PER_S * min(candidate.ranks, NODE_GPUS)),
        plain_sync_bytes=_model_bytes(replace(candidate, precision=BF16), fleet),
        stall_s=STALL_STEPS * plan.steady.step_s,
        routing_bytes=shape.num_layers * shape.experts_per_token,
        packed_routing_bytes=packed,
        step_routing_bytes=packed * trained,
    )


def simulated_s(plan: Plan, fleet: Fleet, workload: Workload, step: Step, policy: str = "divided") -> float:
    """Seconds of a step's rollouts: the dispatcher's own decisions on the plan's engines, lengths drawn."""
    candidate = plan.candidate
    costs = RooflineCosts(candidate.ranks, fleet.gpu, fleet.shape, fleet.efficiency, candidate.layout())
    scenario = Scenario(
        gpus=fleet.num_gpus // candidate.tensor_ranks,
        shards_per_group=candidate.data_ranks,
        prompts=step.prompts,
        n_samples_per_prompt=workload.group_size,
        prompt_tokens=workload.prompt_tokens,
        output_tokens=workload.output_tokens,
        max_running=candidate.batch,
        kv_tokens=plan.ledger.kv_tokens,
        max_batched_tokens=candidate.chunk,
        spec_accept_length=candidate.draft.accept_length,
        spec_draft_tokens=candidate.draft.num_tokens,
        seed=step.seed,
    )
    return Simulation(scenario, policy, costs, plan.ledger.kv_tokens, _work(scenario)).run().outcome.makespan_s


def _work(scenario: Scenario) -> Iterator[GroupWork]:
    rng = np.random.default_rng([scenario.seed, 0])
    return draw_groups(
        LengthModel(),
        rng,
        0,
        scenario.prompts,
        scenario.n_samples_per_prompt,
        scenario.prompt_tokens,
        scenario.output_tokens,
    )


def _alone(plan: Plan, fleet: Fleet, workload: Workload) -> float:
    """Seconds a token of a sequence that has its group to itself."""
    candidate = replace(plan.candidate, batch=1)
    found = steady(candidate, workload, fleet.gpu, fleet.shape, fleet.efficiency)
    return plan.steady.tpot_s if found is None else min(found.tpot_s, plan.steady.tpot_s)


def _model_bytes(candidate: Candidate, fleet: Fleet) -> float:
    """Of the whole model, each tensor once, as it is served."""
    whole: MoeShape = fleet.shape
    layout = replace(candidate, ranks=1, tensor_ranks=1).layout()
    return RooflineCosts(1, fleet.gpu, whole, fleet.efficiency, layout).weight_bytes()
