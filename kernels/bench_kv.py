"""Bench of decoding over the INT8 KV cache, against the same attention over bfloat16 keys and values.

Owns the shapes, the check before each timing and the bfloat16 baseline; ``bench.py`` owns the table. The bytes
are one read of the codes and scales of each context, the queries and the outputs. The error is the largest of an
output element against float32 over the dequantised cache, in units of the largest value.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from kernels.kv_attention import KVCache, decode_attention, kv_cache_from_pages, page_bytes
from kernels.kv_attention.reference import gather_kv
from kernels.measure import Result, median_time_s

BLOCK_SIZE = 16
NUM_CHECKED_ROWS = 2


def random_cache(
    num_sequences: int, length: int, num_kv_heads: int, head_dim: int, device: str, generator: torch.Generator
) -> tuple[KVCache, torch.Tensor]:
    """Return a full cache of random codes and its block table [B, max_blocks] int32, blocks in random order."""
    blocks_per_sequence = -(-length // BLOCK_SIZE)
    num_blocks = num_sequences * blocks_per_sequence
    num_bytes = page_bytes(BLOCK_SIZE, num_kv_heads, head_dim)
    pages = torch.empty(num_blocks, num_bytes, dtype=torch.int8, device=device)
    cache = kv_cache_from_pages(pages, block_size=BLOCK_SIZE, num_kv_heads=num_kv_heads, head_dim=head_dim)
    for codes, scale in ((cache.key, cache.key_scale), (cache.value, cache.value_scale)):
        codes.random_(-127, 128, generator=generator)
        # Codes spread evenly over +-127 times this have a deviation of about 1.
        scale.uniform_(0.01, 0.017, generator=generator)
    block_table = torch.randperm(num_blocks, generator=generator, device=device).int()
    return cache, block_table.view(num_sequences, blocks_per_sequence)


def check_decode_attention(
    output: torch.Tensor, query: torch.Tensor, cache: KVCache, block_table: torch.Tensor, length: int, scale: float
) -> float:
    """Compare the first rows with float32 over the dequantised cache; return the error in units of the largest value.

    The bound is one rounding of the output to bfloat16 (2**-9), one of a weight to float16 (2**-11), and as much
    again for the scores.

    Raises:
        AssertionError: The error is above 2**-8.
    """
    worst = 0.0
    for row in range(min(NUM_CHECKED_ROWS, len(query))):
        key, value = (x.transpose(0, 1).unsqueeze(0) for x in gather_kv(cache, block_table[row], length))
        exact = query[row].float()[None, :, None]
        expected = F.scaled_dot_product_attention(exact, key, value, scale=scale, enable_gqa=True)[0, :, 0]
        error = (output[row].float() - expected).abs().max() / value.abs().max()
        worst = max(worst, error.item())
    assert worst <= 2.0**-8, f"output: error {worst} of the largest value, expected <= {2.0**-8}"
    return worst


def bf16_time_s(query: torch.Tensor, num_kv_heads: int, length: int, scale: float, generator: torch.Generator) -> float:
    """Return the median time of torch's attention over contiguous bfloat16 keys and values.

    The faster of two ways to say it: grouped queries, or the heads of a group as rows of one query.
    """
    num_sequences, num_query_heads, head_dim = query.shape
    shape = (2, num_sequences, num_kv_heads, length, head_dim)
    key, value = torch.randn(shape, dtype=torch.bfloat16, device=query.device, generator=generator)
    grouped = query.view(num_sequences, num_kv_heads, num_query_heads // num_kv_heads, head_dim)
    runs: tuple[Callable[[], object], ...] = (
        lambda: F.scaled_dot_product_attention(query.unsqueeze(2), key, value, scale=scale, enable_gqa=True),
        lambda: F.scaled_dot_product_attention(grouped, key, value, scale=scale),
    )
    return min(median_time_s(captured(run), "cuda") for run in runs)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """Return the replay of run's CUDA graph: engines decode so, and a launch from Python takes longer than a kernel."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def bench_kv_attention(device: str, bandwidth: float) -> Iterator[Result]:
    """Measure ``decode_attention`` over context lengths and batch sizes."""
    if device == "cuda":
        shapes = [(b, length, 64, 4, 128) for length, b in itertools.product((4096, 20_480, 32_768), (1, 8, 32, 64))]
        dtype = torch.bfloat16
    else:
        shapes = [(1, 1024, 4, 2, 32), (64, 256, 4, 2, 32), (16, 1024, 16, 4, 64)]
        dtype = torch.float32
    for num_sequences, length, num_query_heads, num_kv_heads, head_dim in shapes:
        generator = torch.Generator(device).manual_seed(0)
        cache, block_table = random_cache(num_sequences, length, num_kv_heads, head_dim, device, generator)
        query = torch.randn(num_sequences, num_query_heads, head_dim, device=device, generator=generator).to(dtype)
        seq_lens = torch.full((num_sequences,), length, dtype=torch.int32, device=device)
        scale = head_dim**-0.5

        def run() -> torch.Tensor:
            return decode_attention(query, cache, block_table=block_table, seq_lens=seq_lens, scale=scale)[0]  # noqa: B023

        error = check_decode_attention(run(), query, cache, block_table, length, scale)
        seconds = median_time_s(captured(run) if device == "cuda" else run, device)
        num_bytes = num_sequences * length * num_kv_heads * 2 * (head_dim + 4) + 2 * query.nbytes
        ratio = None
        if device == "cuda":
            ratio = bf16_time_s(query, num_kv_heads, length, scale, generator) / seconds
        rate = num_bytes / seconds
        yield Result(
            op="kv_attention",
            shape=f"{num_sequences}x{length} {num_query_heads}/{num_kv_heads}x{head_dim}",
            device=device,
            time_us=seconds * 1e6,
            gb_per_s=rate * 1e-9,
            memcpy_share=rate / bandwidth if device == "cuda" else None,
            error=error,
            ratio_to_bf16=ratio,
        )
