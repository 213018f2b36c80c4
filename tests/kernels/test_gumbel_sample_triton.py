"""The Triton kernels against the reference: on CUDA, or interpreted where TRITON_INTERPRET=1 is set.

Neither holds in an ordinary CPU run, where ``test_gumbel_sample.py`` starts this file interpreted.
"""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.gumbel_sample import GUMBEL_MAX, gumbel_noise, gumbel_sample, truncation_threshold

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
pytestmark = (
    []
    if IS_INTERPRETED
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA or TRITON_INTERPRET=1"),
    ]
)

if IS_INTERPRETED or torch.cuda.is_available():
    import triton
    import triton.language as tl

    from kernels.gumbel_sample.triton import _philox4x32, gumbel_sample_triton

    @triton.jit
    def philox_kernel(counter_ptr, key_ptr, output_ptr):
        words = _philox4x32(
            tl.load(counter_ptr).to(tl.uint32),
            tl.load(counter_ptr + 1).to(tl.uint32),
            tl.load(counter_ptr + 2).to(tl.uint32),
            tl.load(counter_ptr + 3).to(tl.uint32),
            tl.load(key_ptr).to(tl.uint32),
            tl.load(key_ptr + 1).to(tl.uint32),
        )
        for i in tl.static_range(4):
            tl.store(output_ptr + i, words[i].to(tl.int64))


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the wrapper allocates with NaN or a huge token: a slot never written cannot pass."""
    empty = torch.empty

    def poisoned(*size: int, **options: object) -> torch.Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(math.nan if tensor.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", poisoned)


def random_batch(num_rows: int, vocab_size: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, dict]:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(num_rows, vocab_size, generator=generator)).to(dtype)
    arguments = {
        "seeds": torch.randint(0, 2**63 - 1, (num_rows,), generator=generator),
        "positions": torch.randint(0, 2**62, (num_rows,), generator=generator),
        "temperature": torch.rand(num_rows, generator=generator).add_(0.1),
    }
    return logits, arguments


def assert_agrees(logits: torch.Tensor, arguments: dict, threshold: torch.Tensor | None, lane: int = 0) -> None:
    """Run both on CPU tensors and compare.

    Tokens: noise = -log(-log u) is -log of a float32 with relative error <= 4 * 2**-23 (numpy's, the
    loosest of the logarithms), rounded to within 4 units of at most 2**-19, and the sum x + noise is
    rounded once on either side. A token may differ only within twice that.
    Log-probabilities: x - maximum and the logarithm of the sum are rounded at their own size, the sum's
    terms carry the relative error |x - maximum| * 2**-24 plus that of exp (2 units), and the tree of
    additions log2(V) units; twice, because the reference errs as well.
    """
    on_device = {name: value.to(DEVICE) for name, value in arguments.items()}
    on_device["threshold"] = None if threshold is None else threshold.to(DEVICE)
    tokens, logprobs = gumbel_sample_triton(logits.to(DEVICE), lane=lane, **on_device)
    tokens, logprobs = tokens.cpu(), logprobs.cpu()
    expected_tokens, _ = gumbel_sample(logits, threshold=threshold, lane=lane, **arguments)

    greedy = arguments["temperature"] == 0
    x = logits.float() * torch.where(greedy, 1.0, arguments["temperature"]).reciprocal()[:, None]
    if threshold is not None:
        x = x.masked_fill((x < threshold[:, None]) & ~greedy[:, None], -math.inf)
    noise = gumbel_noise(arguments["seeds"], arguments["positions"], logits.shape[1], lane=lane)
    perturbed = (x + noise.masked_fill(greedy[:, None], 0.0)).double()
    size = x.masked_fill(x == -math.inf, 0.0).abs().amax().item() + GUMBEL_MAX
    near_tie = 2 * (4 * 2.0**-23 + 4 * 2.0**-19 + size * 2.0**-24)
    for row in (tokens != expected_tokens).nonzero().flatten().tolist():
        gap = perturbed[row, expected_tokens[row]] - perturbed[row, tokens[row]]
        assert not greedy[row] and gap <= near_tie, f"row {row}: gap {gap} is no near tie"

    expected = x.double().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    spread = 2 * size + math.log2(logits.shape[1]) + 8
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=2 * spread * 2.0**-23)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy scalars; arrays wrap silently
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    output = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    philox_kernel[(1,)](torch.tensor(counter, device=DEVICE), torch.tensor(key, device=DEVICE), output)
    assert output.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 2, 15, 17, 2047, 2048, 2049, 4095, 4097])
def test_agrees_at_tile_edges(vocab_size: int, dtype: torch.dtype) -> None:
    logits, arguments = random_batch(4, vocab_size, dtype, seed=vocab_size)
    arguments["temperature"][2] = 0.0
    threshold = truncation_threshold(logits, temperature=arguments["temperature"], top_p=torch.full((4,), 0.9))
    assert_agrees(logits, arguments, None)
    assert_agrees(logits, arguments, threshold, lane=2**32 - 1)


@given(st.integers(1, 700), st.integers(1, 5), st.integers(0, 2**32 - 1), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_agrees_at_any_vocabulary(vocab_size: int, num_rows: int, lane: int, seed: int) -> None:
    logits, arguments = random_batch(num_rows, vocab_size, torch.float32, seed)
    assert_agrees(logits, arguments, None, lane=lane)


def test_agrees_on_strided_rows_and_vectors() -> None:
    wide, arguments = random_batch(6, 301, torch.bfloat16, seed=7)
    arguments = {name: value[::2] for name, value in arguments.items()}
    assert_agrees(wide[::2, 5:295], arguments, None)
    assert_agrees(wide[:1, :290].expand(3, -1), arguments, None)


def test_agrees_where_tokens_are_masked() -> None:
    logits, arguments = random_batch(3, 2500, torch.float32, seed=8)
    logits[0, :2300] = -math.inf
    logits[1, 1:] = -math.inf
    assert_agrees(logits, arguments, None)
    logits[2] = -math.inf
    on_device = {name: value.to(DEVICE) for name, value in arguments.items()}
    tokens, logprobs = gumbel_sample_triton(logits.to(DEVICE), **on_device)
    assert tokens[2] == 0
    assert logprobs[2] == -math.inf


def test_greedy_ties_go_to_the_lowest_token_across_tiles() -> None:
    logits = torch.zeros(1, 5000)
    logits[0, [2040, 2047, 2048, 4999]] = 1.0
    arguments = random_batch(1, 1, torch.float32, seed=9)[1]
    arguments["temperature"].zero_()
    on_device = {name: value.to(DEVICE) for name, value in arguments.items()}
    assert gumbel_sample_triton(logits.to(DEVICE), **on_device)[0].tolist() == [2040]


def test_nan_yields_a_token_of_the_vocabulary() -> None:
    logits, arguments = random_batch(2, 2050, torch.float32, seed=10)
    logits[0, 2049] = math.nan
    if not IS_INTERPRETED:  # numpy refuses the place of the maximum of nothing but NaN
        logits[1] = math.nan
    on_device = {name: value.to(DEVICE) for name, value in arguments.items()}
    tokens, _ = gumbel_sample_triton(logits.to(DEVICE), **on_device)
    assert ((tokens >= 0) & (tokens < 2050)).all()


def test_a_row_is_independent_of_the_batch() -> None:
    logits, arguments = random_batch(5, 2100, torch.float32, seed=11)
    logits, arguments = logits.to(DEVICE), {name: value.to(DEVICE) for name, value in arguments.items()}
    tokens, logprobs = gumbel_sample_triton(logits, **arguments)
    for rows in ([4, 2, 0], [3], [1]):
        part_tokens, part_logprobs = gumbel_sample_triton(
            logits[rows], **{name: value[rows] for name, value in arguments.items()}
        )
        assert torch.equal(part_tokens, tokens[rows])
        assert torch.equal(part_logprobs, logprobs[rows])


@pytest.mark.skipif(IS_INTERPRETED, reason="too large for the interpreter")
def test_agrees_on_real_vocabularies() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits, arguments = random_batch(64, 151_936, dtype, seed=12)
        assert_agrees(logits, arguments, None)


def test_shapes_are_refused_before_launch() -> None:
    logits, arguments = random_batch(2, 8, torch.float32, seed=13)
    on_device = {name: value.to(DEVICE) for name, value in arguments.items()}
    with pytest.raises(ValueError, match=r"logits: got strides .* expected"):
        gumbel_sample_triton(torch.zeros(8, 2, device=DEVICE).t(), **on_device)
    with pytest.raises(ValueError, match=r"seeds: got shape .* expected"):
        gumbel_sample_triton(logits.to(DEVICE), **{**on_device, "seeds": on_device["seeds"][:1]})
    tokens, logprobs = gumbel_sample_triton(
        logits[:0].to(DEVICE), **{name: value[:0] for name, value in on_device.items()}
    )
    assert tokens.shape == logprobs.shape == (0,)
