"""One GPU's share of a mixture-of-experts model under expert parallelism, and one decode step of it.

Owns the shard's tensors, all of them memory of its own, and the order in which a step calls the kernels. Knows
nothing of timing, nor of an exchange between GPUs: rows of the other ranks stand ready in a buffer, with their
routing, and the step's own rows are copied in front of them; of the experts' result it adds its own rows' part
from the local experts. Embedding, head, router and norms keep the activations' dtype, all else is INT4.

Shape legend: B sequences of this rank, R = ep * B rows of all ranks, L layers, H hidden size, k experts a token.
"""

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch.nn.functional import linear, rms_norm

from kernels.bench_kv import BLOCK_SIZE, random_cache
from kernels.gumbel_sample import gumbel_sample
from kernels.int4 import int4_linear, int4_moe, kernel_form
from kernels.kv_attention import KVCache, decode_attention, norm_rope_write, page_bytes

Form = tuple[torch.Tensor, torch.Tensor]

_CODE_DEVIATION = math.sqrt((15**2 - 1) / 12)
"""Of codes spread evenly over -7 .. 7."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardConfig:
    """Sizes of a model and the number of ranks that share its experts; attention is whole on every rank.

    Raises:
        ValueError: The ranks do not divide the experts.
    """

    num_layers: int
    hidden: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    expert_width: int
    vocab_size: int
    ep: int
    group_size: int
    rope_theta: float = 1e6
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.ep < 1 or self.num_experts % self.ep:
            raise ValueError(f"ep: got {self.ep}, expected a divisor of the {self.num_experts} experts")

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.ep

    @property
    def query_width(self) -> int:
        return self.num_query_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    def kv_bytes(self, batch: int, context: int) -> int:
        """Return the bytes of the caches of all layers for batch sequences of context tokens."""
        num_blocks = batch * -(-context // BLOCK_SIZE)
        return self.num_layers * num_blocks * page_bytes(BLOCK_SIZE, self.num_kv_heads, self.head_dim)


QWEN3_235B_A22B = ShardConfig(
    num_layers=94,
    hidden=4096,
    num_query_heads=64,
    num_kv_heads=4,
    head_dim=128,
    num_experts=128,
    experts_per_token=8,
    expert_width=1536,
    vocab_size=151_936,
    ep=32,
    group_size=128,
)


class Part(Enum):
    """What a step may leave out, so that its time can be told from the rest."""

    ATTENTION = "attention"
    EXPERTS = "experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLayer:
    """One layer; INT4 weights are canonical (packed, scale) pairs, the experts' with a leading dimension."""

    input_norm: torch.Tensor
    qkv: Form
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    output: Form
    post_norm: torch.Tensor
    gate: torch.Tensor
    w13: Form
    w2: Form


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The tensors of rank 0. expert_map is [experts of the model] int32, -1 for those elsewhere."""

    config: ShardConfig
    embedding: torch.Tensor
    layers: tuple[ShardLayer, ...]
    final_norm: torch.Tensor
    head: torch.Tensor
    expert_map: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """What a step reads besides the shard; it writes each layer's caches, gathered, ids and weights in place.

    Attributes:
        tokens, positions, seeds: [B] int64; a position is context - 1.
        temperature: [B] float32.
        seq_lens: [B] int32, the context.
        slot_mapping: [B] int64, slot of the last token.
        block_table: [B, max_blocks] int32, of every layer.
        caches: One a layer.
        cos_sin: [context, D] float32.
        gathered: [R, H], rows B and on those of the other ranks.
        ids: [L, R, k] int32, as gathered.
        weights: [L, R, k] float32, as gathered.
    """

    context: int
    tokens: torch.Tensor
    positions: torch.Tensor
    seeds: torch.Tensor
    temperature: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    caches: tuple[KVCache, ...]
    cos_sin: torch.Tensor
    gathered: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """logits [B, V], tokens [B] int64, and the last layer's local experts' result for all rows, [R, H]."""

    logits: torch.Tensor
    tokens: torch.Tensor
    partial: torch.Tensor


def random_shard(
    config: ShardConfig, *, device: str, dtype: torch.dtype = torch.bfloat16, generator: torch.Generator | None = None
) -> Shard:
    """Allocate a shard of random weights that keep activations near 1; on "meta", its shapes alone."""

    def plain(*shape: int, deviation: float, mean: float = 0.0) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(mean, deviation, generator=generator)

    def packed(*shape: int) -> Form:
        *leading, num_in = shape
        codes = torch.empty(*leading, num_in // 2, dtype=torch.uint8, device=device)
        codes.random_(1, 16, generator=generator)
        codes.add_(torch.empty_like(codes).random_(1, 16, generator=generator), alpha=16)
        scale = torch.empty(*leading, num_in // config.group_size, dtype=torch.bfloat16, device=device)
        mean = num_in**-0.5 / _CODE_DEVIATION
        return codes, scale.uniform_(0.8 * mean, 1.2 * mean, generator=generator)

    hidden, num_local, width = config.hidden, config.num_local_experts, config.expert_width
    layers = tuple(
        ShardLayer(
            input_norm=plain(hidden, deviation=0.1, mean=1.0),
            qkv=packed(config.query_width + 2 * config.kv_width, hidden),
            q_norm=plain(config.head_dim, deviation=0.1, mean=1.0),
            k_norm=plain(config.head_dim, deviation=0.1, mean=1.0),
            output=packed(hidden, config.query_width),
            post_norm=plain(hidden, deviation=0.1, mean=1.0),
            gate=plain(config.num_experts, hidden, deviation=hidden**-0.5),
            w13=packed(num_local, 2 * width, hidden),
            w2=packed(num_local, hidden, width),
        )
        for _ in range(config.num_layers)
    )
    expert_map = torch.full((config.num_experts,), -1, dtype=torch.int32, device=device)
    expert_map[:num_local] = torch.arange(num_local, dtype=torch.int32, device=device)
    return Shard(
        config=config,
        embedding=plain(config.vocab_size, hidden, deviation=1.0),
        layers=layers,
        final_norm=plain(hidden, deviation=0.1, mean=1.0),
        head=plain(config.vocab_size, hidden, deviation=hidden**-0.5),
        expert_map=expert_map,
    )


def random_batch(shard: Shard, batch: int, context: int, generator: torch.Generator) -> DecodeBatch:
    """Return batch sequences with full random caches, and rows of the other ranks that choose experts evenly."""
    config, device = shard.config, shard.device
    made = [
        random_cache(batch, context, config.num_kv_heads, config.head_dim, str(device), generator)
        for _ in range(config.num_layers)
    ]
    block_table = made[0][1]
    last = context - 1
    num_rows = config.ep * batch
    scores = torch.rand(config.num_layers, num_rows, config.num_experts, device=device, generator=generator)
    weights, ids = scores.topk(config.experts_per_token, dim=-1)
    inverse = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, device=device) / config.head_dim)
    angles = torch.outer(torch.arange(context, device=device), inverse)
    return DecodeBatch(
        context=context,
        tokens=torch.randint(0, config.vocab_size, (batch,), device=device, generator=generator),
        positions=torch.full((batch,), last, device=device),
        seeds=torch.randint(0, 2**62, (batch,), device=device, generator=generator),
        temperature=torch.ones(batch, device=device),
        seq_lens=torch.full((batch,), context, dtype=torch.int32, device=device),
        slot_mapping=block_table[:, last // BLOCK_SIZE].long() * BLOCK_SIZE + last % BLOCK_SIZE,
        block_table=block_table,
        caches=tuple(cache for cache, _ in made),
        cos_sin=torch.cat([angles.cos(), angles.sin()], dim=1),
        gathered=torch.randn(num_rows, config.hidden, device=device, generator=generator).to(shard.dtype),
        ids=ids.int(),
        weights=weights / weights.sum(-1, keepdim=True),
    )


class DecodeStep:
    """A decode step of one shard; owns the forms its kernels read, which on CUDA are the shard's tensors."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._forms = [
            tuple(kernel_form(*weight, shard.dtype) for weight in (layer.qkv, layer.output, layer.w13, layer.w2))
            for layer in shard.layers
        ]

    @torch.no_grad()
    def __call__(self, batch: DecodeBatch, skip: Part | None = None) -> StepResult:
        """Run every layer and sample; a CUDA graph can capture it. skip leaves out attention or router and experts."""
        shard, config = self._shard, self._shard.config
        x = shard.embedding[batch.tokens]
        partial = batch.gathered
        for index in range(config.num_layers):
            x = x + self._attend(index, x, batch, skip)
            if skip is not Part.EXPERTS:
                partial = self._run_experts(index, x, batch)
                x = x + partial[: len(x)]
        logits = linear(rms_norm(x, (config.hidden,), shard.final_norm, config.eps), shard.head)
        tokens, _ = gumbel_sample(logits, seeds=batch.seeds, positions=batch.positions, temperature=batch.temperature)
        return StepResult(logits=logits, tokens=tokens, partial=partial)

    def _attend(self, index: int, x: torch.Tensor, batch: DecodeBatch, skip: Part | None) -> torch.Tensor:
        config, layer = self._shard.config, self._shard.layers[index]
        qkv_form, output_form, _, _ = self._forms[index]
        normed = rms_norm(x, (config.hidden,), layer.input_norm, config.eps)
        qkv = int4_linear(normed, qkv_form, config.group_size)
        heads = qkv.view(len(x), -1, config.head_dim)
        query, key, value = heads.split([config.num_query_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        attended = norm_rope_write(
            query,
            key,
            value,
            batch.caches[index],
            q_weight=layer.q_norm,
            k_weight=layer.k_norm,
            eps=config.eps,
            positions=batch.positions,
            cos_sin_cache=batch.cos_sin,
            slot_mapping=batch.slot_mapping,
        )
        if skip is not Part.ATTENTION:
            attended, _ = decode_attention(
                attended,
                batch.caches[index],
                block_table=batch.block_table,
                seq_lens=batch.seq_lens,
                scale=config.head_dim**-0.5,
                max_seq_len=batch.context,
            )
        return int4_linear(attended.view(len(x), config.query_width), output_form, config.group_size)

    def _run_experts(self, index: int, x: torch.Tensor, batch: DecodeBatch) -> torch.Tensor:
        """Return the local experts' result for all rows; the copies stand for what an exchange would write."""
        config, layer = self._shard.config, self._shard.layers[index]
        _, _, w13_form, w2_form = self._forms[index]
        normed = rms_norm(x, (config.hidden,), layer.post_norm, config.eps)
        chances = linear(normed, layer.gate).float().softmax(-1)
        weights, ids = chances.topk(config.experts_per_token, dim=-1)
        all_weights, all_ids = batch.weights[index], batch.ids[index]
        batch.gathered[: len(x)].copy_(normed)
        all_ids[: len(x)].copy_(ids)
        torch.div(weights, weights.sum(-1, keepdim=True), out=all_weights[: len(x)])
        return int4_moe(
            batch.gathered, w13_form, w2_form, all_weights, all_ids, self._shard.expert_map, config.group_size
        )
