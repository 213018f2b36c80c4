"""The sampler as it is called: bits, noise, distribution, independence of the batch, truncation, checks.

On a CPU with AVX-512 that is the compiled one, which ``test_gumbel_sample_native.py`` compares with the reference, as
``test_gumbel_sample_triton.py`` does the Triton kernels.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kernels.gumbel_sample import (
    GUMBEL_MAX,
    GUMBEL_MIN,
    gumbel_noise,
    gumbel_sample,
    truncation_threshold,
)
from kernels.gumbel_sample.reference import philox4x32, uniform_from_bits

# Random123, tests/kat_vectors, lines "philox4x32 10": counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
# Chi-square tests reject a correct sampler with this probability; seeds are fixed, so none is flaky.
SIGNIFICANCE = 1e-4


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers: independent of the tensor code and its masks."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def draw(logits: torch.Tensor, num_draws: int, temperature: float, **cuts: torch.Tensor) -> torch.Tensor:
    """Draw from one row of logits at num_draws positions; return the counts [V]."""
    logits = logits.expand(num_draws, -1)
    rows_temperature = torch.full((num_draws,), temperature)
    threshold = None
    if cuts:
        one = truncation_threshold(logits[:1], temperature=rows_temperature[:1], **cuts)
        threshold = one.expand(num_draws)
    tokens, _ = gumbel_sample(
        logits,
        seeds=torch.full((num_draws,), 20240607),
        positions=torch.arange(num_draws),
        temperature=rows_temperature,
        threshold=threshold,
    )
    return tokens.bincount(minlength=logits.shape[1])


def random_batch(num_rows: int, vocab_size: int, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_rows, vocab_size, generator=generator)
    return logits, {
        "seeds": torch.randint(0, 2**63 - 1, (num_rows,), generator=generator),
        "positions": torch.randint(0, 2**40, (num_rows,), generator=generator),
        "temperature": torch.rand(num_rows, generator=generator).add_(0.1),
    }


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    output = philox4x32(
        tuple(torch.tensor([word]) for word in words(counter)),
        tuple(torch.tensor([word]) for word in words(key)),
    )
    assert [word.item() for word in output] == words(expected)
    assert philox_in_python(words(counter), words(key)) == words(expected)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**20))
@settings(deadline=None, max_examples=50)
def test_noise_follows_the_counter_layout(seed: int, position: int, lane: int, token: int) -> None:
    start = token // 4 * 4
    noise = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), 4, lane=lane, start=start)
    counter = [token // 4, position % 2**32, position >> 32, lane]
    bits = philox_in_python(counter, [seed % 2**32, seed >> 32])[token % 4]
    uniform = ((bits >> 9) + 0.5) * 2.0**-23
    # Two float32 logarithms, each within 4 units in the last place: the inner one's relative error
    # shifts the outer by as much, and the outer's own unit is at most 2**-19.
    assert noise[0, token % 4].item() == pytest.approx(-math.log(-math.log(uniform)), abs=2**-21 + 2**-17)


def test_extreme_uniforms_give_the_documented_bounds() -> None:
    uniform = uniform_from_bits(torch.tensor([0, 2**32 - 1]))
    assert uniform.tolist() == [2.0**-24, 1 - 2.0**-24]
    low, high = (-(-uniform.log()).log()).tolist()
    assert low == pytest.approx(GUMBEL_MIN, rel=2**-21)
    assert high == pytest.approx(GUMBEL_MAX, rel=2**-21)
    assert -2.8116 < GUMBEL_MIN < -2.8115 < 16.6355 < GUMBEL_MAX < 16.6356


def test_noise_has_the_gumbel_distribution_and_lanes_are_independent() -> None:
    seeds, positions = torch.tensor([5]), torch.tensor([2**33 + 1])
    noise = gumbel_noise(seeds, positions, 200_000)[0]
    other = gumbel_noise(seeds, positions, 200_000, lane=1)[0]
    assert stats.kstest(noise.numpy(), "gumbel_r").pvalue > SIGNIFICANCE
    # The correlation of n independent pairs is close to normal with deviation n**-1/2.
    assert abs(torch.corrcoef(torch.stack([noise, other]))[0, 1].item()) < 4 / math.sqrt(200_000)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("cut", ["none", "top_k", "top_p", "top_k+top_p+min_p"])
def test_tokens_follow_the_truncated_softmax(temperature: float, cut: str) -> None:
    num_draws = 120_000
    logits = 1.5 * torch.randn(1, 25, generator=torch.Generator().manual_seed(3))
    cuts = {
        "top_k": torch.tensor([9]),
        "top_p": torch.tensor([0.9]),
        "min_p": torch.tensor([0.02]),
    }
    cuts = {name: value for name, value in cuts.items() if name in cut}
    counts = draw(logits, num_draws, temperature, **cuts)

    floor = truncation_threshold(logits, temperature=torch.tensor([temperature]), **cuts)
    x = logits[0] * torch.tensor(temperature).reciprocal()
    expected = x.masked_fill(x < floor, -math.inf).double().softmax(-1) * num_draws
    assert counts[expected == 0].sum() == 0
    # Cells with few expected draws are pooled: the chi-square limit wants at least about 5 in each.
    rare = expected < 10
    observed = [*counts[~rare].tolist(), counts[rare].sum().item()]
    wanted = [*expected[~rare].tolist(), expected[rare].sum().item()]
    if wanted[-1] < 10:
        observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
    if len(wanted) > 1:
        assert stats.chisquare(observed, wanted).pvalue > SIGNIFICANCE


def test_the_most_extreme_parameters_that_requests_may_have() -> None:
    """Those at the ends of what `rollout.types.SamplingParams` allows: the engine must not end by them."""
    logits, keys = random_batch(3, 50, seed=4)
    keys["temperature"] = torch.tensor([1e-30, 1e30, 1.0])
    threshold = truncation_threshold(
        logits,
        temperature=keys["temperature"],
        top_k=torch.full((3,), 2**31 - 1, dtype=torch.int32),
        top_p=torch.full((3,), 2.0**-126),
    )
    tokens, logprobs = gumbel_sample(logits, **keys, threshold=threshold)
    assert tokens[0] == logits[0].argmax() and tokens[2] == logits[2].argmax() and 0 <= tokens[1] < 50
    assert not logprobs.isnan().any()


def test_noise_that_rows_share_is_drawn_once_and_is_the_same() -> None:
    """Ten rows of three places, some greedy, some truncated."""
    logits, keys = random_batch(10, 777, seed=3)
    rows, places = torch.tensor([0, 4, 9]), torch.tensor([0, 0, 1, 1, 1, 0, 2, 1, 0, 2])
    for name in ("seeds", "positions"):
        keys[name] = keys[name][rows][places]
    keys["temperature"][::3] = 0
    threshold = truncation_threshold(logits, temperature=keys["temperature"], top_k=torch.full((10,), 5))
    alone = gumbel_sample(logits, **keys, threshold=threshold)
    shared = gumbel_sample(logits, **keys, threshold=threshold, draws=(torch.tensor([0, 2, 6]), places))
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("vocab_size", [1, 3, 511, 512, 4095, 4096, 4097, 9001])
def test_a_row_is_independent_of_the_batch(vocab_size: int) -> None:
    logits, arguments = random_batch(16, vocab_size)
    arguments["temperature"][5] = 0.0
    threshold = truncation_threshold(logits, temperature=arguments["temperature"], top_p=torch.full((16,), 0.95))
    tokens, logprobs = gumbel_sample(logits, threshold=threshold, **arguments)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    for rows in [order, torch.arange(7), *torch.arange(16).split(1)]:
        part = {name: value[rows] for name, value in arguments.items()}
        part_threshold = truncation_threshold(
            logits[rows], temperature=part["temperature"], top_p=torch.full((len(rows),), 0.95)
        )
        part_tokens, part_logprobs = gumbel_sample(logits[rows], threshold=part_threshold, **part)
        assert torch.equal(part_threshold, threshold[rows])
        assert torch.equal(part_tokens, tokens[rows])
        assert torch.equal(part_logprobs, logprobs[rows])


@pytest.mark.parametrize("vocab_size", [1, 2, 5, 4095, 4096, 4097, 8193])
def test_tokens_and_logprobs_match_the_definition(vocab_size: int) -> None:
    logits, arguments = random_batch(8, vocab_size, seed=vocab_size)
    tokens, logprobs = gumbel_sample(logits, **arguments)
    x = logits * arguments["temperature"].reciprocal()[:, None]
    noise = gumbel_noise(arguments["seeds"], arguments["positions"], vocab_size)
    assert torch.equal(tokens, (x + noise).argmax(-1))
    expected = x.double().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    # Rounding of x - logsumexp (both up to 128 here: unit 2**-17) and of the sums inside it.
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=2**-16)


def test_temperature_zero_is_greedy_with_the_models_own_logprob() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, -math.inf, 2.0, 2.0]])
    tokens, logprobs = gumbel_sample(
        logits,
        seeds=torch.tensor([1, 2]),
        positions=torch.tensor([0, 0]),
        temperature=torch.zeros(2),
        threshold=torch.tensor([100.0, 2.5]),
    )
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[torch.arange(2), tokens])


def test_masked_tokens_are_never_chosen_and_an_empty_row_is_token_zero() -> None:
    logits = torch.full((200, 9), -math.inf)
    logits[:-1, 7] = -50.0
    logits[:-1, 3] = -51.0
    arguments = random_batch(200, 9)[1]
    tokens, logprobs = gumbel_sample(logits, **arguments)
    assert set(tokens[:-1].tolist()) == {3, 7}
    assert logprobs[:-1].isfinite().all()
    assert tokens[-1] == 0
    assert logprobs[-1] == -math.inf


def sorted_definition(x: list[float], k: int, p: float, min_p: float) -> float:
    """The threshold by the book: sort, cut, renormalise, accumulate in Python's floats."""
    ordered = sorted(x, reverse=True)
    if min_p > 0:
        ordered = [value for value in ordered if value >= ordered[0] + math.log(min_p)]
    if 0 < k < len(ordered):
        ordered = [value for value in ordered if value >= ordered[k - 1]]
    if p < 1:
        weights = [math.exp(value - ordered[0]) for value in ordered]
        mass = 0.0
        for count, weight in enumerate(weights, start=1):
            mass += weight / math.fsum(weights)
            if mass >= p:
                ordered = ordered[:count]
                break
    return ordered[-1]


# Multiples of a quarter tie often, and their masses keep clear of the p used here by far more than 1e-12.
@given(
    st.lists(st.integers(-20, 20), min_size=1, max_size=40),
    st.integers(0, 45),
    st.sampled_from([1.0, 0.9173, 0.5021, 0.0013]),
    st.sampled_from([0.0, 0.0137, 0.31]),
)
@settings(deadline=None, max_examples=300)
def test_threshold_keeps_what_the_sorted_definition_keeps(quarters: list[int], k: int, p: float, min_p: float) -> None:
    logits = torch.tensor([quarters]) / 4
    threshold = truncation_threshold(
        logits,
        temperature=torch.ones(1),
        top_k=torch.tensor([k]),
        top_p=torch.tensor([p]),
        min_p=torch.tensor([min_p]),
    )
    expected = sorted_definition(logits[0].tolist(), k, p, min_p)
    assert torch.equal(logits[0] >= threshold, logits[0] >= expected)


def test_threshold_is_off_where_nothing_is_cut() -> None:
    logits, arguments = random_batch(4, 30)
    temperature = arguments["temperature"].clone()
    temperature[3] = 0.0
    off = truncation_threshold(
        logits,
        temperature=temperature,
        top_k=torch.tensor([0, 30, 99, 1]),
        top_p=torch.tensor([1.0, 1.0, 1.0, 0.1]),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.9]),
    )
    assert off.tolist() == [-math.inf] * 4


def test_all_ties_at_the_threshold_are_kept() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0, 5.0]])
    threshold = truncation_threshold(logits, temperature=torch.ones(1), top_k=torch.tensor([2]))
    assert threshold.item() == 2.0
    counts = draw(logits, 5_000, 1.0, top_k=torch.tensor([2]))
    assert counts[0] == 0
    assert (counts[1:] > 0).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logits", torch.zeros(2, 3, 4)),
        ("logits", torch.zeros(2, 0)),
        ("logits", torch.zeros(2, 8, dtype=torch.float64)),
        ("logits", torch.zeros(8, 2).t()),
        ("seeds", torch.zeros(2, dtype=torch.int32)),
        ("seeds", torch.tensor([0, -1])),
        ("positions", torch.zeros(3, dtype=torch.int64)),
        ("positions", torch.tensor([-1, 0])),
        ("temperature", torch.tensor([-1.0, 1.0])),
        ("temperature", torch.tensor([math.nan, 1.0])),
        ("temperature", torch.ones(2, dtype=torch.float64)),
        ("threshold", torch.ones(2, 1)),
        ("lane", -1),
        ("lane", 2**32),
    ],
)
def test_illegal_arguments_are_refused_by_name(name: str, value: object) -> None:
    arguments = {
        "logits": torch.zeros(2, 8),
        "seeds": torch.zeros(2, dtype=torch.int64),
        "positions": torch.zeros(2, dtype=torch.int64),
        "temperature": torch.ones(2),
        name: value,
    }
    with pytest.raises(ValueError, match=rf"{name}: got .* expected"):
        gumbel_sample(arguments.pop("logits"), **arguments)


def test_no_rows_give_no_tokens() -> None:
    tokens, logprobs = gumbel_sample(torch.zeros(0, 8), **{k: v[:0] for k, v in random_batch(1, 8)[1].items()})
    assert tokens.shape == logprobs.shape == (0,)
