"""Bench of token trees over the INT8 KV cache, against decoding one row a request over the same cache.

Owns the shapes and the check before each timing; ``bench.py`` owns the table, ``bench_kv.py`` the caches. Each shape
gives two lines, ``tree_decode`` for a row a request and ``tree_attention`` for the trees, and the shape of the second
says how many times as long it took. On a CUDA device both are replays of a graph; on the CPU both are one layer's
call, the step's plan being made once for all layers and a line of its own, ``tree_plan``. The bytes are one read of
the codes and scales of each context, the queries and the outputs; the error is the largest of an output element
against float32 over the dequantised cache, in units of the largest value.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from kernels.bench_kv import NUM_CHECKED_ROWS, captured, random_cache
from kernels.kv_attention import KVCache, decode_attention, paged_attention_cpu, plan_attention
from kernels.kv_attention.reference import gather_kv
from kernels.measure import Result, median_time_s
from kernels.tree_attention import (
    TreeBatch,
    paged_tree_attention_cpu,
    plan_tree_attention,
    tree_attention,
    tree_batch,
)

NUM_NODES = 16
MAX_WIDTH = 4


def random_trees(num_requests: int, num_nodes: int) -> TreeBatch:
    """Return trees of layers of at most MAX_WIDTH nodes, each the child of a random one of the layer before."""
    generator = torch.Generator().manual_seed(0)
    parents: list[int] = []
    for _ in range(num_requests):
        layer, rows = [0], [0]
        while len(rows) <= num_nodes:
            width = min(MAX_WIDTH, num_nodes + 1 - len(rows))
            chosen = torch.randint(len(layer), (width,), generator=generator).sort().values.tolist()
            layer, rows = list(range(len(rows), len(rows) + width)), rows + [layer[place] for place in chosen]
        parents += rows
    return tree_batch(torch.tensor(parents), torch.full((num_requests,), num_nodes + 1))


def check_tree_attention(
    output: torch.Tensor,
    query: torch.Tensor,
    cache: KVCache,
    trees: TreeBatch,
    block_table: torch.Tensor,
    length: int,
    scale: float,
) -> float:
    """Compare the first requests with float32; return the error in units of the largest value.

    The bound is that of decoding: one rounding of the output to bfloat16 (2**-9), one of a weight to float16
    (2**-11), and as much again for the scores.

    Raises:
        AssertionError: The error is above 2**-8.
    """
    worst = 0.0
    count = trees.max_rows
    for request in range(min(NUM_CHECKED_ROWS, trees.num_requests)):
        rows = slice(request * count, (request + 1) * count)
        key, value = (x.transpose(0, 1).unsqueeze(0) for x in gather_kv(cache, block_table[request], length))
        mask = F.pad(trees.mask[rows], (length - count, 0), value=True)
        exact = query[rows].float().transpose(0, 1).unsqueeze(0)
        expected = F.scaled_dot_product_attention(exact, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
        error = (output[rows].float().transpose(0, 1) - expected[0]).abs().max() / value.abs().max()
        worst = max(worst, error.item())
    assert worst <= 2.0**-8, f"output: error {worst} of the largest value, expected <= {2.0**-8}"
    return worst


def bench_tree_attention(device: str, bandwidth: float) -> Iterator[Result]:
    """Measure trees of NUM_NODES nodes over context lengths and batch sizes."""
    if device == "cuda":
        shapes = [(b, 32_768, heads, 4, 128) for heads, b in itertools.product((16, 32, 64), (1, 4, 16))]
        dtype = torch.bfloat16
    else:
        shapes = [(b, length, 4, 2, 32) for length, b in itertools.product((256, 1024, 4096), (1, 4, 16))]
        dtype = torch.float32
    for num_requests, length, num_query_heads, num_kv_heads, head_dim in shapes:
        generator = torch.Generator(device).manual_seed(0)
        cache, block_table = random_cache(num_requests, length, num_kv_heads, head_dim, device, generator)
        trees = random_trees(num_requests, NUM_NODES).to(device)
        query = torch.randn(trees.num_rows, num_query_heads, head_dim, device=device, generator=generator).to(dtype)
        seq_lens = torch.full((num_requests,), length, dtype=torch.int32, device=device)
        scale = head_dim**-0.5
        prepare = _cuda_calls if device == "cuda" else _cpu_calls
        decode, attend, plan = prepare(query, cache, trees, block_table, seq_lens, scale)
        error = check_tree_attention(attend(), query, cache, trees, block_table, length, scale)
        decode_s, tree_s = (
            median_time_s(captured(run) if device == "cuda" else run, device) for run in (decode, attend)
        )
        shape = f"{num_requests}x{length} {num_query_heads}/{num_kv_heads}x{head_dim}"
        context_bytes = num_requests * length * num_kv_heads * 2 * (head_dim + 4)
        for op, seconds, num_rows in (("tree_decode", decode_s, num_requests), ("tree_attention", tree_s, len(query))):
            rate = (context_bytes + 2 * query[:num_rows].nbytes) / seconds
            is_tree = op == "tree_attention"
            yield Result(
                op=op,
                shape=f"{shape} N={NUM_NODES} {tree_s / decode_s:.2f}x" if is_tree else shape,
                device=device,
                time_us=seconds * 1e6,
                gb_per_s=rate * 1e-9,
                memcpy_share=rate / bandwidth if device == "cuda" else None,
                error=error if is_tree else 0.0,
            )
        if plan is not None:
            yield Result(
                op="tree_plan",
                shape=f"{shape} N={NUM_NODES}",
                device=device,
                time_us=median_time_s(plan, device) * 1e6,
                gb_per_s=0.0,
                memcpy_share=None,
                error=0.0,
            )


Calls = tuple[Callable[[], object], Callable[[], torch.Tensor], Callable[[], object] | None]
"""Decode one row a request, attend with the trees, and plan a step of them where there is a plan."""


def _cuda_calls(
    query: torch.Tensor,
    cache: KVCache,
    trees: TreeBatch,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> Calls:
    first_rows = query[: len(seq_lens)].contiguous()
    arguments = {"block_table": block_table, "seq_lens": seq_lens, "scale": scale}

    def decode() -> object:
        return decode_attention(first_rows, cache, **arguments)

    def attend() -> torch.Tensor:
        return tree_attention(query, cache, trees=trees, **arguments)[0]

    return decode, attend, None


def _cpu_calls(
    query: torch.Tensor,
    cache: KVCache,
    trees: TreeBatch,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> Calls:
    first_rows = query[: len(seq_lens)].contiguous()
    sequences = {"block_table": block_table, "seq_lens": seq_lens, "cache": cache, "num_query_heads": query.shape[1]}
    decode_plan = plan_attention(query_start_loc=None, **sequences)
    tree_plan = plan_tree_attention(trees=trees, **sequences)
    output = torch.empty_like(query)

    def decode() -> object:
        return paged_attention_cpu(first_rows, cache, plan=decode_plan, scale=scale)

    def attend() -> torch.Tensor:
        paged_tree_attention_cpu(query, cache, plan=tree_plan, scale=scale, output=output)
        return output

    return decode, attend, lambda: plan_tree_attention(trees=trees, **sequences)
