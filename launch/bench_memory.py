"""Memory of weights and KV cache, INT4 and INT8 against bfloat16, at the same load.

    python -m launch.bench_memory [model=tests/data/qwen3_235b] [shards=8,16,32,64] [out=PATH] [engines=true]

Two parts. The shapes of a large model are laid out on torch's meta device, for one shard of each group size,
with INT4 as the experiment configures it, at the load that the bfloat16 shard can just hold on the device. The
engines of the embedded model are started, first in bfloat16 and then with INT4 and INT8, and asked
what their workers really hold.

`weights_ratio` is weights alone; `peak_ratio` is weights and KV cache at equal load.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import ray
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from actors.service import start_service
from launch.arguments import split_arguments
from launch.cluster import model_path, start_ray
from launch.compose import compose
from rollout.config import Int4Config
from rollout.errors import InvalidRequest, LongrollError
from rollout.memory import KV_INT8, AttentionShape, shard_weight_bytes
from rollout.sync.checkpoint_names import split_parameter
from rollout.sync.encoding import TensorPlan, plan_tensors
from rollout.sync.manifest import TensorSpec, spec_of

REPOSITORY = Path(__file__).resolve().parent.parent
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is laid out and started.

    Attributes:
        model: Directory with the config.json of the large model.
        experiment: Whose engine section says how it is quantised.
        shards: Group sizes.
        headline: The group size whose ratios are the headline.
        device_gb: Memory of a device, in 10^9 bytes.
        utilization: Share of it that the engine may take.
        reserve_gb: Of that, for activations, graphs and communication.
        engines: Whether to start the embedded model's engines as well.
        tiny_sequences, tiny_context: The load there.
    """

    model: str = "tests/data/qwen3_235b"
    experiment: str = "qwen3_235b_rl_20k"
    shards: tuple[int, ...] = (8, 16, 32, 64)
    headline: int = 8
    device_gb: float = 141.0
    utilization: float = 0.9
    reserve_gb: float = 10.0
    engines: bool = True
    tiny_sequences: int = 16
    tiny_context: int = 128
    out: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one shard, baseline (bfloat16) and quantised, at a load of `num_tokens` in the KV cache."""

    what: str
    num_shards: int
    weights_bf16: int
    weights_int4: int
    kv_token_bf16: float
    kv_token_int8: float
    num_tokens: int

    @property
    def weights_ratio(self) -> float:
        return self.weights_int4 / self.weights_bf16

    @property
    def peak_ratio(self) -> float:
        quantised = self.weights_int4 + self.num_tokens * self.kv_token_int8
        return quantised / (self.weights_bf16 + self.num_tokens * self.kv_token_bf16)

    def tokens_at(self, ratio: float) -> int | None:
        """KV tokens at which `peak_ratio` reaches `ratio`; None if it never does."""
        slope = self.kv_token_int8 - ratio * self.kv_token_bf16
        room = ratio * self.weights_bf16 - self.weights_int4
        return math.floor(room / slope) if slope > 0 else None


def meta_specs(directory: Path) -> list[TensorSpec]:
    """Every checkpoint tensor of a model configuration, without allocating any."""
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return [spec_of(*piece) for name, p in module.named_parameters() for piece in split_parameter(name, p.data)]


def attention_shape(directory: Path) -> AttentionShape:
    config = AutoConfig.from_pretrained(directory)
    return AttentionShape(
        num_layers=config.num_hidden_layers, num_kv_heads=config.num_key_value_heads, head_dim=config.head_dim
    )


def laid_out(options: Options, int4: Int4Config) -> list[Memory]:
    """The large model, one shard of every group size."""
    directory = REPOSITORY / options.model
    if not (directory / "config.json").is_file():
        raise InvalidRequest("model", options.model, "a directory with a config.json")
    specs, shape = meta_specs(directory), attention_shape(directory)
    plain: list[TensorPlan] = list(plan_tensors(specs, None).values())
    quantised = list(plan_tensors(specs, int4).values())
    room = (options.device_gb * options.utilization - options.reserve_gb) * 1e9
    kv_token = shape.kv_bytes_per_token("bfloat16")
    memories = []
    for num_shards in options.shards:
        weights = shard_weight_bytes(plain, num_shards)
        if weights >= room:
            raise InvalidRequest("shards", num_shards, f"more: {weights / 1e9:.0f} GB of bf16 do not fit one device")
        memories.append(
            Memory(
                what=directory.name,
                num_shards=num_shards,
                weights_bf16=weights,
                weights_int4=shard_weight_bytes(quantised, num_shards),
                kv_token_bf16=kv_token,
                kv_token_int8=shape.kv_bytes_per_token(KV_INT8),
                num_tokens=int((room - weights) // kv_token),
            )
        )
    return memories


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the largest worker of a running service holds; `shadow` lies in host memory."""

    weights: int
    shadow: int
    kv_token: float


def held_by_engines(overrides: Sequence[str]) -> Held:
    """Start the embedded model's engines, ask their workers, and stop them."""
    config = compose(["experiment=tiny_grpo", *overrides])
    config.model.path = model_path(config.model.path)
    with start_service(config.model, config.engine, config.scheduler, config.sync, config.cluster) as service:
        held = [worker for shard in service.shards for worker in ray.get(shard.held_bytes.remote())]
        tokens = [info.kv_tokens for info in service.infos]
    return Held(
        weights=max(h["weights"] for h in held),
        shadow=max(h["shadow"] for h in held),
        kv_token=max(h["kv_cache"] / n for h, n in zip(held, tokens, strict=True)),
    )


def measured(options: Options) -> tuple[Memory, Held]:
    """The embedded model's engines, one after another in one Ray."""
    start_ray(compose(["experiment=tiny_grpo"]))
    try:
        bf16 = held_by_engines(["engine.dtype=bfloat16"])
        # Embedding and head too: they are 5 % of the embedded model, but 0.5 % of the large one.
        int4 = ["engine.dtype=bfloat16", "engine.quantization=int4", "engine.int4.skip=[mlp.gate.]"]
        quantised = held_by_engines([*int4, f"engine.kv_cache_dtype={KV_INT8}"])
    finally:
        ray.shutdown()
    memory = Memory(
        what="tiny, running",
        num_shards=2,
        weights_bf16=bf16.weights,
        weights_int4=quantised.weights,
        kv_token_bf16=bf16.kv_token,
        kv_token_int8=quantised.kv_token,
        num_tokens=options.tiny_sequences * options.tiny_context,
    )
    return memory, quantised


def row(memory: Memory) -> str:
    limit = memory.tokens_at(0.40)
    return (
        f"{memory.what:<16} {memory.num_shards:>6} "
        f"{memory.weights_bf16 / GIB:>10.4f} {memory.weights_int4 / GIB:>10.4f} "
        f"{memory.weights_ratio:>8.3f} {memory.kv_token_bf16:>10.0f} {memory.kv_token_int8:>10.0f} "
        f"{memory.num_tokens:>9,} {memory.peak_ratio:>7.3f} {'any' if limit is None else f'{limit:,}':>12}"
    )


def as_record(memory: Memory) -> dict[str, object]:
    return asdict(memory) | {"weights_ratio": memory.weights_ratio, "peak_ratio": memory.peak_ratio}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, rest = split_arguments(Options, arguments)
        if rest:
            raise InvalidRequest("argument", rest[0], "one of this command's own options, see --help")
        if options.headline not in options.shards:
            raise InvalidRequest("headline", options.headline, f"one of shards = {options.shards}")
        int4 = compose([f"experiment={options.experiment}"]).engine.int4
        memories = laid_out(options, int4)
        running = measured(options) if options.engines else None
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    headers = ("model", "shards", "GiB bf16", "GiB int4", "weights", "KV B/tok", "INT8", "tokens", "peak", "0.40 until")
    print("{:<16} {:>6} {:>10} {:>10} {:>8} {:>10} {:>10} {:>9} {:>7} {:>12}".format(*headers))
    for memory in [*memories, *([running[0]] if running else [])]:
        print(row(memory))
    headline = next(m for m in memories if m.num_shards == options.headline)
    record: dict[str, object] = {
        "weights_ratio": headline.weights_ratio,
        "peak_ratio": headline.peak_ratio,
        "int4": asdict(int4),
        "options": asdict(options),
        "shapes": [as_record(m) for m in memories],
    }
    if running is not None:
        memory, held = running
        record["engines"] = as_record(memory) | {"shadow_bytes_in_host_memory": held.shadow}
        print(f"the shadow of a running worker: {held.shadow / GIB:.4f} GiB of host memory, not in these figures")
    if options.out is not None:
        Path(options.out).write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
