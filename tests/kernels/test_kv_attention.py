"""The INT8 KV cache: codes, layout, fused norm and rotation, and the CPU attention against the reference.

The reference itself is compared with float64. The Triton kernels are compared with it in
``test_kv_attention_triton.py``.
"""

import math
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.kv_attention import (
    KVCache,
    decode_attention,
    kv_cache_from_pages,
    norm_rope_write,
    page_bytes,
    paged_attention_cpu,
    plan_attention,
    prefill_attention,
    write_kv,
)
from kernels.kv_attention.reference import (
    decode_attention_reference,
    gather_kv,
    norm_rope_reference,
    norm_rope_write_reference,
    prefill_attention_reference,
    quantise,
    write_kv_reference,
)

FIELDS = ("key", "value", "key_scale", "value_scale")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def poisoned_cache(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, pages: bool = True) -> KVCache:
    """Return a cache none of whose slots is in use: scales NaN, codes -128, which no write produces."""
    if pages:
        memory = torch.empty(num_blocks, page_bytes(block_size, num_kv_heads, head_dim), dtype=torch.uint8)
        cache = kv_cache_from_pages(memory, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim)
    else:
        shape = (num_blocks, block_size, num_kv_heads)
        key, value = torch.empty(2, *shape, head_dim, dtype=torch.int8)
        key_scale, value_scale = torch.empty(2, *shape)
        cache = KVCache(key=key, value=value, key_scale=key_scale, value_scale=value_scale)
    for codes, scale in ((cache.key, cache.key_scale), (cache.value, cache.value_scale)):
        codes.fill_(-128)
        scale.fill_(math.nan)
    return cache


def slots_of(block_table: torch.Tensor, sequence: int, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    return block_table[sequence, positions // block_size].long() * block_size + positions % block_size


def random_sequences(
    lengths: list[int],
    *,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    pages: bool = True,
    spread: float = 1.0,
    seed: int = 0,
) -> tuple[KVCache, torch.Tensor, torch.Tensor]:
    """Return a cache that holds random sequences in random blocks, its table with garbage past each end, lengths."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // block_size) for length in lengths]
    cache = poisoned_cache(sum(counts) + 3, block_size, num_kv_heads, head_dim, pages)
    blocks = torch.randperm(cache.num_blocks, generator=generator)
    block_table = torch.full((len(lengths), max([*counts, 1]) + 1), 2**31 - 1, dtype=torch.int32)
    first = 0
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        block_table[b, :count] = blocks[first : first + count]
        first += count
        key, value = spread * torch.randn(2, length, num_kv_heads, head_dim, generator=generator)
        # A token of its own magnitude here and there, so that scales differ.
        key[::7] *= 2
        value[::5] *= 2
        value[1::11] = 0
        slots = slots_of(block_table, b, torch.arange(length), block_size)
        write_kv(key, value, cache, slot_mapping=slots)
    return cache, block_table, torch.tensor(lengths, dtype=torch.int32)


def assert_attention_close(
    got: tuple[torch.Tensor, torch.Tensor],
    expected: tuple[torch.Tensor, torch.Tensor],
    query: torch.Tensor,
    cache: KVCache,
    scale: float,
) -> None:
    """Compare two float32 evaluations of the same attention.

    With u = 2**-24: a score is a sum of D products, off by at most D u sum|q k| scale, and sum|q k| is at most
    |q| |k| (Cauchy-Schwarz). A weight inherits that as a relative error, twice (numerator and sum), and both
    evaluations have it. A sum over the context is made in chunks of at most 128 tokens, which adds u for each
    token of a chunk and for each chunk, of which the longest context here, 40,001 tokens, has 313.
    """
    key_norm = (cache.key.float().norm(dim=-1) * cache.key_scale).nan_to_num(0.0).max().item()
    largest = (127 * cache.value_scale).nan_to_num(0.0).max().item()
    score_error = cache.head_dim * 2.0**-24 * query.norm(dim=-1).max().item() * key_norm * scale
    sum_error = (128 + 313) * 2.0**-24
    assert not got[0].isnan().any()
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=largest * (4 * score_error + 2 * sum_error))
    torch.testing.assert_close(got[1], expected[1], rtol=2.0**-22, atol=2 * score_error + 2 * sum_error)


def random_query(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None, max_examples=200)
def test_an_element_is_off_by_at_most_half_a_scale(elements: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor(elements).to(dtype)
    codes, scale = quantise(x)
    assert codes.abs().max() <= 127
    if x.float().abs().max() >= 127 * 2.0**-126:
        # Below, the scale is no normal number. The ratio, at most 127, is rounded by at most 127 * 2**-24, so a
        # code can go to the farther side of a tie by twice that.
        error = (x.double() - codes.double() * scale.double()).abs().max().item()
        assert error <= scale.item() * (0.5 + 254 * 2.0**-24)
        assert codes.abs().max() == 127
    elif scale == 0:
        assert not codes.any()


def test_codes_round_half_to_even() -> None:
    codes, scale = quantise(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]))
    assert scale == 1
    assert codes.tolist() == [127, 0, 2, 2, 0, -2, 126]
    assert quantise(torch.zeros(2, 4))[1].tolist() == [0, 0]


@given(
    st.integers(1, 20),
    st.sampled_from([(1, 32), (2, 32), (3, 64), (4, 128)]),
    st.sampled_from([1, 8, 16, 24]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=40)
def test_written_bytes_are_the_references_and_nothing_else_is_touched(
    num_tokens: int, heads: tuple[int, int], block_size: int, pages: bool, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, num_tokens, *heads, generator=generator).to(dtype)
    value[::3] = 0
    caches = [poisoned_cache(-(-num_tokens // block_size) + 2, block_size, *heads, pages) for _ in range(2)]
    slots = torch.randperm(caches[0].num_blocks * block_size, generator=generator)[:num_tokens]
    slots[torch.rand(num_tokens, generator=generator) < 0.2] = -1
    write_kv(key, value, caches[0], slot_mapping=slots)
    write_kv_reference(key, value, caches[1], slot_mapping=slots)
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(caches[0], name), getattr(caches[1], name), rtol=0, atol=0, equal_nan=True, msg=name
        )
    is_used = torch.zeros(caches[0].num_blocks * block_size, dtype=torch.bool)
    is_used[slots[slots >= 0]] = True
    is_used = is_used.view(-1, block_size)
    assert (caches[0].key[~is_used] == -128).all()
    assert caches[0].value_scale[~is_used].isnan().all()
    assert not caches[0].key_scale[is_used].isnan().any()


def test_a_page_is_used_to_the_last_byte_by_one_element_each() -> None:
    memory = torch.zeros(2, page_bytes(3, 2, 32), dtype=torch.uint8)
    cache = kv_cache_from_pages(memory, block_size=3, num_kv_heads=2, head_dim=32)
    for name in FIELDS:
        tensor = getattr(cache, name)
        tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int8).sub_(1)
    assert (memory == 255).all()
    assert cache.key.shape == (2, 3, 2, 32)
    assert cache.key_scale.shape == (2, 3, 2)


def test_interleaved_pages_of_several_layers() -> None:
    """One allocation of all layers, as an engine may make it, gives caches that do not disturb one another."""
    num_bytes = page_bytes(16, 2, 32)
    memory = torch.full((5, 3 * num_bytes), 7, dtype=torch.int8)
    layers = [
        kv_cache_from_pages(memory[:, i * num_bytes : (i + 1) * num_bytes], block_size=16, num_kv_heads=2, head_dim=32)
        for i in range(3)
    ]
    key = random_query(20, 2, 32)
    alone = poisoned_cache(5, 16, 2, 32)
    slots = torch.arange(30, 50)
    for cache in (layers[1], alone):
        write_kv(key, 2 * key, cache, slot_mapping=slots)
    assert (memory[:, :num_bytes] == 7).all()
    assert (memory[:, 2 * num_bytes :] == 7).all()
    arguments = {
        "block_table": torch.tensor([[1, 2, 3, 0]]),
        "query_start_loc": torch.tensor([0, 1]),
        "seq_lens": torch.tensor([34]),
        "scale": 0.2,
    }
    # Positions 0 .. 13 lie in slots never written: make them alike.
    for cache in (layers[1], alone):
        write_kv(key[:14], key[:14], cache, slot_mapping=torch.arange(16, 30))
    query = random_query(1, 4, 32)
    torch.testing.assert_close(
        prefill_attention(query, layers[1], **arguments), prefill_attention(query, alone, **arguments), rtol=0, atol=0
    )


def rotation_arguments(num_tokens: int, head_dim: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    frequencies = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(500, dtype=torch.float64).unsqueeze(1) * frequencies
    return {
        "q_weight": 1 + 0.2 * torch.randn(head_dim, generator=generator),
        "k_weight": 1 + 0.2 * torch.randn(head_dim, generator=generator),
        "positions": torch.randint(0, 500, (num_tokens,), generator=generator),
        "cos_sin_cache": torch.cat((angles.cos(), angles.sin()), 1).float(),
    }


def test_norm_and_rotation_against_complex_numbers_in_float64() -> None:
    arguments = rotation_arguments(9, 64, seed=3)
    x = 5 * random_query(9, 3, 64)
    weight, positions = arguments["q_weight"], arguments["positions"]
    got = norm_rope_reference(x, weight, 1e-6, positions, arguments["cos_sin_cache"])
    normalised = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    frequencies = 10_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    turn = torch.polar(torch.ones(9, 32, dtype=torch.float64), positions.unsqueeze(1) * frequencies).unsqueeze(1)
    turned = torch.complex(normalised[..., :32], normalised[..., 32:]) * turn
    expected = torch.cat((turned.real, turned.imag), -1)
    # About ten roundings of numbers no larger than the largest element times sqrt 2.
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=10 * 2.0**-24 * 1.5 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_rope_write_on_views_of_a_fused_projection(dtype: torch.dtype) -> None:
    num_tokens, num_query_heads, num_kv_heads, head_dim = 13, 6, 2, 32
    width = (num_query_heads + 2 * num_kv_heads) * head_dim
    fused = random_query(num_tokens, width).to(dtype)
    query, key, value = (
        part.unflatten(1, (-1, head_dim))
        for part in fused.split([num_query_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim], 1)
    )
    arguments = rotation_arguments(num_tokens, head_dim, seed=4)
    slots = torch.randperm(64)[:num_tokens]
    slots[3] = -1
    caches = [poisoned_cache(4, 16, num_kv_heads, head_dim) for _ in range(2)]
    got = norm_rope_write(query, key, value, caches[0], eps=1e-6, slot_mapping=slots, **arguments)
    expected = norm_rope_write_reference(query, key, value, caches[1], eps=1e-6, slot_mapping=slots, **arguments)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert torch.equal(got, expected)
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(caches[0], name), getattr(caches[1], name), rtol=0, atol=0, equal_nan=True, msg=name
        )
    # A token alone gives the same bytes: what is cached does not hang on the step's composition.
    alone = poisoned_cache(4, 16, num_kv_heads, head_dim)
    one = {**arguments, "positions": arguments["positions"][7:8]}
    part = norm_rope_write(query[7:8], key[7:8], value[7:8], alone, eps=1e-6, slot_mapping=slots[7:8], **one)
    assert torch.equal(part, got[7:8])
    place = divmod(slots[7].item(), 16)
    for name in FIELDS:
        assert torch.equal(getattr(alone, name)[place], getattr(caches[0], name)[place])


def test_reference_attention_against_float64() -> None:
    cache, block_table, seq_lens = random_sequences([50, 33], num_kv_heads=2)
    query = random_query(4, 6, 32)
    query_start_loc = torch.tensor([0, 3, 4])
    got = prefill_attention_reference(
        query, cache, block_table=block_table, query_start_loc=query_start_loc, seq_lens=seq_lens, scale=0.2
    )
    for row, (b, visible) in enumerate([(0, 48), (0, 49), (0, 50), (1, 33)]):
        key, value = (x.double().repeat_interleave(3, 1) for x in gather_kv(cache, block_table[b], visible))
        scores = torch.einsum("hd,lhd->hl", query[row].double(), key) * 0.2
        output = torch.einsum("hl,lhd->hd", scores.softmax(-1), value)
        # 32 + 50 roundings of 2**-24 each, times scores of at most about 10, leave 1e-5 a fair margin.
        torch.testing.assert_close(got[0][row].double(), output, rtol=0, atol=1e-5 * value.abs().max().item())
        torch.testing.assert_close(got[1][row].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


EDGE_LENGTHS = [1, 2, 15, 16, 17, 31, 127, 128, 129, 255, 257, 1023, 1024, 1025]


@pytest.mark.parametrize(
    ("num_query_heads", "num_kv_heads", "head_dim", "block_size", "pages"),
    [(2, 2, 32, 16, True), (4, 2, 32, 16, False), (16, 1, 64, 32, True), (6, 2, 128, 24, False), (4, 4, 32, 256, True)],
)
def test_decoding_at_block_chunk_and_superchunk_edges(
    num_query_heads: int, num_kv_heads: int, head_dim: int, block_size: int, pages: bool
) -> None:
    lengths = [*EDGE_LENGTHS, 0, block_size - 1, block_size + 1]
    cache, block_table, seq_lens = random_sequences(
        lengths, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, pages=pages
    )
    query = random_query(len(lengths), num_query_heads, head_dim)
    scale = head_dim**-0.5
    arguments = {"block_table": block_table, "seq_lens": seq_lens, "scale": scale}
    got = decode_attention(query, cache, **arguments)
    assert_attention_close(got, decode_attention_reference(query, cache, **arguments), query, cache, scale)
    empty = lengths.index(0)
    assert not got[0][empty].any()
    assert (got[1][empty] == -math.inf).all()


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 80)), min_size=1, max_size=6),
    st.sampled_from([(1, 1), (2, 1), (5, 1), (4, 2)]),
    st.sampled_from([1, 8, 16, 24, 128]),
    st.booleans(),
    st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=30)
def test_mixed_batches_on_random_layouts(
    sequences: list[tuple[int, int]], heads: tuple[int, int], block_size: int, pages: bool, seed: int
) -> None:
    """Each sequence has a context of some tokens, of which the last few (none, one or a chunk) are rows."""
    lengths = [length for length, _ in sequences]
    cache, block_table, seq_lens = random_sequences(
        lengths, num_kv_heads=heads[1], block_size=block_size, pages=pages, seed=seed
    )
    rows = torch.tensor([0, *(min(length, count) for length, count in sequences)])
    # One row of no sequence at the end, as padding has it.
    query = random_query(int(rows.sum()) + 1, heads[0], 32, seed=seed)
    arguments = {
        "block_table": block_table,
        "query_start_loc": rows.cumsum(0).int(),
        "seq_lens": seq_lens,
        "scale": 0.2,
    }
    got = prefill_attention(query, cache, **arguments)
    expected = prefill_attention_reference(query, cache, **arguments)
    assert_attention_close(got, expected, query, cache, 0.2)
    assert not got[0][-1].any()
    assert (got[1][-1] == -math.inf).all()


@pytest.mark.parametrize("num_rows", [1, 2, 15, 16, 17, 63, 64, 65, 130])
def test_prefill_at_tile_edges(num_rows: int) -> None:
    cache, block_table, seq_lens = random_sequences([140, num_rows, 1300])
    query = random_query(num_rows + num_rows + 1, 4, 32)
    arguments = {
        "block_table": block_table,
        "query_start_loc": torch.tensor([0, num_rows, 2 * num_rows, 2 * num_rows + 1]),
        "seq_lens": seq_lens,
        "scale": 0.2,
    }
    got = prefill_attention(query, cache, **arguments)
    assert_attention_close(got, prefill_attention_reference(query, cache, **arguments), query, cache, 0.2)


def test_bfloat16_queries_are_computed_in_float32() -> None:
    cache, block_table, seq_lens = random_sequences([200, 37])
    query = random_query(2, 4, 32).bfloat16()
    arguments = {"block_table": block_table, "seq_lens": seq_lens, "scale": 0.2}
    got = decode_attention(query, cache, **arguments)
    wide = decode_attention(query.float(), cache, **arguments)
    assert got[0].dtype == torch.bfloat16
    assert torch.equal(got[0], wide[0].bfloat16())
    assert torch.equal(got[1], wide[1])


def test_decoding_a_long_context() -> None:
    length = 40_001
    cache, block_table, seq_lens = random_sequences([length, 3], num_kv_heads=1, block_size=32)
    query = random_query(2, 4, 32)
    got = decode_attention(query, cache, block_table=block_table, seq_lens=seq_lens, scale=0.2)
    key, value = (x[:, 0].double() for x in gather_kv(cache, block_table[0], length))
    scores = query[0].double() @ key.T * 0.2
    expected = (scores.softmax(-1) @ value).float(), scores.logsumexp(-1).float()
    assert_attention_close((got[0][0], got[1][0]), expected, query, cache, 0.2)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    """Needs a BLAS that computes each matrix of a batched product alone; the module says so of MKL."""
    lengths = [1, 700, 129, 2100, 128, 40, 1025]
    cache, block_table, seq_lens = random_sequences(lengths)
    query = random_query(len(lengths), 4, 32)
    output, lse = decode_attention(query, cache, block_table=block_table, seq_lens=seq_lens, scale=0.2)
    for rows in ([3, 1, 0], [6], [2, 2, 5, 4], [1], [0]):
        # As many columns as these rows need, so that the padding differs too.
        width = -(-max(lengths[row] for row in rows) // cache.block_size)
        part = decode_attention(
            query[rows], cache, block_table=block_table[rows, :width], seq_lens=seq_lens[rows], scale=0.2
        )
        assert torch.equal(part[0], output[rows])
        assert torch.equal(part[1], lse[rows])
    # Beside a prefill chunk, too.
    query_start_loc = torch.tensor([0, 1, 1, 81, 82, 82, 82, 82])
    mixed = torch.cat((query[:1], random_query(80, 4, 32), query[3:4]))
    mixed_output, _ = prefill_attention(
        mixed, cache, block_table=block_table, query_start_loc=query_start_loc, seq_lens=seq_lens, scale=0.2
    )
    assert torch.equal(mixed_output[0], output[0])
    assert torch.equal(mixed_output[81], output[3])


@given(st.lists(st.integers(1, 70), min_size=1, max_size=4), st.integers(0, 2**20))
@settings(deadline=None, max_examples=8)
def test_one_shot_chunks_and_single_tokens_agree_on_the_same_bytes(chunks: list[int], seed: int) -> None:
    """However a prompt is cut, the cache holds the same bytes and each token gets the same result."""
    length = sum(chunks)
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, length, 2, 32, generator=generator)
    query = torch.randn(length, 4, 32, generator=generator)
    block_table = torch.randperm(-(-length // 16), generator=generator).unsqueeze(0)
    results, caches = [], []
    for cuts in ([length], chunks, [1] * length):
        cache = poisoned_cache(block_table.shape[1], 16, 2, 32)
        parts = []
        done = 0
        for count in cuts:
            positions = torch.arange(done, done + count)
            write_kv(key[positions], value[positions], cache, slot_mapping=slots_of(block_table, 0, positions, 16))
            done += count
            parts.append(
                prefill_attention(
                    query[positions],
                    cache,
                    block_table=block_table,
                    query_start_loc=torch.tensor([0, count]),
                    seq_lens=torch.tensor([done]),
                    scale=0.2,
                )
            )
        results.append(tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        caches.append(cache)
    for cache, result in zip(caches[1:], results[1:], strict=True):
        for name in FIELDS:
            tensor = getattr(cache, name)
            torch.testing.assert_close(tensor, getattr(caches[0], name), rtol=0, atol=0, equal_nan=True, msg=name)
        assert_attention_close(result, results[0], query, caches[0], 0.2)


def test_parts_of_a_context_merge_by_log_sum_exp() -> None:
    cache, block_table, _ = random_sequences([96])
    query = random_query(1, 4, 32)
    whole, whole_lse = decode_attention(query, cache, block_table=block_table, seq_lens=torch.tensor([96]), scale=0.2)
    parts = [
        decode_attention(query, cache, block_table=table, seq_lens=torch.tensor([length]), scale=0.2)
        for table, length in ((block_table[:, :2], 32), (block_table[:, 2:], 64))
    ]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(output * (part - lse).exp().unsqueeze(-1) for output, part in parts)
    assert_attention_close((merged, lse), (whole, whole_lse), query, cache, 0.2)


def test_one_plan_serves_the_layers_of_a_step() -> None:
    cache, block_table, seq_lens = random_sequences([30, 200])
    other = random_sequences([30, 200], spread=2.0)[0]
    query = random_query(5, 4, 32)
    step = {"block_table": block_table, "query_start_loc": torch.tensor([0, 1, 5]), "seq_lens": seq_lens}
    plan = plan_attention(**step, num_query_heads=4, cache=cache)
    for layer in (cache, other):
        got = paged_attention_cpu(query, layer, plan=plan, scale=0.2)
        expected = prefill_attention(query, layer, scale=0.2, **step)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    with pytest.raises(ValueError, match=r"query: got .* expected"):
        paged_attention_cpu(query[:4], cache, plan=plan, scale=0.2)
    with pytest.raises(ValueError, match=r"cache: got .* expected"):
        paged_attention_cpu(query, poisoned_cache(2, 8, 2, 32), plan=plan, scale=0.2)


def test_nothing_to_do() -> None:
    cache, block_table, seq_lens = random_sequences([5])
    write_kv(torch.zeros(0, 2, 32), torch.zeros(0, 2, 32), cache, slot_mapping=torch.zeros(0, dtype=torch.int64))
    output, lse = decode_attention(
        torch.zeros(0, 4, 32), cache, block_table=block_table[:0], seq_lens=seq_lens[:0], scale=0.2
    )
    assert output.shape == (0, 4, 32)
    assert lse.shape == (0, 4)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("key", {"key": torch.zeros(4, 16, 2, 48, dtype=torch.int8)}),
        ("key", {"key": torch.zeros(4, 16, 2, 32)}),
        ("value", {"value": torch.zeros(4, 16, 1, 32, dtype=torch.int8)}),
        ("value", {"value": torch.zeros(4, 16, 32, 2, dtype=torch.int8).transpose(2, 3)}),
        ("value", {"value": torch.zeros(4, 16, 2, 33, dtype=torch.int8)[..., :32]}),
        ("key_scale", {"key_scale": torch.zeros(4, 16, 2, dtype=torch.float64)}),
        ("value_scale", {"value_scale": torch.zeros(4, 16, 3)}),
    ],
)
def test_a_wrong_cache_is_refused(name: str, change: dict[str, torch.Tensor]) -> None:
    cache = poisoned_cache(4, 16, 2, 32)
    with pytest.raises(ValueError, match=rf"{name}: got .* expected"):
        replace(cache, **change)


@pytest.mark.parametrize(
    "pages",
    [
        torch.zeros(2, 100, dtype=torch.uint8),
        torch.zeros(2, page_bytes(16, 2, 32), dtype=torch.float32),
        torch.zeros(2, page_bytes(16, 2, 32) + 1, dtype=torch.uint8)[:, :-1],
    ],
)
def test_wrong_pages_are_refused(pages: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"pages: got .* expected"):
        kv_cache_from_pages(pages, block_size=16, num_kv_heads=2, head_dim=32)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key", torch.zeros(3, 64)),
        ("key", torch.zeros(3, 2, 32, dtype=torch.int32)),
        ("value", torch.zeros(3, 2, 32, dtype=torch.bfloat16)),
        ("value", torch.zeros(3, 32, 2).transpose(1, 2)),
        ("query", torch.zeros(3, 5, 32)),
        ("query", torch.zeros(2, 4, 32)),
        ("q_weight", torch.zeros(16)),
        ("positions", torch.zeros(3, dtype=torch.int32)),
        ("positions", torch.full((3,), 500)),
        ("cos_sin_cache", torch.zeros(500, 16)),
        ("slot_mapping", torch.zeros(2, dtype=torch.int64)),
        ("slot_mapping", torch.full((3,), 64)),
        ("slot_mapping", torch.full((3,), -2)),
    ],
)
def test_wrong_tokens_are_refused(name: str, value: torch.Tensor) -> None:
    arguments = {
        "query": torch.zeros(3, 4, 32),
        "key": torch.zeros(3, 2, 32),
        "value": torch.zeros(3, 2, 32),
        "slot_mapping": torch.arange(3),
        **rotation_arguments(3, 32, seed=0),
        name: value,
    }
    with pytest.raises(ValueError, match=rf"{name}: got .* expected"):
        norm_rope_write(**arguments, cache=poisoned_cache(4, 16, 2, 32), eps=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query", torch.zeros(3, 5, 32)),
        ("query", torch.zeros(3, 4, 32, dtype=torch.float64)),
        ("block_table", torch.zeros(1, 4, dtype=torch.int32)),
        ("block_table", torch.zeros(2, 4)),
        ("seq_lens", torch.tensor([65, 10])),
        ("seq_lens", torch.tensor([10, -1])),
        ("seq_lens", torch.tensor([1, 10])),
        ("query_start_loc", torch.tensor([0, 3])),
        ("query_start_loc", torch.tensor([0, 2, 1])),
        ("query_start_loc", torch.tensor([1, 2, 3])),
        ("query_start_loc", torch.tensor([0, 2, 4])),
        ("scale", 0.0),
        ("scale", math.nan),
    ],
)
def test_wrong_attention_is_refused(name: str, value: torch.Tensor | float) -> None:
    arguments = {
        "query": torch.zeros(3, 4, 32),
        "block_table": torch.zeros(2, 4, dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 2, 3]),
        "seq_lens": torch.tensor([10, 10]),
        "scale": 0.2,
        name: value,
    }
    with pytest.raises(ValueError, match=r"(query_start_loc|" + name + r"): got .* expected"):
        prefill_attention(**arguments, cache=poisoned_cache(4, 16, 2, 32))


def stack_bytes_on_hopper(kernel: object, types: dict, constants: dict, num_warps: int) -> int:
    """Compile a kernel for sm_90 ahead of time and return the bytes of local memory a thread needs.

    Pointers, and the strides of what is not a scale, are told to be multiples of 16, as real caches have them.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    aligned = [["tt.divisibility", 16]]
    attributes = {}
    for name, kind in types.items():
        place = names.index(name)
        if isinstance(kind, tuple) and "scale" not in name:
            attributes.update({(place, i): aligned for i in range(len(kind))})
        elif str(kind).startswith("*"):
            attributes[(place,)] = aligned
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, "num_stages": 3})
    tool = Path(sys.modules["triton"].__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))


def test_triton_kernels_compile_for_hopper_without_spilling() -> None:
    """The interpreter skips the compiler and, with it, the inline assembly: here both are met without a GPU."""
    pytest.importorskip("triton")
    from kernels.kv_attention.triton_decode import _decode_split_kernel
    from kernels.kv_attention.triton_prefill import _prefill_kernel
    from kernels.kv_attention.triton_write import _norm_rope_write_kernel

    two, three = ("i32",) * 2, ("i32",) * 3
    cache = {
        "key_ptr": "*i8",
        "value_ptr": "*i8",
        "key_scale_ptr": "*fp32",
        "value_scale_ptr": "*fp32",
        "key_strides": three,
        "value_strides": three,
        "key_scale_strides": three,
        "value_scale_strides": three,
    }
    rows = {
        "query_ptr": "*bf16",
        "table_ptr": "*i32",
        "seq_lens_ptr": "*i32",
        "query_strides": two,
        "table_stride": "i32",
        "score_scale": "fp32",
    }
    partial = {"partial_ptr": "*fp32", "partial_lse_ptr": "*fp32", "num_splits": "i32", "split_tokens": "i32"}
    decode = {**cache, **rows, **partial, "value_ptr": "*i32"}
    for head_dim, group in ((128, 16), (64, 4), (32, 2)):
        constants = {"GROUP": group, "BLOCK_SIZE": 16, "TILE": head_dim, "ROWS": 16, "HEAD_DIM": head_dim}
        assert stack_bytes_on_hopper(_decode_split_kernel, decode, constants, num_warps=head_dim // 32) == 0
    prefill = {
        **cache,
        **rows,
        "query_start_ptr": "*i32",
        "output_ptr": "*bf16",
        "lse_ptr": "*fp32",
        "num_sequences": "i32",
    }
    constants = {"GROUP": 16, "GROUP_ROWS": 16, "BLOCK_SIZE": 16, "TILE": 64, "ROWS": 128, "HEAD_DIM": 128}
    assert stack_bytes_on_hopper(_prefill_kernel, prefill, constants, num_warps=8) == 0
    write = {
        **dict.fromkeys(("query_ptr", "key_ptr", "value_ptr", "output_ptr", "q_weight_ptr", "k_weight_ptr"), "*bf16"),
        **{"position_ptr": "*i64", "slot_ptr": "*i64", "cos_sin_ptr": "*fp32"},
        **{"key_cache_ptr": "*i8", "value_cache_ptr": "*i8", "key_scale_ptr": "*fp32", "value_scale_ptr": "*fp32"},
        **dict.fromkeys(("query_strides", "key_strides", "value_strides", "output_strides"), two),
        **dict.fromkeys(
            ("key_cache_strides", "value_cache_strides", "key_scale_strides", "value_scale_strides"), three
        ),
        **{"cos_sin_stride": "i32", "num_query_heads": "i32", "num_kv_heads": "i32", "eps": "fp32"},
    }
    constants = {"BLOCK_SIZE": 16, "QUERY_HEADS": 8, "KV_HEADS": 4, "HEAD_DIM": 128}
    assert stack_bytes_on_hopper(_norm_rope_write_kernel, write, constants, num_warps=4) == 0
