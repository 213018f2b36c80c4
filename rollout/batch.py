"""From finished groups to padded micro-batches for every rank.

Owns which trajectories are trained on, their advantages and loss weights, and how they are cut into
mini-batches (one optimizer step each), dealt to ranks and packed into micro-batches (one forward each).
Knows nothing of models, optimizers or how ranks talk. The result depends on the set of groups, not on
their order of arrival.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rollout.errors import InvalidRequest
from rollout.loss import group_advantages, token_weights
from rollout.routing import RoutingRef
from rollout.trainer_config import TrainerConfig
from rollout.types import Group, Status, Trajectory

TRAINABLE = (Status.COMPLETED, Status.TRUNCATED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A trajectory that is trained on.

    Attributes:
        trajectory: The tokens, their sampling log-probabilities and mask.
        advantage: Of every token.
        weight: Of each trained token in the loss of the samples it was normalised with: the whole batch
            after `select`, its mini-batch after `mini_batches`.
    """

    trajectory: Trajectory
    advantage: float
    weight: float

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return len(self.trajectory.prompt_token_ids) + len(self.trajectory.token_ids)

    @property
    def num_trained_tokens(self) -> int:
        return sum(self.trajectory.loss_mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What of a step's groups is trained on, and what was left out and why.

    Attributes:
        samples: Trained trajectories, longest first.
        num_failed_trajectories: Failed, aborted, unscored, empty, or with a reward or a log-probability
            that is not finite.
        num_equal_groups: Groups left out because all rewards are equal (dynamic filtering).
        num_unscored_groups: Groups left out because fewer than two members could be scored.
    """

    samples: tuple[Sample, ...]
    num_failed_trajectories: int
    num_equal_groups: int
    num_unscored_groups: int

    @property
    def num_filtered_groups(self) -> int:
        return self.num_equal_groups + self.num_unscored_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward and backward: right-padded sequences of similar length.

    Logits at position p predict token p + 1. T counts targets: tokens first_target … L − 1.

    Attributes:
        input_ids: int64 [B, L], padded with 0 on the right.
        lengths: int64 [B], tokens of each sequence.
        first_target: Index of the first token any sequence generated, ≥ 1.
        sampling_logprobs: float32 [B, T], 0 where nothing is trained.
        weights: float32 [B, T], 0 where nothing is trained.
        advantages: float32 [B, 1].
        versions: int64 [B, T], weight version each output token was sampled under, 0 elsewhere.
        routing: For each row where the experts of its tokens lie, in order; nothing where they were not captured.
        seeds: int64 [B], keys of the noise that the rows were sampled with.
    """

    input_ids: torch.Tensor
    lengths: torch.Tensor
    first_target: int
    sampling_logprobs: torch.Tensor
    weights: torch.Tensor
    advantages: torch.Tensor
    versions: torch.Tensor
    routing: tuple[tuple[RoutingRef, ...], ...]
    seeds: torch.Tensor

    @property
    def targets(self) -> torch.Tensor:
        return self.input_ids[:, self.first_target :]


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatch:
    """A rank's share of what one optimizer step is taken on.

    Attributes:
        batches: The same number on every rank.
        num_tokens: Tokens of all ranks' shares, prompts included (share of the router loss).
    """

    batches: tuple[MicroBatch, ...]
    num_tokens: int


def check_trajectory(trajectory: Trajectory) -> None:
    """Raise InvalidRequest when the per-token lists of a trajectory do not match."""
    sizes = (len(trajectory.token_ids), len(trajectory.logprobs), len(trajectory.loss_mask))
    if len(set(sizes)) != 1:
        raise InvalidRequest(
            f"trajectory {trajectory.trajectory_id} token_ids / logprobs / loss_mask",
            f"lengths {sizes}",
            "three equal lengths",
        )


def _is_scored(trajectory: Trajectory) -> bool:
    check_trajectory(trajectory)
    reward = trajectory.reward
    return (
        trajectory.status in TRAINABLE
        and reward is not None
        and math.isfinite(reward)
        and any(trajectory.loss_mask)
        and all(map(math.isfinite, trajectory.logprobs))
    )


def select(groups: Sequence[Group], config: TrainerConfig, max_tokens: int) -> Selection:
    """Choose the trajectories to train on, with advantages and loss weights over the whole batch.

    Args:
        groups: The step's groups; ids are unique.
        config: Advantage, filtering and aggregation options.
        max_tokens: Longest output allowed (divisor of the fixed-length aggregation).

    Raises:
        InvalidRequest: If a group is repeated or unfinished, or a trajectory's lists do not match.
    """
    if len({group.group_id for group in groups}) != len(groups):
        raise InvalidRequest("groups", "a repeated group_id", "each group once")
    kept: list[tuple[Trajectory, float]] = []
    num_failed = num_equal = num_unscored = 0
    for group in sorted(groups, key=lambda g: g.group_id):
        if not group.is_finished:
            raise InvalidRequest(f"group {group.group_id}", "a pending trajectory", "a finished group")
        scored = [t for t in group.trajectories if _is_scored(t)]
        num_failed += len(group.trajectories) - len(scored)
        rewards = [t.reward for t in scored if t.reward is not None]
        if len(scored) < 2:
            num_unscored += 1
        elif config.dynamic_filtering and min(rewards) == max(rewards):
            num_equal += 1
        else:
            kept += zip(scored, group_advantages(rewards, normalise_std=config.normalise_std), strict=True)
    weights = token_weights([sum(t.loss_mask) for t, _ in kept], config.loss_aggregation, max_tokens)
    samples = [Sample(trajectory=t, advantage=a, weight=w) for (t, a), w in zip(kept, weights, strict=True)]
    samples.sort(key=lambda s: (-s.num_tokens, s.trajectory.group_id, s.trajectory.sample_index))
    return Selection(
        samples=tuple(samples),
        num_failed_trajectories=num_failed,
        num_equal_groups=num_equal,
        num_unscored_groups=num_unscored,
    )


def deal(samples: Sequence[Sample], num_ranks: int) -> list[list[Sample]]:
    """Deal samples, longest first, to ranks there and back, so that token counts stay close."""
    hands: list[list[Sample]] = [[] for _ in range(num_ranks)]
    for i, sample in enumerate(samples):
        lap, place = divmod(i, num_ranks)
        hands[place if lap % 2 == 0 else num_ranks - 1 - place].append(sample)
    return hands


def mini_batches(samples: Sequence[Sample], config: TrainerConfig, max_tokens: int) -> list[list[Sample]]:
    """Cut a batch into what each optimizer step is taken on, with weights normalised over the mini-batch.

    Samples are dealt by length, so that every mini-batch has its share of long and short ones. With
    fewer samples than updates_per_batch there is one mini-batch for each.

    Args:
        samples: Trained trajectories, longest first; at least one.
        config: Number of updates and aggregation.
        max_tokens: As in `select`.
    """
    parts = []
    for hand in deal(samples, min(config.updates_per_batch, len(samples))):
        weights = token_weights([s.num_trained_tokens for s in hand], config.loss_aggregation, max_tokens)
        parts.append([replace(sample, weight=weight) for sample, weight in zip(hand, weights, strict=True)])
    return parts


def cut(samples: Sequence[Sample], micro_batch_tokens: int) -> list[list[Sample]]:
    """Cut samples, longest first, so that count × longest ≤ micro_batch_tokens (a longer one goes alone)."""
    batches: list[list[Sample]] = []
    for sample in samples:
        if batches and batches[-1][0].num_tokens * (len(batches[-1]) + 1) <= micro_batch_tokens:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches


def pad(samples: Sequence[Sample]) -> MicroBatch:
    """Lay samples out in right-padded rows."""
    length = max(s.num_tokens for s in samples)
    first = min(len(s.trajectory.prompt_token_ids) for s in samples)
    batch = MicroBatch(
        input_ids=torch.zeros(len(samples), length, dtype=torch.int64),
        lengths=torch.tensor([s.num_tokens for s in samples]),
        first_target=first,
        sampling_logprobs=torch.zeros(len(samples), length - first),
        weights=torch.zeros(len(samples), length - first),
        advantages=torch.tensor([[s.advantage] for s in samples], dtype=torch.float32),
        versions=torch.zeros(len(samples), length - first, dtype=torch.int64),
        routing=tuple(s.trajectory.routed_experts for s in samples),
        seeds=torch.tensor([s.trajectory.seed for s in samples]),
    )
    for row, sample in enumerate(samples):
        t = sample.trajectory
        start = len(t.prompt_token_ids) - first
        stop = start + len(t.token_ids)
        mask = torch.tensor(t.loss_mask, dtype=torch.float32)
        batch.input_ids[row, : sample.num_tokens] = torch.tensor([*t.prompt_token_ids, *t.token_ids])
        batch.sampling_logprobs[row, start:stop] = torch.tensor(t.logprobs) * mask
        batch.weights[row, start:stop] = sample.weight * mask
        for span in t.weight_versions:
            batch.versions[row, start + span.start : start + span.stop] = span.version
    return batch


def empty_micro_batch() -> MicroBatch:
    """Two tokens of weight 0: lets a rank join the collectives of a forward and backward."""
    return MicroBatch(
        input_ids=torch.zeros(1, 2, dtype=torch.int64),
        lengths=torch.tensor([2]),
        first_target=1,
        sampling_logprobs=torch.zeros(1, 1),
        weights=torch.zeros(1, 1),
        advantages=torch.zeros(1, 1),
        versions=torch.zeros(1, 1, dtype=torch.int64),
        routing=((),),
        seeds=torch.zeros(1, dtype=torch.int64),
    )


def plan_ranks(samples: Sequence[Sample], num_ranks: int, micro_batch_tokens: int) -> list[list[MicroBatch]]:
    """Micro-batches of every rank, the same number on each.

    ZeRO-3 runs collectives in every forward and backward, so a rank with fewer micro-batches than
    the others gets empty ones.
    """
    ranks = [[pad(part) for part in cut(hand, micro_batch_tokens)] for hand in deal(samples, num_ranks)]
    most = max(len(batches) for batches in ranks)
    return [batches + [empty_micro_batch() for _ in range(most - len(batches))] for batches in ranks]


def plan_updates(samples: Sequence[Sample], config: TrainerConfig, max_tokens: int) -> list[list[MiniBatch]]:
    """The mini-batches of every rank, in the order of the optimizer steps; the same number on each rank."""
    ranks: list[list[MiniBatch]] = [[] for _ in range(config.num_ranks)]
    for part in mini_batches(samples, config, max_tokens):
        num_tokens = sum(sample.num_tokens for sample in part)
        plans = plan_ranks(part, config.num_ranks, config.micro_batch_tokens)
        for rank, batches in zip(ranks, plans, strict=True):
            rank.append(MiniBatch(batches=tuple(batches), num_tokens=num_tokens))
    return ranks
