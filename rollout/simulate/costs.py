"""Seconds that an engine step takes, from the roofline of the accelerator and the shape of the model.

Owns the arithmetic of one step of an expert-parallel group. Knows nothing of queues, of KV capacity in use, or of
measurements (`measured.py` has the model that is fitted to those). Every rank holds its share of the experts and a
replica of everything else; rows are gathered to all ranks and their results scattered back, as vLLM's
`allgather_reducescatter` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rollout.errors import InvalidRequest
from rollout.memory import KV_INT8, AttentionShape

INT4_BITS = 4.125  # 4 bits, and a 16-bit scale for every 128 weights
BF16_BYTES = 2


class StepCosts(Protocol):
    """Prices one step: the slowest rank's own part, and the part that all ranks of the group do together.

    The own part of a rank is `local_s(...) + context_token_s · context tokens of its batch`: affine in the context,
    which is what lets the simulator pass over any number of steps at once.
    """

    @property
    def context_token_s(self) -> float:
        """Seconds for each token of KV that a decode step reads."""

    def local_s(self, decode_rows: int, prefill_tokens: int, prefill_reads: float) -> float:
        """Seconds of a rank's own part, without the KV that decoding reads.

        Args:
            decode_rows: Rows of decoding sequences, drafted ones included.
            prefill_tokens: Tokens prefilled in the same step.
            prefill_reads: Sum over those tokens of the context each attends to.
        """

    def shared_s(self, rows: int) -> float:
        """Seconds of the experts and of the exchange, for so many rows of all ranks together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One GPU, by its data sheet: dense bfloat16 FLOP/s, bytes, bytes/s; links one way."""

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops: float
    link_bytes_per_s: float


# Sources: NVIDIA's data sheets of the H100, H200 (SXM) and HGX B200, dense figures; links are half of the stated total.
ACCELERATORS = {
    "h100": Accelerator(
        name="h100", memory_bytes=80e9, memory_bytes_per_s=3.35e12, flops=989e12, link_bytes_per_s=450e9
    ),
    "h200": Accelerator(
        name="h200", memory_bytes=141e9, memory_bytes_per_s=4.8e12, flops=989e12, link_bytes_per_s=450e9
    ),
    "b200": Accelerator(
        name="b200", memory_bytes=180e9, memory_bytes_per_s=7.7e12, flops=2250e12, link_bytes_per_s=900e9
    ),
}
NODE_GPUS = 8  # joined by NVLink; a larger expert-parallel group talks over the network
NETWORK_BYTES_PER_S = 50e9  # a GPU's 400 Gb/s card; DeepEP reaches 43-58 GB/s of it (docs/legacy.md in its repository)


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """What is reached of the data sheet. Assumptions, not measurements: compare policies by them, not clusters.

    Attributes:
        memory: Of the bandwidth, reading weights.
        kv: Of the bandwidth, reading scattered blocks of KV.
        compute: Of the FLOP/s in matrix products, INT4 being unpacked to bfloat16 on the way.
        link: Of the link's bandwidth in collectives.
        collective_s: Start of one collective within a node; four times that between nodes.
        step_s: Scheduling, sampling and launches of a step, whatever its size.
    """

    memory: float = 0.8
    kv: float = 0.7
    compute: float = 0.5
    link: float = 0.8
    collective_s: float = 20e-6
    step_s: float = 4e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeShape:
    """Sizes of a mixture-of-experts model."""

    num_layers: int
    hidden: int
    num_experts: int
    experts_per_token: int
    expert_width: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def expert_params(self) -> int:
        """Of one expert in one layer: gate, up, down."""
        return 3 * self.hidden * self.expert_width

    @property
    def attention_params(self) -> int:
        """Of one layer: query, key, value, output."""
        return self.hidden * self.head_dim * 2 * (self.num_query_heads + self.num_kv_heads)

    @property
    def head_params(self) -> int:
        return self.hidden * self.vocab_size


# The published configuration of Qwen3-235B-A22B.
QWEN3_235B_A22B = MoeShape(
    num_layers=94,
    hidden=4096,
    num_experts=128,
    experts_per_token=8,
    expert_width=1536,
    num_query_heads=64,
    num_kv_heads=4,
    head_dim=128,
    vocab_size=151_936,
)


class RooflineCosts:
    """Steps of a model with INT4 weights and INT8 KV on a group of `num_ranks` accelerators.

    Raises:
        InvalidRequest: The ranks do not divide the experts.
    """

    def __init__(
        self,
        num_ranks: int,
        accelerator: Accelerator = ACCELERATORS["h200"],
        shape: MoeShape = QWEN3_235B_A22B,
        efficiency: Efficiency | None = None,
    ) -> None:
        if num_ranks < 1 or shape.num_experts % num_ranks:
            raise InvalidRequest("shards_per_group", num_ranks, f"a divisor of the {shape.num_experts} experts")
        self._num_ranks, self._gpu, self._shape = num_ranks, accelerator, shape
        self._efficiency = efficiency or Efficiency()
        attention = AttentionShape(
            num_layers=shape.num_layers, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim
        )
        self._kv_bytes = attention.kv_bytes_per_token(KV_INT8)
        self.context_token_s = self._kv_bytes / (accelerator.memory_bytes_per_s * self._efficiency.kv)
        self._flops = accelerator.flops * self._efficiency.compute
        self._bytes_per_s = accelerator.memory_bytes_per_s * self._efficiency.memory

    def local_s(self, decode_rows: int, prefill_tokens: int, prefill_reads: float) -> float:
        shape = self._shape
        params = shape.num_layers * shape.attention_params
        rows = decode_rows + prefill_tokens
        read_s = (params * INT4_BITS / 8 + shape.head_params * BF16_BYTES) / self._bytes_per_s
        compute_s = 2 * (rows * params + decode_rows * shape.head_params) / self._flops
        # Scores and weighted sums: 2 · 2 · head_dim operations for each pair and query head.
        pairs_flops = 4 * shape.num_query_heads * shape.head_dim * shape.num_layers * prefill_reads
        return self._efficiency.step_s + max(read_s, compute_s) + pairs_flops / self._flops

    def shared_s(self, rows: int) -> float:
        shape = self._shape
        # A row picks k of E experts; one that no row picked is not read.
        touched = 1 - (1 - shape.experts_per_token / shape.num_experts) ** rows
        params = shape.num_layers * shape.expert_params
        read_s = touched * shape.num_experts / self._num_ranks * params * INT4_BITS / 8 / self._bytes_per_s
        compute_s = 2 * rows * shape.experts_per_token / self._num_ranks * params / self._flops
        return max(read_s, compute_s) + self._exchange_s(rows)

    def _exchange_s(self, rows: int) -> float:
        if self._num_ranks == 1:
            return 0.0
        is_node = self._num_ranks <= NODE_GPUS
        link = self._gpu.link_bytes_per_s if is_node else NETWORK_BYTES_PER_S
        start_s = self._efficiency.collective_s * (1 if is_node else 4)
        num_bytes = rows * self._shape.hidden * BF16_BYTES * (self._num_ranks - 1) / self._num_ranks
        return 2 * self._shape.num_layers * (start_s + num_bytes / (link * self._efficiency.link))

    def weight_bytes(self) -> float:
        """Of one rank; embedding and head in bfloat16."""
        shape = self._shape
        experts = shape.num_layers * shape.expert_params * shape.num_experts / self._num_ranks
        attention = shape.num_layers * shape.attention_params
        return (experts + attention) * INT4_BITS / 8 + 2 * shape.head_params * BF16_BYTES

    def kv_tokens(self, memory_share: float = 0.90, other_bytes: float = 28e9) -> int:
        """Tokens of KV that fit beside the weights.

        Args:
            memory_share: Of the accelerator's memory that the engine may take.
            other_bytes: For activations, graphs and a flip of weights, as in conf/engine/ep8_int4.yaml.

        Raises:
            InvalidRequest: Nothing is left.
        """
        left = self._gpu.memory_bytes * memory_share - self.weight_bytes() - other_bytes
        if left < self._kv_bytes:
            expected = "shards_per_group large enough to leave room for KV"
            raise InvalidRequest("memory", f"{self._gpu.name}, {self.weight_bytes() / 1e9:.0f} GB of weights", expected)
        return int(left // self._kv_bytes)
