"""Whole decode steps of one GPU's share of Qwen3-235B-A22B: ``python -m kernels.bench_shard [--json OUT]``.

Owns the sizes that are measured, what fits, the table and the record; the step is ``shard_model.py``'s. Weights
are random, and every layer has its own. Steps are timed inside a CUDA graph, from token to token on the device.
The exchange of rows between the ranks is not run, only its bytes are stated. Bytes read are counted, not measured.
"""

import argparse
import gc
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

import torch

from kernels.measure import graph_time_s, memcpy_bandwidth
from kernels.shard_model import (
    QWEN3_235B_A22B,
    DecodeBatch,
    DecodeStep,
    Part,
    Shard,
    ShardConfig,
    random_batch,
    random_shard,
)
from kernels.shard_reference import StepErrors, step_errors

CHECK_CONFIG = replace(
    QWEN3_235B_A22B,
    num_layers=2,
    hidden=256,
    num_query_heads=8,
    num_kv_heads=2,
    head_dim=32,
    num_experts=16,
    experts_per_token=4,
    expert_width=128,
    vocab_size=512,
    ep=4,
)
"""A small shard that is compared with its definition before anything is timed."""
UNIT = 2.0**-8
"""Of rounding to bfloat16, as a relative step; the rounding itself is off by half of it."""
ROUNDINGS_PER_LAYER = 10
"""Results in bfloat16 on the longest way through a layer: norm, projection, query, attention, output, sum, norm,
activation, an expert's result, their sum."""
MAX_LOGIT = 8.0
"""Random weights keep logits of deviation 1; one of a few thousand passes 8 of them about never."""
EXCLUDED = "all-to-all between the ranks (dispatch and combine), scheduling, launches outside the graph"


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one part of the shard."""

    part: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Bytes one GPU would receive a step, both ways together, had the exchange been run.

    Attributes:
        gathered_bytes: Every rank gets every row, and each row's results are added on the way back.
        chosen_bytes: A row goes, once, to each other rank that holds an expert it chose; experts chosen evenly.
    """

    gathered_bytes: int
    chosen_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """One line of the table; measurements are None where the cache does not fit.

    Attributes:
        pairs_per_layer: Mean (token, local expert) pairs a layer.
        attention_ms: Step less the step without the reading of the cache.
        experts_ms: Step less the step without router and experts.
        read_bytes: Weights of this step's experts and of all else, one row of the embedding a token, contexts.
    """

    batch: int
    context: int
    kv_bytes: int
    exchange: Exchange
    step_ms: float | None = None
    tokens_per_s: float | None = None
    attention_ms: float | None = None
    experts_ms: float | None = None
    pairs_per_layer: float | None = None
    read_bytes: int | None = None
    memcpy_share: float | None = None


def memory_by_part(shard: Shard) -> list[Memory]:
    """Return the bytes of the weights; a shard on "meta" has them too."""
    layers = shard.layers
    tensors = {
        "attention, INT4": [t for layer in layers for t in (*layer.qkv, *layer.output)],
        "local experts, INT4": [t for layer in layers for t in (*layer.w13, *layer.w2)],
        "router": [layer.gate for layer in layers],
        "norms": [shard.final_norm]
        + [t for layer in layers for t in (layer.input_norm, layer.q_norm, layer.k_norm, layer.post_norm)],
        "embedding": [shard.embedding],
        "head": [shard.head],
    }
    return [Memory(part=part, num_bytes=sum(t.nbytes for t in group)) for part, group in tensors.items()]


def exchange_bytes(config: ShardConfig, batch: int) -> Exchange:
    """Return the bytes of rows, and on the way out of ids and weights, that an exchange would bring."""
    row = 2 * 2 * config.hidden + config.experts_per_token * (4 + 4)
    others = config.num_experts - config.num_local_experts
    is_missed = math.comb(others, config.experts_per_token) / math.comb(config.num_experts, config.experts_per_token)
    rows = (config.ep - 1) * batch * config.num_layers
    return Exchange(gathered_bytes=rows * row, chosen_bytes=round(rows * (1 - is_missed) * row))


def workspace_bytes(config: ShardConfig, batch: int) -> int:
    """Return an upper bound of a step's temporaries and inputs besides the cache, in a graph and again outside."""
    rows = config.ep * batch
    pairs = rows * config.experts_per_token
    experts = 2 * pairs * (config.hidden + config.expert_width) + 4 * 2 * rows * config.hidden
    logits = 4 * 4 * batch * config.vocab_size
    routing = config.num_layers * rows * (2 * 4 * config.num_experts + 16 * config.experts_per_token)
    return 2 * (experts + logits) + routing + 2**30


def read_bytes(shard: Shard, batch: DecodeBatch) -> tuple[int, float]:
    """Return the bytes a step must read and the mean pairs a layer, after a step has left its routing in batch."""
    config, num_rows = shard.config, len(batch.tokens)
    by_part = {memory.part: memory.num_bytes for memory in memory_by_part(shard)}
    expert_bytes = by_part["local experts, INT4"] // (config.num_layers * config.num_local_experts)
    local = shard.expert_map[batch.ids.long()].cpu()
    num_hit = sum(len(layer[layer >= 0].unique()) for layer in local)
    num_bytes = sum(n for part, n in by_part.items() if part not in ("local experts, INT4", "embedding"))
    num_bytes += num_hit * expert_bytes + num_rows * config.hidden * shard.embedding.element_size()
    num_bytes += config.num_layers * num_rows * batch.context * 2 * config.num_kv_heads * (config.head_dim + 4)
    return num_bytes, (local >= 0).sum().item() / config.num_layers


def check_step(config: ShardConfig, device: str, dtype: torch.dtype, unit: float) -> StepErrors:
    """Compare a step of random weights with its definition.

    The largest of many errors is taken over the largest value, so a rounding counts with a whole unit; gains of a
    layer are about 1. A choice, a logit at the head and at the router, is off twice that: it is a difference of two.
    float32 sums over the longest dimension need more units, and ``unit`` must have them.

    Raises:
        AssertionError: An error is larger than its bound.
    """
    generator = torch.Generator(device).manual_seed(0)
    shard = random_shard(config, device=device, dtype=dtype, generator=generator)
    batch = random_batch(shard, 3, 37, generator)
    result = DecodeStep(shard)(batch)
    errors = step_errors(shard, batch, result)
    bound = (config.num_layers * ROUNDINGS_PER_LAYER + 2) * unit
    bounds = StepErrors(
        logits=bound,
        partial=bound,
        cache=0.5 / 127 + bound,
        choice=2 * MAX_LOGIT * bound,
        weight=2 * MAX_LOGIT * bound,
        token=2 * MAX_LOGIT * bound,
    )
    for name, limit in asdict(bounds).items():
        error = getattr(errors, name)
        assert error <= limit, f"{name}: error {error}, expected <= {limit}"
    return errors


def time_steps(shard: Shard, contexts: list[int], batches: list[int], bandwidth: float) -> Iterator[StepTime]:
    """Measure each context over each batch on the shard's device; what does not fit has no measurements."""
    step = DecodeStep(shard)
    for context, size in itertools.product(contexts, batches):
        gc.collect()
        torch.cuda.empty_cache()
        kv_bytes = shard.config.kv_bytes(size, context)
        line = StepTime(batch=size, context=context, kv_bytes=kv_bytes, exchange=exchange_bytes(shard.config, size))
        if kv_bytes + workspace_bytes(shard.config, size) > torch.cuda.mem_get_info()[0]:
            yield line
            continue
        yield time_step(shard, step, line, bandwidth)


def time_step(shard: Shard, step: DecodeStep, line: StepTime, bandwidth: float) -> StepTime:
    """Return the line with its measurements; on the CPU, for tests, times are those of its implementations."""
    device = shard.device.type
    generator = torch.Generator(device).manual_seed(0)
    batch = random_batch(shard, line.batch, line.context, generator)
    result = step(batch)
    assert bool(result.logits.isfinite().all()), "logits: got NaN or infinite values, expected finite ones"
    num_bytes, pairs = read_bytes(shard, batch)
    seconds = graph_time_s(lambda: step(batch), device)
    without = {part: graph_time_s(lambda: step(batch, skip=part), device) for part in Part}  # noqa: B023
    return replace(
        line,
        step_ms=seconds * 1e3,
        tokens_per_s=line.batch / seconds,
        attention_ms=(seconds - without[Part.ATTENTION]) * 1e3,
        experts_ms=(seconds - without[Part.EXPERTS]) * 1e3,
        pairs_per_layer=pairs,
        read_bytes=num_bytes,
        memcpy_share=num_bytes / seconds / bandwidth,
    )


def format_line(line: StepTime) -> str:
    """Return one line of the table."""
    sizes = f"{line.batch:>5} {line.context:>8} {line.exchange.gathered_bytes * 1e-6:>10.1f}"
    sizes += f" {line.exchange.chosen_bytes * 1e-6:>10.1f}"
    if line.step_ms is None:
        return f"{sizes}   does not fit: {line.kv_bytes * 1e-9:.1f} GB of cache"
    return (
        f"{sizes} {line.step_ms:>8.2f} {line.tokens_per_s:>9.1f} {(line.read_bytes or 0) * 1e-9:>8.2f}"
        f" {line.memcpy_share:>7.0%} {line.attention_ms:>9.2f} {line.experts_ms:>8.2f} {line.pairs_per_layer:>8.1f}"
    )


def print_memory(config: ShardConfig, contexts: list[int], batches: list[int]) -> None:
    """Print the bytes of the shard by part and of the cache at each size, of shapes alone."""
    parts = memory_by_part(random_shard(config, device="meta"))
    for memory in [*parts, Memory(part="shard", num_bytes=sum(memory.num_bytes for memory in parts))]:
        print(f"{memory.part:<24} {memory.num_bytes * 1e-9:>8.3f} GB")
    for context, size in itertools.product(contexts, batches):
        name = f"cache {size} x {context}"
        print(f"{name:<24} {config.kv_bytes(size, context) * 1e-9:>8.3f} GB")


def measure(config: ShardConfig, contexts: list[int], batches: list[int], json_path: str | None) -> None:
    """Check, measure, print the table and write the record where asked; needs CUDA."""
    import triton

    check_step(CHECK_CONFIG, "cuda", torch.bfloat16, UNIT)
    bandwidth = memcpy_bandwidth("cuda")
    device_name = torch.cuda.get_device_name()
    print(f"{device_name}: memcpy {bandwidth * 1e-9:.0f} GB/s (read and write)")
    shard = random_shard(config, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    parts = memory_by_part(shard)
    print(
        f"{config.num_layers} layers, rank 0 of {config.ep}: {sum(m.num_bytes for m in parts) * 1e-9:.2f} GB;", end=" "
    )
    print("embedding, head and router bfloat16, the rest INT4")
    print(f"not in the time: {EXCLUDED}; its MB follow, all rows to all ranks, and to the chosen ones")
    header = (
        "batch",
        "context",
        "all MB",
        "chosen MB",
        "ms",
        "tokens/s",
        "GB read",
        "memcpy",
        "attn ms",
        "moe ms",
        "pairs",
    )
    print("{:>5} {:>8} {:>10} {:>10} {:>8} {:>9} {:>8} {:>7} {:>9} {:>8} {:>8}".format(*header))
    lines = []
    for line in time_steps(shard, contexts, batches, bandwidth):
        print(format_line(line), flush=True)
        lines.append(line)
    if json_path:
        record = {
            "date": datetime.now(UTC).date().isoformat(),
            "device": device_name,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "memcpy_gb_per_s": bandwidth * 1e-9,
            "config": asdict(config),
            "memory": [asdict(memory) for memory in parts],
            "excluded": EXCLUDED,
            "results": [asdict(line) for line in lines],
        }
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2)


def _positive_integers(text: str) -> list[int]:
    values = [int(value) for value in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected integers of at least 1")
    return values


def main() -> None:
    """Parse the arguments, then measure, or say that there is nothing to measure on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ep", type=int, default=QWEN3_235B_A22B.ep, help="ranks that share the experts")
    parser.add_argument("--layers", type=int, default=QWEN3_235B_A22B.num_layers, help="layers of the model")
    parser.add_argument("--contexts", type=_positive_integers, default="4096,20480,32768", help="tokens in the cache")
    parser.add_argument("--batches", type=_positive_integers, default="1,4,16,32,64", help="sequences of this rank")
    parser.add_argument("--json", metavar="OUT", help="also write the results to this file")
    parser.add_argument("--dry-run", action="store_true", help="print the memory by part and measure nothing")
    options = parser.parse_args()
    config = replace(QWEN3_235B_A22B, ep=options.ep, num_layers=options.layers)
    if not torch.cuda.is_available():
        print("not measured: no CUDA device")
    if options.dry_run:
        print_memory(config, options.contexts, options.batches)
    elif torch.cuda.is_available():
        measure(config, options.contexts, options.batches, options.json)


if __name__ == "__main__":
    main()
