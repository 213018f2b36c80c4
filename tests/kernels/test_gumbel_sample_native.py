"""Keyed sampling compiled for CPUs: the reference's tokens and log-probabilities, alike in any batch, and checks."""

import math

import pytest
import torch

from kernels.gumbel_sample import GUMBEL_MAX, gumbel_noise, gumbel_sample
from kernels.gumbel_sample.native import native_sample
from kernels.gumbel_sample.reference import gumbel_sample_reference
from tests.kernels.native_cases import digests_on_threads, needs_vectors

pytestmark = needs_vectors

ULP = 2.0**-23  # of float32 at 1


def batch(rows: int, vocab_size: int, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocab_size, generator=generator)
    temperature = torch.rand(rows, generator=generator).add_(0.1)
    temperature[::5] = 0.0
    return logits, {
        "seeds": torch.randint(0, 2**63 - 1, (rows,), generator=generator),
        "positions": torch.randint(0, 2**40, (rows,), generator=generator),
        "temperature": temperature,
    }


def near_tie(logits: torch.Tensor, how: dict[str, torch.Tensor], row: int, tokens: tuple[int, int], lane: int) -> bool:
    """Whether two tokens' perturbed values differ by no more than the rounding of the noise and of the sum.

    Each float32 logarithm is within 4 units in the last place, of numbers up to GUMBEL_MAX; the sum is rounded once.
    """
    noise = gumbel_noise(how["seeds"][row : row + 1], how["positions"][row : row + 1], logits.shape[1], lane=lane)[0]
    values = [float(logits[row, t]) / float(how["temperature"][row]) + float(noise[t]) for t in tokens]
    return abs(values[0] - values[1]) <= 16 * ULP * max(GUMBEL_MAX, *map(abs, values))


@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 63, 64, 65, 512, 1000, 4096, 9001])
@pytest.mark.parametrize("lane", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("with_threshold", [False, True])
def test_tokens_and_logprobs_are_the_references(vocab_size: int, lane: int, with_threshold: bool) -> None:
    logits, how = batch(40, vocab_size)
    logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < 0.1] = -math.inf
    logits[7] = -math.inf
    threshold = torch.linspace(-9.0, 9.0, 40) if with_threshold else None
    expected, expected_logprobs = gumbel_sample_reference(logits, **how, threshold=threshold, lane=lane)
    tokens, logprobs = gumbel_sample(logits, **how, threshold=threshold, lane=lane)
    for row in (tokens != expected).nonzero().flatten().tolist():
        assert near_tie(logits, how, row, (int(tokens[row]), int(expected[row])), lane), f"row {row}"
    same = tokens == expected
    # A sum of V exponentials, each within some units in the last place, and the log of it; x itself is up to 100.
    torch.testing.assert_close(logprobs[same], expected_logprobs[same], rtol=0, atol=128 * ULP * 4)
    assert tokens[7] == 0 and logprobs[7] == -math.inf
    assert (logprobs <= 0).all()


def test_the_noise_is_that_of_the_reference_in_many_places() -> None:
    """Flat logits draw the token of the largest noise, so 64 tokens' noise decides each of 20,000 draws."""
    rows = 20_000
    how = {
        "seeds": torch.arange(rows) * 0x9E3779B97F4A7C1 & (2**63 - 1),
        "positions": torch.arange(rows) * 12345,
        "temperature": torch.ones(rows),
    }
    logits = torch.zeros(rows, 64)
    tokens, logprobs = gumbel_sample(logits, **how)
    noise = gumbel_noise(how["seeds"], how["positions"], 64)
    gap = noise.amax(1) - noise.gather(1, tokens[:, None]).squeeze(1)
    assert (gap <= 16 * ULP * GUMBEL_MAX).all()
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -math.log(64)), rtol=0, atol=8 * ULP * 8)


def test_the_only_token_left_is_certain() -> None:
    logits, how = batch(200, 50)
    only = torch.full_like(logits, -math.inf)
    only[:, 17] = logits[:, 17]
    tokens, logprobs = gumbel_sample(only, **how)
    assert (tokens == 17).all() and (logprobs == 0).all()


def test_the_lowest_of_equal_maxima_is_drawn() -> None:
    logits = torch.zeros(3, 100)
    logits[0, [40, 41, 90]] = 2.0
    logits[1, [99, 16]] = 2.0
    how = {"seeds": torch.zeros(3, dtype=torch.int64), "positions": torch.zeros(3, dtype=torch.int64)}
    tokens, _ = gumbel_sample(logits, **how, temperature=torch.zeros(3))
    assert tokens.tolist() == [40, 16, 0]


def test_a_row_has_the_same_bits_in_any_batch_and_layout() -> None:
    logits, how = batch(33, 777)
    wide = torch.full((33, 900), math.nan)
    wide[:, :777] = logits
    tokens, logprobs = gumbel_sample(logits, **how)
    strided = gumbel_sample(wide[:, :777], **how)
    assert torch.equal(strided[0], tokens) and torch.equal(strided[1], logprobs)
    for row in range(33):
        one = gumbel_sample(logits[row : row + 1], **{name: value[row : row + 1] for name, value in how.items()})
        assert one[0].item() == tokens[row] and one[1].item() == logprobs[row]
    every_second = {name: value[::2] for name, value in how.items()}
    assert torch.equal(gumbel_sample(logits[::2], **every_second)[1], logprobs[::2])


def test_the_number_of_threads_changes_nothing() -> None:
    program = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
from tests.kernels.test_gumbel_sample_native import batch
from kernels.gumbel_sample import gumbel_sample
logits, how = batch(19, 5000)
tokens, logprobs = gumbel_sample(logits, **how)
print(tokens.tolist(), logprobs.tolist())
"""
    assert len(digests_on_threads(program)) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("seeds", -1), ("positions", -5), ("temperature", -0.1), ("temperature", math.nan), ("temperature", 1e-45)],
)
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    logits, how = batch(4, 32)
    how[name][2] = value
    with pytest.raises(ValueError, match=name):
        gumbel_sample(logits, **how)


def test_it_is_what_float32_logits_are_sampled_with(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_sample() is not None
    monkeypatch.setattr("kernels.gumbel_sample.gumbel_sample_reference", None)
    logits, how = batch(4, 32)
    gumbel_sample(logits, **how)
    with pytest.raises(TypeError):
        gumbel_sample(logits.bfloat16(), **how)
