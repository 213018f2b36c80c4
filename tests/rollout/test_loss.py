"""The policy loss: against hand-written formulas, and its independence of how a batch is split."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.loss import (
    group_advantages,
    importance_weights,
    k3,
    policy_loss,
    ratio_base,
    selected_logprobs,
    token_weights,
)
from rollout.lr_schedule import lr_at
from rollout.mismatch import NO_MISMATCH, measure
from rollout.train_metrics import StepSums
from rollout.trainer_config import LossAggregation


def test_advantages():
    assert group_advantages([1.0, 0.0], normalise_std=False) == [0.5, -0.5]
    got = group_advantages([1.0, 0.0, 0.0, 1.0], normalise_std=True)
    std = math.sqrt(4 * 0.25 / 3)
    assert got == pytest.approx([0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std], rel=1e-5)
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages([1.0], normalise_std=True)


def test_token_weights():
    lengths = [2, 6]
    assert token_weights(lengths, LossAggregation.TOKEN_MEAN, 10) == [1 / 8, 1 / 8]
    assert token_weights(lengths, LossAggregation.SEQUENCE_MEAN, 10) == [1 / 4, 1 / 12]
    assert token_weights(lengths, LossAggregation.FIXED_LENGTH, 10) == [1 / 20, 1 / 20]


def test_selected_logprobs_use_the_temperature():
    logits = torch.randn(2, 3, 11)
    targets = torch.randint(0, 11, (2, 3))
    want = torch.log_softmax(logits / 0.7, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(selected_logprobs(logits, targets, 0.7), want)


@pytest.mark.parametrize(
    ("ratio", "advantage", "want_loss", "is_clipped"),
    [
        (1.2, 1.0, -1.2, False),  # inside
        (1.5, 1.0, -1.28, True),  # raised further than clip-higher allows
        (1.5, -1.0, 1.5, False),  # the pessimistic side is never clipped
        (0.5, -1.0, 0.8, True),
        (0.5, 1.0, -0.5, False),
    ],
)
def test_clip(ratio, advantage, want_loss, is_clipped):
    logprob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    terms = policy_loss(
        logprob, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1), clip_low=0.2, clip_high=0.28
    )
    assert terms.loss.item() == pytest.approx(want_loss, rel=1e-6)
    assert bool(terms.clipped_sum) == is_clipped
    terms.loss.backward()
    assert (logprob.grad == 0).all() == is_clipped


def test_first_update_has_the_policy_gradient():
    logprobs = torch.randn(1, 3, requires_grad=True)
    weights = torch.tensor([[0.5, 0.5, 0.0]])
    policy_loss(logprobs, logprobs, torch.tensor([[2.0]]), weights, clip_low=0.2, clip_high=0.2).loss.backward()
    assert logprobs.grad.tolist() == [[-1.0, -1.0, 0.0]]


def test_the_ratio_is_to_the_sampling_policy_without_importance_weights():
    start = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    sampling = torch.tensor([[-1.5, -1.0]])
    decoupled = ratio_base(start, sampling, use_tis=True)
    assert torch.equal(decoupled, start) and not decoupled.requires_grad
    classical = ratio_base(start, sampling, use_tis=False)
    terms = policy_loss(start, classical, torch.ones(1, 1), torch.ones(1, 2), clip_low=0.2, clip_high=0.28)
    assert terms.clipped_sum == 1 and terms.ratio_sum.item() == pytest.approx(math.exp(0.5) + 1)
    assert terms.loss.item() == pytest.approx(-2.28)
    terms.loss.backward()
    assert start.grad.tolist() == [[0.0, -1.0]]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_huge_ratio_stays_finite(advantage):
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    old = torch.tensor([[-300.0]])
    terms = policy_loss(logprobs, old, torch.tensor([[advantage]]), torch.ones(1, 1), clip_low=0.2, clip_high=0.28)
    terms.loss.backward()
    assert terms.loss.isfinite() and logprobs.grad.tolist() == [[0.0]]


def test_sums_of_updates_add_but_losses_are_averaged():
    first = StepSums(loss=1.0, router_aux_loss=0.2, num_tokens=10, ratio=10.0, clipped=0.0, abs_gap_max=3.0)
    second = StepSums(loss=3.0, router_aux_loss=0.4, num_tokens=30, ratio=36.0, clipped=5.0, abs_gap_max=2.0)
    total = StepSums.over_updates([first, second])
    assert (total.loss, total.router_aux_loss) == (2.0, pytest.approx(0.3))
    assert (total.num_tokens, total.ratio, total.clipped, total.abs_gap_max) == (40, 46.0, 5.0, 3.0)
    assert StepSums.over_updates([second]) == second


def test_importance_weights_are_capped_and_scale_the_gradient():
    sampling = torch.tensor([[-1.0, -1.0]])
    train = torch.tensor([[-1.5, 3.0]], requires_grad=True)
    tis = importance_weights(train, sampling, cap=2.0)
    assert not tis.requires_grad
    torch.testing.assert_close(tis, torch.tensor([[math.exp(-0.5), 2.0]]))
    policy_loss(
        train, train, torch.ones(1, 1), torch.ones(1, 2), clip_low=0.2, clip_high=0.2, tis_weights=tis
    ).loss.backward()
    torch.testing.assert_close(train.grad, -tis)


def test_reference_penalty_pulls_towards_the_reference():
    logprobs = torch.tensor([[-2.0]], requires_grad=True)
    reference = torch.tensor([[-1.0]])
    terms = policy_loss(
        logprobs,
        logprobs,
        torch.zeros(1, 1),
        torch.ones(1, 1),
        clip_low=0.2,
        clip_high=0.2,
        reference_logprobs=reference,
        kl_coef=0.1,
    )
    assert terms.loss.item() == pytest.approx(0.1 * (math.e - 2))
    terms.loss.backward()
    assert logprobs.grad.item() < 0


def test_untrained_positions_do_not_matter_even_when_extreme():
    logprobs = torch.tensor([[-1.0, -1e4]], requires_grad=True)
    old = torch.tensor([[-1.0, 0.0]])
    tis = importance_weights(logprobs, torch.tensor([[-1.0, -200.0]]), 2.0)
    policy_loss(
        logprobs, old, torch.ones(1, 1), torch.tensor([[1.0, 0.0]]), clip_low=0.2, clip_high=0.2, tis_weights=tis
    ).loss.backward()
    assert logprobs.grad.tolist() == [[-1.0, 0.0]]


@given(st.sampled_from(list(LossAggregation)), st.integers(1, 5), st.integers(0, 2**31))
def test_gradient_does_not_depend_on_the_split(aggregation, num_parts, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (6,), generator=generator).tolist()
    weights = torch.zeros(6, 8, dtype=torch.float64)
    for row, (n, w) in enumerate(zip(lengths, token_weights(lengths, aggregation, 8), strict=True)):
        weights[row, :n] = w
    logprobs = torch.randn(6, 8, dtype=torch.float64, generator=generator)
    advantages = torch.randn(6, 1, dtype=torch.float64, generator=generator)

    def gradient(parts: int) -> torch.Tensor:
        leaf = logprobs.clone().requires_grad_()
        for rows in torch.arange(6).chunk(parts):
            policy_loss(
                leaf[rows], leaf[rows], advantages[rows], weights[rows], clip_low=0.2, clip_high=0.28
            ).loss.backward()
        return leaf.grad

    torch.testing.assert_close(gradient(num_parts), gradient(1), rtol=1e-12, atol=1e-15)


@given(st.floats(-3, 3))
def test_k3_is_never_negative(value):
    assert k3(torch.tensor(value, dtype=torch.float64)) >= 0


def test_k3_is_unbiased():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    expected = (p * k3(torch.log(q) - torch.log(p))).sum()
    torch.testing.assert_close(expected, (p * torch.log(p / q)).sum())


def test_mismatch_counts_trained_tokens_only_and_adds():
    train, sampling = torch.tensor([-1.0, -2.0, -9.0]), torch.tensor([-1.0, -2.5, 0.0])
    one = measure(train, sampling, torch.tensor([True, True, False]))
    assert one.num_tokens == 2 and one.abs_max == 0.5 and one.abs_mean == 0.25
    assert one.kl == pytest.approx((math.exp(0.5) - 1.5) / 2, rel=1e-6)
    assert one + NO_MISMATCH == one and (one + one).kl == pytest.approx(one.kl)
    assert measure(train, sampling, torch.zeros(3, dtype=torch.bool)) == NO_MISMATCH


def test_lr_warms_up_linearly_then_stays():
    assert [lr_at(step, 1.0, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert lr_at(0, 0.5, 0) == 0.5
