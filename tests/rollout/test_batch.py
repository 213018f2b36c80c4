"""Selection, packing and dealing: nothing lost or doubled, every rank equally often."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.batch import deal, empty_micro_batch, mini_batches, pad, plan_ranks, plan_updates, select
from rollout.errors import InvalidRequest
from rollout.trainer_config import LossAggregation, TrainerConfig
from rollout.types import Group, Prompt, Status, Trajectory

MAX_TOKENS = 50


def trajectory(group_id: str, index: int, reward: float | None, prompt=(7, 8), length=3) -> Trajectory:
    t = Trajectory(group_id=group_id, sample_index=index, seed=0, prompt_token_ids=tuple(prompt))
    t.token_ids = [10 + i for i in range(length)]
    t.logprobs = [-1.0 - i for i in range(length)]
    t.loss_mask = [1] * length
    t.move_to(Status.COMPLETED)
    t.reward = reward
    return t


def group(group_id: str, rewards: list[float | None], **kwargs) -> Group:
    return Group(
        group_id=group_id,
        prompt=Prompt(token_ids=(7, 8), prompt_id=group_id),
        trajectories=[trajectory(group_id, i, r, **kwargs) for i, r in enumerate(rewards)],
    )


def test_equal_groups_are_filtered_and_counted():
    groups = [group("a", [1.0, 0.0]), group("b", [1.0, 1.0])]
    got = select(groups, TrainerConfig(), MAX_TOKENS)
    assert {s.trajectory.group_id for s in got.samples} == {"a"}
    assert (got.num_equal_groups, got.num_filtered_groups, got.num_failed_trajectories) == (1, 1, 0)
    kept = select(groups, TrainerConfig(dynamic_filtering=False), MAX_TOKENS)
    assert len(kept.samples) == 4 and kept.num_filtered_groups == 0
    assert [s.advantage for s in kept.samples if s.trajectory.group_id == "b"] == [0.0, 0.0]


def test_failed_members_are_left_out_of_the_baseline():
    one = group("a", [1.0, 0.0, 5.0, None, float("nan")])
    one.trajectories[2].fail("reward raised")
    aborted = Trajectory(group_id="a", sample_index=5, seed=0, prompt_token_ids=(7, 8))
    aborted.move_to(Status.ABORTED)
    one.trajectories.append(aborted)
    got = select([one], TrainerConfig(normalise_std=False), MAX_TOKENS)
    assert sorted(s.advantage for s in got.samples) == [-0.5, 0.5]
    assert got.num_failed_trajectories == 4


def test_a_group_with_one_scored_member_is_left_out():
    got = select([group("a", [1.0, None])], TrainerConfig(), MAX_TOKENS)
    assert got.samples == () and (got.num_unscored_groups, got.num_failed_trajectories) == (1, 1)


def test_weights_are_those_of_what_is_left():
    got = select([group("a", [1.0, 0.0]), group("b", [1.0, 1.0], length=40)], TrainerConfig(), MAX_TOKENS)
    assert [s.weight for s in got.samples] == [1 / 6, 1 / 6]
    config = TrainerConfig(loss_aggregation=LossAggregation.FIXED_LENGTH)
    assert select([group("a", [1.0, 0.0])], config, MAX_TOKENS).samples[0].weight == 1 / (2 * MAX_TOKENS)


def test_bad_groups_are_refused():
    pending = group("a", [1.0, 0.0])
    pending.trajectories.append(Trajectory(group_id="a", sample_index=2, seed=0, prompt_token_ids=(1,)))
    with pytest.raises(InvalidRequest, match="pending"):
        select([pending], TrainerConfig(), MAX_TOKENS)
    with pytest.raises(InvalidRequest, match="repeated"):
        select([group("a", [1.0, 0.0])] * 2, TrainerConfig(), MAX_TOKENS)


def test_rows_line_up_with_their_targets():
    groups = [
        Group(
            group_id="a",
            prompt=Prompt(token_ids=(7, 8), prompt_id="a"),
            trajectories=[
                trajectory("a", 0, 1.0, prompt=(7, 8), length=4),
                trajectory("a", 1, 0.0, prompt=(7, 8), length=1),
            ],
        ),
        group("b", [1.0, 0.0], prompt=(1, 2, 3, 4), length=2),
    ]
    groups[0].trajectories[0].loss_mask[1] = 0
    batch = pad(select(groups, TrainerConfig(), MAX_TOKENS).samples)
    assert batch.first_target == 2 and batch.lengths.tolist() == [6, 6, 6, 3]
    assert batch.input_ids[0].tolist() == [7, 8, 10, 11, 12, 13]
    assert batch.targets[1].tolist() == [3, 4, 10, 11]
    w = 1 / 8
    assert batch.weights.tolist() == [
        pytest.approx(row) for row in ([w, 0, w, w], [0, 0, w, w], [0, 0, w, w], [w, 0, 0, 0])
    ]
    assert batch.sampling_logprobs.tolist() == [[-1, 0, -3, -4], [0, 0, -1, -2], [0, 0, -1, -2], [-1, 0, 0, 0]]
    assert batch.input_ids[3].tolist() == [7, 8, 10, 0, 0, 0]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=2, max_size=40),
    num_ranks=st.integers(1, 5),
    budget=st.integers(10, 400),
    seed=st.randoms(use_true_random=False),
)
def test_every_sample_lands_in_one_micro_batch(lengths, num_ranks, budget, seed):
    groups = [
        Group(
            group_id=f"{i:03d}",
            prompt=Prompt(token_ids=(7, 8), prompt_id="p"),
            trajectories=[trajectory(f"{i:03d}", 0, 1.0, length=n), trajectory(f"{i:03d}", 1, 0.0, length=n)],
        )
        for i, n in enumerate(lengths)
    ]
    samples = select(groups, TrainerConfig(), MAX_TOKENS).samples
    plans = plan_ranks(samples, num_ranks, budget)
    assert len({len(batches) for batches in plans}) == 1
    batches = [batch for rank in plans for batch in rank]
    assert sum(int((b.weights > 0).sum()) for b in batches) == 2 * sum(lengths)
    assert sum(float(b.weights.double().sum()) for b in batches) == pytest.approx(1.0, rel=1e-5)
    for batch in batches:
        rows, width = batch.input_ids.shape
        assert rows * width <= budget or rows == 1
    shares = [sum(s.num_tokens for s in hand) for hand in deal(samples, num_ranks)]
    assert max(shares) - min(shares) <= 2 * max(s.num_tokens for s in samples)

    seed.shuffle(groups)
    again = plan_ranks(select(groups, TrainerConfig(), MAX_TOKENS).samples, num_ranks, budget)
    for one, other in zip(batches, [b for rank in again for b in rank], strict=True):
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.weights, other.weights)


def test_the_empty_micro_batch_trains_nothing():
    batch = empty_micro_batch()
    assert batch.targets.shape == batch.weights.shape == (1, 1) and not batch.weights.any()


def groups_of(lengths: list[int]) -> list[Group]:
    """A group of two for each length; the second member is one token longer."""
    return [
        Group(
            group_id=f"{i:03d}",
            prompt=Prompt(token_ids=(7, 8), prompt_id="p"),
            trajectories=[trajectory(f"{i:03d}", j, float(j), length=n + j) for j in range(2)],
        )
        for i, n in enumerate(lengths)
    ]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    num_updates=st.integers(1, 7),
    aggregation=st.sampled_from(list(LossAggregation)),
    seed=st.randoms(use_true_random=False),
)
def test_mini_batches_partition_the_samples(lengths, num_updates, aggregation, seed):
    config = TrainerConfig(updates_per_batch=num_updates, loss_aggregation=aggregation, micro_batch_tokens=80)
    groups = groups_of(lengths)
    samples = select(groups, config, MAX_TOKENS).samples
    parts = mini_batches(samples, config, MAX_TOKENS)
    assert len(parts) == min(num_updates, len(samples))
    assert sorted(s.trajectory.trajectory_id for part in parts for s in part) == sorted(
        s.trajectory.trajectory_id for s in samples
    )
    sizes, tokens = [len(part) for part in parts], [sum(s.num_tokens for s in part) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and max(tokens) - min(tokens) <= 2 * samples[0].num_tokens
    for part in parts:
        num_trained = sum(s.num_trained_tokens for s in part)
        want = num_trained / (len(part) * MAX_TOKENS) if aggregation is LossAggregation.FIXED_LENGTH else 1.0
        assert sum(s.weight * s.num_trained_tokens for s in part) == pytest.approx(want)
    if num_updates == 1:
        assert parts == [list(samples)]

    seed.shuffle(groups)
    assert mini_batches(select(groups, config, MAX_TOKENS).samples, config, MAX_TOKENS) == parts


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20), num_updates=st.integers(1, 5))
def test_every_rank_gets_the_same_number_of_micro_batches_in_every_update(lengths, num_updates):
    config = TrainerConfig(num_ranks=3, updates_per_batch=num_updates, micro_batch_tokens=80)
    samples = select(groups_of(lengths), config, MAX_TOKENS).samples
    ranks = plan_updates(samples, config, MAX_TOKENS)
    assert len(ranks) == 3
    for shares in zip(*ranks, strict=True):
        assert len({(len(share.batches), share.num_tokens) for share in shares}) == 1
        batches = [batch for share in shares for batch in share.batches]
        assert sum(float(b.weights.double().sum()) for b in batches) == pytest.approx(1.0, rel=1e-5)
        assert sum(int(b.lengths.sum()) for b in batches if b.weights.any()) == shares[0].num_tokens
    assert sum(share.num_tokens for share in ranks[0]) == sum(s.num_tokens for s in samples)


def test_a_batch_is_updated_on_at_least_once():
    with pytest.raises(InvalidRequest, match="updates_per_batch"):
        TrainerConfig(updates_per_batch=0)
