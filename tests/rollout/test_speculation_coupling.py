"""Keyed sampling shared by target and drafters: same tokens, and chances that are chances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.gumbel_sample import gumbel_sample, truncation_threshold
from rollout.errors import InvalidRequest
from rollout.speculation.coupling import KeyedSampling, fit_error_scale

SAMPLINGS = [(0.0, None, 1.0), (0.7, None, 0.9), (1.0, 5, 1.0), (1.3, 9, 0.8), (1.0, None, 1.0)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SAMPLINGS)
def test_a_drafter_with_the_targets_logits_ranks_its_token_first(
    temperature: float, top_k: int | None, top_p: float
) -> None:
    logits = torch.randn(200, 37, generator=torch.Generator().manual_seed(1)) * 2
    sampling = KeyedSampling(seed=9, temperature=temperature, top_k=top_k, top_p=top_p)
    positions = list(range(5, 205))
    tokens, _ = sampling.sample(logits, positions)
    found, logprobs = sampling.candidates(logits, positions, width=4, error_scale=0.5)
    assert found.shape == logprobs.shape == (200, 4)
    assert torch.equal(found[:, 0], tokens)
    assert torch.all(logprobs[:, :-1] >= logprobs[:, 1:]) and torch.all(logprobs <= 0)
    # Another position has other noise: the ranking must be that of the position, not of the logits.
    if temperature:
        shifted, _ = sampling.candidates(logits, [position + 1 for position in positions], width=1, error_scale=0.5)
        assert (shifted[:, 0] != tokens).float().mean() > 0.3


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SAMPLINGS)
def test_samples_are_the_kernels(temperature: float, top_k: int | None, top_p: float) -> None:
    logits = torch.randn(64, 37, generator=torch.Generator().manual_seed(2)) * 2
    positions = list(range(64))
    temperatures = torch.full((64,), temperature)
    threshold = truncation_threshold(
        logits,
        temperature=temperatures,
        top_k=torch.full((64,), top_k or 0),
        top_p=torch.full((64,), top_p),
    )
    expected = gumbel_sample(
        logits,
        seeds=torch.full((64,), 2**40 + 3),
        positions=torch.tensor(positions),
        temperature=temperatures,
        threshold=threshold,
    )
    got = KeyedSampling(seed=2**40 + 3, temperature=temperature, top_k=top_k, top_p=top_p).sample(logits, positions)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_candidates_are_as_many_as_there_are_tokens() -> None:
    found, _ = KeyedSampling(seed=0).candidates(torch.zeros(2, 3), [1, 2], width=4, error_scale=1.0)
    assert sorted(found[0].tolist()) == [0, 1, 2]


def test_chances_are_right_where_errors_are_as_assumed_and_the_scale_is_found() -> None:
    """A target whose logits are the drafter's plus independent Gumbel errors of scale 1/2."""
    num_rows, scale = 4000, 0.5
    generator = np.random.default_rng(5)
    draft = torch.from_numpy(generator.normal(size=(num_rows, 40)).astype(np.float32)) * 2
    target = draft + torch.from_numpy(generator.gumbel(scale=scale, size=draft.shape).astype(np.float32))
    sampling, positions = KeyedSampling(seed=3, temperature=1.0), list(range(num_rows))
    drawn, _ = sampling.sample(target, positions)
    found, logprobs = sampling.candidates(draft, positions, width=4, error_scale=scale)
    for rank in range(4):
        hits = (found[:, rank] == drawn).double()
        chances = logprobs[:, rank].double().exp()
        # Hits are independent and each has its chance, so their sum is off by its standard deviation; four of them
        # are exceeded by one set of seeds in 16,000.
        deviation = float((chances * (1 - chances)).sum().sqrt())
        assert abs(float((hits - chances).sum())) < 4 * deviation
    ranks = sampling.ranks(draft, positions)
    # The scales tried are a factor of 2**(1/4) apart, and 4000 rows tell neighbours apart.
    assert fit_error_scale(ranks, drawn) == scale


def test_a_scale_needs_rows_and_ignores_tokens_that_were_cut() -> None:
    with pytest.raises(InvalidRequest, match="rows to fit"):
        fit_error_scale(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    ranks = torch.tensor([[0.0, 1.0, -np.inf], [2.0, 0.0, 1.0], [0.0, 0.2, 0.1]])
    with_cut = fit_error_scale(ranks, torch.tensor([2, 0, 0]))
    assert with_cut == fit_error_scale(ranks[1:], torch.tensor([0, 0]))
