"""The Triton kernels of the INT8 KV cache against the reference: on CUDA, or interpreted with TRITON_INTERPRET=1.

Neither holds in an ordinary CPU run, where ``test_kv_attention.py`` starts this file interpreted.
"""

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.kv_attention import KVCache, kv_cache_from_pages, page_bytes
from kernels.kv_attention.cpu import attention_cpu, write_kv_cpu
from kernels.kv_attention.reference import (
    norm_rope_write_reference,
    prefill_attention_reference,
    write_kv_reference,
)

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
    from kernels.kv_attention.triton_decode import decode_attention_triton, default_split_tokens
    from kernels.kv_attention.triton_prefill import prefill_attention_triton
    from kernels.kv_attention.triton_write import norm_rope_write_triton, write_kv_triton

FIELDS = ("key", "value", "key_scale", "value_scale")


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill the floats that a wrapper allocates with NaN: an element never written cannot pass."""
    empty = torch.empty

    def poisoned(*size: object, **options: object) -> torch.Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def poisoned_cache(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, pages: bool = True) -> KVCache:
    """Return a cache in CPU memory none of whose slots is in use: scales NaN, codes -128, which no write makes."""
    if pages:
        memory = torch.zeros(num_blocks, page_bytes(block_size, num_kv_heads, head_dim), dtype=torch.uint8)
        cache = kv_cache_from_pages(memory, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim)
    else:
        shape = (num_blocks, block_size, num_kv_heads)
        key, value = torch.zeros(2, *shape, head_dim, dtype=torch.int8)
        key_scale, value_scale = torch.zeros(2, *shape)
        cache = KVCache(key=key, value=value, key_scale=key_scale, value_scale=value_scale)
    for codes, scale in ((cache.key, cache.key_scale), (cache.value, cache.value_scale)):
        codes.fill_(-128)
        scale.fill_(math.nan)
    return cache


def on_device(cache: KVCache) -> KVCache:
    """Return a copy on the device, of the same strides."""
    if IS_INTERPRETED:
        return cache
    copies = {}
    for name in FIELDS:
        tensor = getattr(cache, name)
        copies[name] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
        copies[name].copy_(tensor)
    return KVCache(**copies)


def random_sequences(
    lengths: list[int],
    *,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    pages: bool = True,
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
        key, value = torch.randn(2, length, num_kv_heads, head_dim, generator=generator)
        key[::7] *= 2
        value[::5] *= 2
        value[1::11] = 0
        positions = torch.arange(length)
        slots = block_table[b, positions // block_size].long() * block_size + positions % block_size
        write_kv_cpu(key, value, cache, slot_mapping=slots)
    return cache, block_table, torch.tensor(lengths, dtype=torch.int32)


def random_query(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_attention_close(
    got: tuple[torch.Tensor, torch.Tensor],
    expected: tuple[torch.Tensor, torch.Tensor],
    query: torch.Tensor,
    cache: KVCache,
    scale: float,
    max_length: int,
) -> None:
    """Compare with a float32 evaluation.

    With u = 2**-24: a score is off by at most D u |q| |k| scale (Cauchy-Schwarz) in either evaluation, by as much
    again for a query made float16 (an element loses at most 2**-25 of the largest), and a weight by a relative
    error of the same size. A sum over N tokens adds at most N u. For a 16-bit query a weight times its value's
    scale is rounded to float16: by 2**-11 of itself, or by 2**-25 of the largest, N times at most, where it is no
    normal number. The output's own rounding is half a unit in its last place, a whole one where the interpreter
    truncates.
    """
    key_norm = (cache.key.float().norm(dim=-1) * cache.key_scale).nan_to_num(0.0).max().item()
    largest = (127 * cache.value_scale).nan_to_num(0.0).max().item()
    score_error = 2 * cache.head_dim * 2.0**-24 * query.float().norm(dim=-1).max().item() * key_norm * scale
    sum_error = max_length * 2.0**-24
    weight_error = 0.0 if query.dtype == torch.float32 else 2.0**-11 + 1.07 * max_length * 2.0**-25
    unit = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[query.dtype]
    output, lse = (x.cpu() for x in got)
    assert output.dtype == query.dtype
    assert not output.isnan().any()
    absolute = largest * (4 * score_error + 2 * sum_error + weight_error)
    torch.testing.assert_close(output.float(), expected[0], rtol=unit, atol=absolute)
    torch.testing.assert_close(lse, expected[1], rtol=2.0**-22, atol=2 * score_error + 2 * sum_error)


def check_decoding(
    lengths: list[int],
    *,
    num_query_heads: int,
    dtype: torch.dtype = torch.bfloat16,
    split_tokens: int = 128,
    **layout: int | bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    cache, block_table, seq_lens = random_sequences(lengths, **layout)
    query = random_query(len(lengths), num_query_heads, cache.head_dim, dtype=dtype)
    scale = cache.head_dim**-0.5
    got = decode_attention_triton(
        query.to(DEVICE),
        on_device(cache),
        block_table=block_table.to(DEVICE),
        seq_lens=seq_lens.to(DEVICE),
        scale=scale,
        split_tokens=split_tokens,
    )
    expected = attention_cpu(
        query.float(), cache, block_table=block_table, query_start_loc=None, seq_lens=seq_lens, scale=scale
    )
    assert_attention_close(got, expected, query, cache, scale, max(lengths))
    return got


def check_prefill(
    lengths: list[int],
    counts: list[int],
    *,
    num_query_heads: int,
    dtype: torch.dtype = torch.bfloat16,
    **layout: int | bool,
) -> None:
    """Compare the last counts[b] rows of each sequence, and one row of no sequence behind them."""
    cache, block_table, seq_lens = random_sequences(lengths, **layout)
    query = random_query(sum(counts) + 1, num_query_heads, cache.head_dim, dtype=dtype)
    scale = cache.head_dim**-0.5
    query_start_loc = torch.tensor([0, *counts]).cumsum(0).int()
    got = prefill_attention_triton(
        query.to(DEVICE),
        on_device(cache),
        block_table=block_table.to(DEVICE),
        query_start_loc=query_start_loc.to(DEVICE),
        seq_lens=seq_lens.to(DEVICE),
        scale=scale,
    )
    expected = prefill_attention_reference(
        query.float(), cache, block_table=block_table, query_start_loc=query_start_loc, seq_lens=seq_lens, scale=scale
    )
    assert_attention_close(got, expected, query, cache, scale, max(lengths))


@given(
    st.integers(1, 9),
    st.sampled_from([(1, 32), (3, 64), (4, 128)]),
    st.sampled_from([1, 16, 24]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=15)
def test_written_bytes_are_the_references(
    num_tokens: int, heads: tuple[int, int], block_size: int, pages: bool, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, num_tokens, *heads, generator=generator).to(dtype)
    value[::3] = 0
    caches = [poisoned_cache(-(-num_tokens // block_size) + 2, block_size, *heads, pages) for _ in range(2)]
    slots = torch.randperm(caches[0].num_blocks * block_size, generator=generator)[:num_tokens]
    slots[torch.rand(num_tokens, generator=generator) < 0.2] = -1
    written = on_device(caches[0])
    write_kv_triton(key.to(DEVICE), value.to(DEVICE), written, slot_mapping=slots.to(DEVICE))
    write_kv_reference(key, value, caches[1], slot_mapping=slots)
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(written, name).cpu(), getattr(caches[1], name), rtol=0, atol=0, equal_nan=True, msg=name
        )


def test_codes_round_half_to_even_and_stay_in_range() -> None:
    cache = on_device(poisoned_cache(1, 16, 1, 32))
    key = torch.zeros(3, 1, 32)
    key[0, 0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -1.5, 126.5])
    key[1, 0, :2] = torch.tensor([-(2.0**100), 2.0**93])
    key[2, 0, :2] = torch.tensor([2.0**-149, 2.0**-146])
    key = key.to(DEVICE)
    write_kv_triton(key, key, cache, slot_mapping=torch.tensor([0, 1, 2], device=DEVICE))
    assert cache.key[0, 0, 0, :6].tolist() == [127, 0, 2, 2, -2, 126]
    assert cache.key[0, 1, 0, :2].tolist() == [-127, 1]
    assert (cache.key[0, 2].abs() <= 127).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_query_heads", "num_kv_heads", "head_dim"), [(4, 2, 32), (9, 3, 64), (16, 1, 128)])
def test_norm_rope_write_on_views_of_a_fused_projection(
    num_query_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    num_tokens = 7
    generator = torch.Generator().manual_seed(3)
    widths = [num_query_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    fused = torch.randn(num_tokens, sum(widths), generator=generator).to(dtype)
    parts = [part.unflatten(1, (-1, head_dim)) for part in fused.split(widths, 1)]
    angles = 6 * torch.rand(50, head_dim // 2, generator=generator)
    arguments = {
        "q_weight": 1 + 0.2 * torch.randn(head_dim, generator=generator),
        "k_weight": 1 + 0.2 * torch.randn(head_dim, generator=generator),
        "positions": torch.randint(0, 50, (num_tokens,), generator=generator),
        "cos_sin_cache": torch.cat((angles.cos(), angles.sin()), 1),
        "slot_mapping": torch.tensor([9, 3, -1, 63, 0, 17, 31]),
    }
    caches = [poisoned_cache(4, 16, num_kv_heads, head_dim) for _ in range(2)]
    expected = norm_rope_write_reference(*(part.float() for part in parts), caches[1], eps=1e-6, **arguments)
    written = on_device(caches[0])
    device_fused = fused.to(DEVICE)
    got = norm_rope_write_triton(
        *(part.unflatten(1, (-1, head_dim)) for part in device_fused.split(widths, 1)),
        written,
        eps=1e-6,
        **{name: tensor.to(DEVICE) for name, tensor in arguments.items()},
    )
    # Up to D / 2 + 10 roundings in the sum of squares, and an inverse root good to 2 units in the last place.
    relative = (head_dim / 2 + 10 + 4) * 2.0**-24
    unit = {torch.float32: 0.0, torch.bfloat16: 2.0**-7}[dtype]
    magnitude = expected.abs().max().item()
    torch.testing.assert_close(got.cpu().float(), expected, rtol=unit, atol=3 * relative * magnitude)
    for name in ("value", "value_scale"):
        torch.testing.assert_close(
            getattr(written, name).cpu(), getattr(caches[1], name), rtol=0, atol=0, equal_nan=True, msg=name
        )
    scales = written.key_scale.cpu()
    torch.testing.assert_close(scales, caches[1].key_scale, rtol=3 * relative, atol=0, equal_nan=True)
    # A ratio near a tie may round to the other side, and no further.
    assert (written.key.cpu().int() - caches[1].key.int()).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_decoding_at_block_tile_and_split_edges(dtype: torch.dtype) -> None:
    lengths = [0, 1, 15, 16, 17, 31, 33, 127, 128, 129, 257]
    output, lse = check_decoding(lengths, num_query_heads=4, dtype=dtype)
    assert not output[0].any()
    assert (lse[0] == -math.inf).all()


@pytest.mark.parametrize(
    ("num_query_heads", "num_kv_heads", "head_dim", "block_size", "pages"),
    [(16, 1, 128, 16, True), (3, 3, 64, 24, False), (17, 1, 32, 256, True), (6, 2, 64, 1, False)],
)
def test_decoding_heads_and_layouts(
    num_query_heads: int, num_kv_heads: int, head_dim: int, block_size: int, pages: bool
) -> None:
    check_decoding(
        [130, 5],
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        pages=pages,
    )


def test_decoding_a_long_context_in_many_splits() -> None:
    """40 splits: more than the merge takes at a time."""
    check_decoding([40_001, 700], num_query_heads=2, num_kv_heads=1, head_dim=128, split_tokens=1024)


@given(
    st.lists(st.integers(0, 150), min_size=1, max_size=3),
    st.sampled_from([(1, 1), (5, 1), (4, 2)]),
    st.sampled_from([8, 16, 24]),
    st.booleans(),
    st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=8)
def test_decoding_on_random_layouts(
    lengths: list[int], heads: tuple[int, int], block_size: int, pages: bool, seed: int
) -> None:
    check_decoding(
        lengths, num_query_heads=heads[0], num_kv_heads=heads[1], block_size=block_size, pages=pages, seed=seed
    )


@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 40)), min_size=1, max_size=4),
    st.sampled_from([(1, 1), (5, 1), (4, 2)]),
    st.sampled_from([8, 16, 24]),
    st.booleans(),
    st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=8)
def test_mixed_batches_on_random_layouts(
    sequences: list[tuple[int, int]], heads: tuple[int, int], block_size: int, pages: bool, seed: int
) -> None:
    check_prefill(
        [length for length, _ in sequences],
        [min(length, count) for length, count in sequences],
        num_query_heads=heads[0],
        num_kv_heads=heads[1],
        block_size=block_size,
        pages=pages,
        seed=seed,
    )


@pytest.mark.parametrize("num_rows", [7, 8, 9, 16, 17])
def test_prefill_at_tile_edges(num_rows: int) -> None:
    """Sixteen heads leave eight tokens to a program."""
    check_prefill([num_rows, 0, 64 + num_rows, 65], [num_rows, 0, num_rows, 1], num_query_heads=16, num_kv_heads=1)


@pytest.mark.parametrize(
    ("num_query_heads", "head_dim", "dtype"),
    [(1, 64, torch.float16), (3, 128, torch.bfloat16), (2, 32, torch.float32)],
)
def test_prefill_heads_and_dtypes(num_query_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    check_prefill([140, 20], [131, 5], num_query_heads=num_query_heads, num_kv_heads=1, head_dim=head_dim, dtype=dtype)


def test_a_row_has_the_same_bits_in_any_batch_for_one_split_length() -> None:
    cache, block_table, seq_lens = random_sequences([1, 300, 129, 40])
    query = random_query(4, 4, 32, dtype=torch.bfloat16).to(DEVICE)
    cache, block_table, seq_lens = on_device(cache), block_table.to(DEVICE), seq_lens.to(DEVICE)
    output, lse = decode_attention_triton(
        query, cache, block_table=block_table, seq_lens=seq_lens, scale=0.2, split_tokens=128
    )
    for rows, max_seq_len in (([3, 1], 300), ([2], 129), ([0], 16)):
        part = decode_attention_triton(
            query[rows],
            cache,
            block_table=block_table[rows],
            seq_lens=seq_lens[rows],
            scale=0.2,
            max_seq_len=max_seq_len,
            split_tokens=128,
        )
        assert torch.equal(part[0], output[rows])
        assert torch.equal(part[1], lse[rows])


@pytest.mark.parametrize("magnitude", [0.0, 2.0**-60, 2.0**60])
def test_queries_and_values_of_any_magnitude(magnitude: float) -> None:
    """Float16 holds neither: the query's power of two and the value's scale are kept apart."""
    cache = poisoned_cache(3, 16, 1, 32)
    generator = torch.Generator().manual_seed(5)
    key, value = torch.randn(2, 40, 1, 32, generator=generator)
    write_kv_cpu(key, magnitude * value, cache, slot_mapping=torch.arange(40))
    query = (magnitude * random_query(1, 2, 32)).bfloat16()
    scale = 0.2 / (magnitude or 1.0)
    arguments = {"block_table": torch.tensor([[0, 1, 2]]), "seq_lens": torch.tensor([40])}
    got = decode_attention_triton(
        query.to(DEVICE),
        on_device(cache),
        scale=scale,
        split_tokens=128,
        **{name: tensor.to(DEVICE) for name, tensor in arguments.items()},
    )
    expected = attention_cpu(query.float(), cache, query_start_loc=None, scale=scale, **arguments)
    assert_attention_close(got, expected, query, cache, scale, 40)


def test_addresses_past_two_gigabytes() -> None:
    """The third page starts at 2**31 bytes; only the memory of the pages is ever touched."""
    num_bytes = page_bytes(16, 1, 32)
    if IS_INTERPRETED:
        memory = torch.from_numpy(np.empty(2**31 + num_bytes, np.uint8))
    else:
        memory = torch.zeros(2**31 + num_bytes, dtype=torch.uint8, device=DEVICE)
    far = kv_cache_from_pages(memory.as_strided((3, num_bytes), (2**30, 1)), block_size=16, num_kv_heads=1, head_dim=32)
    near = poisoned_cache(3, 16, 1, 32)
    key, value = random_query(2, 20, 1, 32)
    slots = torch.cat((torch.arange(32, 48), torch.arange(4)))
    write_kv_triton(key.to(DEVICE), value.to(DEVICE), far, slot_mapping=slots.to(DEVICE))
    write_kv_cpu(key, value, near, slot_mapping=slots)
    query = random_query(1, 2, 32)
    arguments = {"block_table": torch.tensor([[2, 0]]), "seq_lens": torch.tensor([20])}
    expected = attention_cpu(query, near, query_start_loc=None, scale=0.2, **arguments)
    arguments = {name: tensor.to(DEVICE) for name, tensor in arguments.items()}
    got = decode_attention_triton(query.to(DEVICE), far, scale=0.2, split_tokens=128, **arguments)
    assert_attention_close(got, expected, query, near, 0.2, 20)
    query_start_loc = torch.tensor([0, 1], device=DEVICE)
    got = prefill_attention_triton(query.to(DEVICE), far, scale=0.2, query_start_loc=query_start_loc, **arguments)
    assert_attention_close(got, expected, query, near, 0.2, 20)


def test_split_length_follows_from_the_shapes() -> None:
    for num_sequences, max_seq_len in [(1, 4096), (8, 32_768), (64, 32_768), (1, 0), (512, 40_960)]:
        tokens = default_split_tokens(num_sequences, 4, max_seq_len, 132)
        assert tokens in (256, 512, 1024, 2048, 4096)
        num_programs = num_sequences * 4 * max_seq_len / tokens
        assert tokens == 256 or num_programs >= 8 * 132
        assert tokens == 4096 or num_programs <= 16 * 132


@pytest.mark.skipif(IS_INTERPRETED, reason="needs CUDA graphs")
def test_decoding_replays_in_a_cuda_graph() -> None:
    cache, block_table, seq_lens = random_sequences([300, 20])
    query = random_query(2, 4, 32, dtype=torch.bfloat16)
    static_query, static_lens = query.to(DEVICE), torch.tensor([16, 16], dtype=torch.int32, device=DEVICE)
    static_cache, static_table = on_device(cache), block_table.to(DEVICE)
    static_table.clamp_(max=cache.num_blocks - 1)
    arguments = {"block_table": static_table, "seq_lens": static_lens, "scale": 0.2, "split_tokens": 128}
    decode_attention_triton(static_query, static_cache, **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = decode_attention_triton(static_query, static_cache, **arguments)
    static_lens.copy_(seq_lens)
    graph.replay()
    expected = attention_cpu(
        query.float(), cache, block_table=block_table, query_start_loc=None, seq_lens=seq_lens, scale=0.2
    )
    assert_attention_close(got, expected, query, cache, 0.2, 300)


def test_wrong_arguments_are_refused_before_launch() -> None:
    cache, block_table, seq_lens = random_sequences([5])
    cache, block_table, seq_lens = on_device(cache), block_table.to(DEVICE), seq_lens.to(DEVICE)
    query = torch.zeros(1, 4, 32, device=DEVICE)
    arguments = {"block_table": block_table, "seq_lens": seq_lens, "scale": 0.2}
    for name, value in (("split_tokens", 0), ("split_tokens", 100), ("max_seq_len", 1000), ("max_seq_len", -1)):
        with pytest.raises(ValueError, match=rf"{name}: got .* expected"):
            decode_attention_triton(query, cache, **{**arguments, name: value})
    with pytest.raises(ValueError, match=r"query: got .* expected"):
        decode_attention_triton(query[:, :3], cache, **arguments)
    with pytest.raises(ValueError, match=r"query_start_loc: got .* expected"):
        prefill_attention_triton(query, cache, query_start_loc=torch.zeros(1, device=DEVICE), **arguments)
    with pytest.raises(ValueError, match=r"value: got .* expected"):
        write_kv_triton(query[:, :2], query, cache, slot_mapping=torch.zeros(1, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match=r"q_weight: got .* expected"):
        norm_rope_write_triton(
            query,
            query[:, :2],
            query[:, 2:],
            cache,
            q_weight=torch.zeros(16, device=DEVICE),
            k_weight=torch.zeros(32, device=DEVICE),
            eps=1e-6,
            positions=torch.zeros(1, dtype=torch.int64, device=DEVICE),
            cos_sin_cache=torch.zeros(4, 32, device=DEVICE),
            slot_mapping=torch.zeros(1, dtype=torch.int64, device=DEVICE),
        )


def test_nothing_to_do() -> None:
    cache, block_table, seq_lens = random_sequences([5])
    cache, block_table, seq_lens = on_device(cache), block_table.to(DEVICE)[:0], seq_lens.to(DEVICE)[:0]
    none = torch.zeros(0, 4, 32, device=DEVICE)
    output, lse = decode_attention_triton(none, cache, block_table=block_table, seq_lens=seq_lens, scale=0.2)
    assert output.shape == (0, 4, 32)
    assert lse.shape == (0, 4)
    write_kv_triton(none[:, :2], none[:, :2], cache, slot_mapping=torch.zeros(0, dtype=torch.int64, device=DEVICE))
