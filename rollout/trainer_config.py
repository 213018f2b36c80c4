"""Options of the policy update: optimizer, loss, checkpoints, and what is done about the mismatch.

The sections `trainer` and `mismatch` of `rollout.config.RunConfig`; the same rules hold as there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rollout.errors import InvalidRequest, check_positive


class LossAggregation(str, Enum):
    """How token losses become one number."""

    TOKEN_MEAN = "token_mean"  # DAPO: every token of the batch weighs the same
    SEQUENCE_MEAN = "sequence_mean"  # GRPO: mean over tokens, then over sequences
    FIXED_LENGTH = "fixed_length"  # Dr. GRPO: sum over tokens / max_tokens, then over sequences


class Reference(str, Enum):
    """What the KL penalty is taken against."""

    NONE = "none"
    INITIAL = "initial"  # the weights the run started from


@dataclass(kw_only=True)
class DraftUpdateConfig:
    """How the draft model that travels with the weights (engine.speculation.draft_travels) follows the policy."""

    num_steps: int = 8  # distillation steps after each training step; 0 = it travels as it was
    lr: float = 5e-4  # AdamW step size, after a rise over the first 50 steps
    # Tokens of a step's trajectories, prompts included, of which each rank keeps hidden states and learns; random
    # trajectories where there are more. A bound on memory: tokens × hidden size × bytes of model.dtype.
    max_tokens: int = 16384
    batch_tokens: int = 2048  # padded tokens of one distillation step on one rank; a longer trajectory goes alone

    def __post_init__(self) -> None:
        check_positive("trainer.draft", lr=self.lr, max_tokens=self.max_tokens, batch_tokens=self.batch_tokens)
        if self.num_steps < 0:
            raise InvalidRequest("trainer.draft.num_steps", self.num_steps, "an integer ≥ 0 (0 = it is not trained)")


@dataclass(kw_only=True)
class TrainerConfig:
    """The policy update."""

    num_ranks: int = 2  # data-parallel ranks = Ray actors
    num_gpus_per_rank: float = 0.0  # GPUs of each rank; 0 = CPU with gloo
    zero_stage: int = 3  # DeepSpeed ZeRO stage, 1 to 3; 3 partitions parameters, gradients and optimizer
    num_steps: int = 20  # optimizer steps of the run
    prompts_per_step: int = 16  # groups trained on in one step
    over_sampling_batch_size: int | None = (
        None  # groups requested for a step; the excess is aborted; None = prompts_per_step
    )
    lr: float = 2e-4  # AdamW step size
    lr_warmup_steps: int = 0  # linear warm-up
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    weight_decay: float = 0.0  # AdamW
    max_grad_norm: float = 1.0  # gradient clipping
    micro_batch_tokens: int = 8192  # padded tokens of one forward/backward on one rank; bounds activation memory
    # Optimizer steps on one batch of groups: it is cut into that many mini-batches of whole trajectories. The ratio
    # is to the policy before the first of them, so with 1 and use_tis it is 1 and clipping has no effect.
    updates_per_batch: int = 1
    clip_low: float = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.28  # larger than clip_low = DAPO's clip-higher
    loss_aggregation: LossAggregation = LossAggregation.TOKEN_MEAN  # normalisation of the loss by length
    normalise_std: bool = True  # divide advantages by the group's standard deviation (GRPO); false = Dr. GRPO
    dynamic_filtering: bool = True  # leave out groups whose rewards are all equal; they are counted
    kl_reference: Reference = Reference.NONE  # model of the KL penalty
    kl_coef: float = 0.0  # weight of the KL penalty; > 0 needs a reference
    # Truncated importance sampling between sampling and training log-probabilities. false = PPO and GRPO as published:
    # no weight, the ratio itself is to the sampling log-probabilities, and clipping acts with one update too.
    use_tis: bool = True
    tis_cap: float = 2.0  # its cap; unused without use_tis
    router_aux_loss_coef: float = 0.0  # weight of the router's load-balancing loss
    # Use the experts chosen at sampling in every forward of the update (routing replay, R3); the router is trained for
    # them. Needs engine.enable_return_routed_experts. A trajectory whose routing was lost is trained without.
    replay_routing: bool = False
    draft: DraftUpdateConfig = field(default_factory=DraftUpdateConfig)  # of the draft model, where one travels
    seed: int = 0  # run seed: prompts, rollouts and initial state derive from it
    checkpoint_every: int = 5  # optimizer steps between checkpoints; the last step is always saved
    keep_checkpoints: int = 2  # older ones are deleted
    gradient_checkpointing: bool = (
        False  # recompute activations in the backward pass: less memory, about a third more time
    )
    start_timeout_s: float = 600.0  # longest wait for all ranks to have loaded the model
    distributed_timeout_s: float = (
        600.0  # a rank silent for this long in a collective, or a step longer than it, is taken for dead
    )
    deepspeed: dict[str, Any] = field(default_factory=dict)  # merged verbatim into the DeepSpeed configuration

    def __post_init__(self) -> None:
        check_positive(
            "trainer",
            num_ranks=self.num_ranks,
            num_steps=self.num_steps,
            lr=self.lr,
            prompts_per_step=self.prompts_per_step,
            micro_batch_tokens=self.micro_batch_tokens,
            updates_per_batch=self.updates_per_batch,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            tis_cap=self.tis_cap,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
            start_timeout_s=self.start_timeout_s,
            distributed_timeout_s=self.distributed_timeout_s,
        )
        if (self.kl_coef > 0) != (self.kl_reference is not Reference.NONE):
            raise InvalidRequest(
                "trainer.kl_coef / kl_reference",
                f"{self.kl_coef} with {self.kl_reference}",
                "a coefficient > 0 together with a reference, or 0 with none",
            )
        over = self.over_sampling_batch_size
        if over is not None and over < self.prompts_per_step:
            raise InvalidRequest(
                "trainer.over_sampling_batch_size", over, f"≥ prompts_per_step = {self.prompts_per_step}"
            )


class OverBudget(str, Enum):
    """What is done when a mismatch is over its budget."""

    WARN = "warn"  # say so in the log
    TIGHTEN = "tighten"  # replay the routing where it was captured, else halve tis_cap's distance to 1
    STOP = "stop"  # end the run before the update, naming cause, figure and budget


@dataclass(kw_only=True)
class MismatchBudget:
    """Most KL(sampling ‖ training) by cause, in nats a token; null = no limit. See rollout.mismatch for each cause."""

    all: float | None = None  # everything together
    weights: float | None = None  # rounding of the weights in the engine
    kv: float | None = None  # rounding of its KV cache
    routing: float | None = None  # other experts than at sampling
    staleness: float | None = None  # tokens sampled under older weights

    def __post_init__(self) -> None:
        limits = {"all": self.all, "weights": self.weights, "kv": self.kv}
        limits |= {"routing": self.routing, "staleness": self.staleness}
        check_positive("mismatch.budget_kl", **{name: limit for name, limit in limits.items() if limit is not None})


@dataclass(kw_only=True)
class MismatchConfig:
    """How the gap between sampling and training is measured by cause, and what is done about it."""

    every_steps: int = 0  # training steps between measurements, the first step included; 0 = never
    num_trajectories: int = 8  # of a step's batch, scored again with one cause changed at a time (about 4 forwards)
    budget_kl: MismatchBudget = field(default_factory=MismatchBudget)  # limits by cause
    action: OverBudget = OverBudget.WARN  # taken before the update when a figure is over its limit

    def __post_init__(self) -> None:
        check_positive("mismatch", num_trajectories=self.num_trajectories)
        if self.every_steps < 0:
            raise InvalidRequest("mismatch.every_steps", self.every_steps, "an integer ≥ 0 (0 = never)")
