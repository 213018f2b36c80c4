"""Seconds that an engine step takes, from the roofline of the accelerator and the shape of the model.

Owns the arithmetic of one step of an expert-parallel group. Knows nothing of queues, of KV capacity in use, or of
measurements (`measured.py` has the model that is fitted to those). Every rank holds its share of the experts and a
replica, or its tensor-parallel slice, of everything else. `rollout.plan` prices its candidates with the same class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rollout.errors import InvalidRequest
from rollout.memory import KV_INT8, AttentionShape
from rollout.simulate.accelerators import ACCELERATORS, NETWORK_BYTES_PER_S, Accelerator

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
class Efficiency:
    """What is reached of the data sheet. Assumptions, not measurements: compare policies by them, not clusters.

    Attributes:
        memory: Of the bandwidth, reading weights.
        kv: Of the bandwidth, reading scattered blocks of KV.
        compute: Of the FLOP/s in matrix products, INT4 being unpacked to bfloat16 on the way.
        link: Of the link's bandwidth in collectives.
        collective_s: Start of one collective within a node; four times that between nodes.
        imbalance: Rows of the busiest rank's experts, of the mean.
        step_s: Scheduling, sampling and launches of a step, whatever its size.
        row_s: Host's work for each row that samples a token, where it is not hidden behind the device.
    """

    memory: float = 0.8
    kv: float = 0.7
    compute: float = 0.5
    link: float = 0.8
    collective_s: float = 20e-6
    step_s: float = 4e-3
    row_s: float = 0.0
    imbalance: float = 1.0


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a model is held, and spread over a group. The defaults are those of conf/engine/ep8_int4.yaml.

    Attributes:
        weight_bits: Of a weight, its share of a scale included; embedding, head and routers are bfloat16 always.
        arithmetic: Of matrix products: "bf16", "fp8" or "fp4".
        kv_dtype: As in AttentionShape.kv_bytes_per_token.
        tensor_ranks: GPUs that share the attention of one data-parallel rank. More of them than there are KV heads
            keep heads twice.
        exchange: How rows reach their experts: "gather" brings all rows to all ranks (vLLM's
            allgather_reducescatter), "dispatch" each row to the ranks of its experts (DeepEP).
        dispatch_bytes: Of an element on its way to the experts, under "dispatch"; results return in bfloat16.
    """

    weight_bits: float = INT4_BITS
    arithmetic: str = "bf16"
    kv_dtype: str = KV_INT8
    tensor_ranks: int = 1
    exchange: str = "gather"
    dispatch_bytes: float = 1.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("arithmetic", self.arithmetic, ("bf16", "fp8", "fp4")),
            ("exchange", self.exchange, ("gather", "dispatch")),
        ):
            if value not in known:
                raise InvalidRequest(name, value, f"one of {', '.join(known)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTerms:
    """Where the seconds of one step go, on the slowest GPU.

    Attributes:
        fixed_s: Scheduling, sampling, launches: what the host does and the device waits for.
        attention_s: Projections and head: weights or arithmetic, whichever takes longer.
        scores_s: Attention of prefilled tokens.
        kv_s: Reading the KV of decoding sequences.
        experts_s: Weights or arithmetic of the experts.
        exchange_s: Rows to the experts and back.
        reduce_s: All-reduces of tensor parallelism.
    """

    fixed_s: float
    attention_s: float
    scores_s: float
    kv_s: float
    experts_s: float
    exchange_s: float
    reduce_s: float

    @property
    def total_s(self) -> float:
        whole = self.fixed_s + self.attention_s + self.scores_s + self.kv_s
        return whole + self.experts_s + self.exchange_s + self.reduce_s


class RooflineCosts:
    """Steps of a model on a group of `num_ranks` accelerators.

    A rank of `local_s` is a data-parallel one: layout.tensor_ranks accelerators.

    Raises:
        InvalidRequest: The accelerators do not divide the experts, or the tensor ranks not the accelerators.
    """

    def __init__(
        self,
        num_ranks: int,
        accelerator: Accelerator = ACCELERATORS["h200"],
        shape: MoeShape = QWEN3_235B_A22B,
        efficiency: Efficiency | None = None,
        layout: Layout | None = None,
    ) -> None:
        if num_ranks < 1 or shape.num_experts % num_ranks:
            raise InvalidRequest("shards_per_group", num_ranks, f"a divisor of the {shape.num_experts} experts")
        self._num_ranks, self._gpu, self._shape = num_ranks, accelerator, shape
        self._efficiency, self._layout = efficiency or Efficiency(), layout or Layout()
        if num_ranks % self._layout.tensor_ranks:
            raise InvalidRequest("tensor_ranks", self._layout.tensor_ranks, f"a divisor of the {num_ranks} ranks")
        tensor_ranks = self._layout.tensor_ranks
        kv_heads = -(-shape.num_kv_heads // tensor_ranks)
        attention = AttentionShape(num_layers=shape.num_layers, num_kv_heads=kv_heads, head_dim=shape.head_dim)
        self._kv_bytes = attention.kv_bytes_per_token(self._layout.kv_dtype)
        self.context_token_s = self._kv_token_s(1)
        self._flops = accelerator.rate(self._layout.arithmetic) * self._efficiency.compute
        self._bytes_per_s = accelerator.memory_bytes_per_s * self._efficiency.memory
        # Query heads are dealt out, and so are KV heads as far as there are enough.
        heads = shape.num_query_heads / tensor_ranks + kv_heads
        self._attention_params = shape.num_layers * shape.hidden * shape.head_dim * 2 * heads

    @property
    def kv_bytes_per_token(self) -> int:
        """On one accelerator."""
        return self._kv_bytes

    def local_s(self, decode_rows: int, prefill_tokens: int, prefill_reads: float) -> float:
        rows = decode_rows + prefill_tokens
        attention_s = self._attention_s(rows, decode_rows)
        return self._fixed_s(decode_rows) + attention_s + self._scores_s(prefill_reads) + self._reduce_s(rows)

    def shared_s(self, rows: int) -> float:
        return self._experts_s(rows) + self._exchange_s(rows)

    def terms(
        self,
        decode_rows: float,
        context_tokens: float,
        prefill_tokens: float,
        prefill_reads: float,
        all_rows: float,
        rows_per_sequence: float = 1,
    ) -> StepTerms:
        """The parts of a step of a rank; the same sum as local_s, context_token_s and shared_s give.

        Args:
            decode_rows, prefill_tokens, prefill_reads: As in local_s.
            context_tokens: KV that decoding reads, of the rank.
            all_rows: Of all ranks together.
            rows_per_sequence: Of decode_rows, drafts included; they read their sequence's KV once.
        """
        rows = decode_rows + prefill_tokens
        return StepTerms(
            fixed_s=self._fixed_s(decode_rows),
            attention_s=self._attention_s(rows, decode_rows),
            scores_s=self._scores_s(prefill_reads),
            kv_s=self._kv_token_s(rows_per_sequence) * context_tokens,
            experts_s=self._experts_s(all_rows),
            exchange_s=self._exchange_s(all_rows),
            reduce_s=self._reduce_s(rows),
        )

    def _fixed_s(self, decode_rows: float) -> float:
        return self._efficiency.step_s + self._efficiency.row_s * decode_rows

    def _kv_token_s(self, rows: float) -> float:
        """For each token of KV that a step reads: bandwidth, or the arithmetic of the rows that look at it."""
        read_s = self._kv_bytes / (self._gpu.memory_bytes_per_s * self._efficiency.kv)
        return max(read_s, self._scores_s(rows))

    def _attention_s(self, rows: float, decode_rows: float) -> float:
        params, head = self._attention_params, self._shape.head_params / self._layout.tensor_ranks
        read_s = (params * self._layout.weight_bits / 8 + head * BF16_BYTES) / self._bytes_per_s
        compute_s = 2 * (rows * params + decode_rows * head) / self._flops
        return max(read_s, compute_s)

    def _scores_s(self, pairs: float) -> float:
        """Scores and weighted sums: 2 · 2 · head_dim operations for each pair and query head, in bfloat16."""
        shape, flops = self._shape, self._gpu.flops * self._efficiency.compute * self._layout.tensor_ranks
        return 4 * shape.num_query_heads * shape.head_dim * shape.num_layers * pairs / flops

    def _experts_s(self, rows: float) -> float:
        shape = self._shape
        # A row picks k of E experts; one that no row picked is not read.
        touched = 1 - (1 - shape.experts_per_token / shape.num_experts) ** rows
        params = shape.num_layers * shape.expert_params
        read_s = touched * shape.num_experts / self._num_ranks * params * self._layout.weight_bits / 8
        compute_s = 2 * rows * shape.experts_per_token / self._num_ranks * params / self._flops
        return max(read_s / self._bytes_per_s, compute_s * self._efficiency.imbalance)

    def _reduce_s(self, rows: float) -> float:
        """After attention; where there is one data-parallel rank only, after the experts as well."""
        tensor_ranks = self._layout.tensor_ranks
        if tensor_ranks == 1:
            return 0.0
        num_bytes = 2 * rows * self._shape.hidden * BF16_BYTES * (tensor_ranks - 1) / tensor_ranks
        link = self._gpu.link_bytes_per_s * self._efficiency.link
        count = self._shape.num_layers * (2 if tensor_ranks == self._num_ranks else 1)
        return count * (self._efficiency.collective_s + num_bytes / link)

    def _exchange_s(self, rows: float) -> float:
        if self._num_ranks == self._layout.tensor_ranks:
            return 0.0
        is_node = self._num_ranks <= self._gpu.node_gpus
        start_s = self._efficiency.collective_s * (1 if is_node else 4)
        seconds = self._gather_s(rows) if self._layout.exchange == "gather" else self._dispatch_s(rows)
        return self._shape.num_layers * (2 * start_s + seconds / self._efficiency.link)

    def _gather_s(self, rows: float) -> float:
        """Of a layer, both ways: every rank receives the rows of all others; between nodes all cards carry a share."""
        node_gpus = min(self._num_ranks, self._gpu.node_gpus)
        num_nodes = self._num_ranks / node_gpus
        num_bytes = 2 * rows * self._shape.hidden * BF16_BYTES
        inside = num_bytes * (self._num_ranks - 1) / self._num_ranks / self._gpu.link_bytes_per_s
        between = num_bytes * (num_nodes - 1) / num_nodes / (node_gpus * NETWORK_BYTES_PER_S)
        return max(inside, between)

    def _dispatch_s(self, rows: float) -> float:
        """Of a layer, both ways: a GPU's own rows, each to the distinct ranks of its experts."""
        reached = 1 - (1 - 1 / self._num_ranks) ** self._shape.experts_per_token
        num_bytes = rows / self._num_ranks * reached * self._shape.hidden * (self._layout.dispatch_bytes + BF16_BYTES)
        near = min(self._num_ranks, self._gpu.node_gpus) - 1
        inside = num_bytes * near / self._gpu.link_bytes_per_s
        between = num_bytes * (self._num_ranks - 1 - near) / NETWORK_BYTES_PER_S
        return max(inside, between)

    def weight_bytes(self) -> float:
        """Of one accelerator; embedding, head and routers in bfloat16."""
        shape = self._shape
        experts = shape.num_layers * shape.expert_params * shape.num_experts / self._num_ranks
        plain = 2 * shape.head_params / self._layout.tensor_ranks + shape.num_layers * shape.hidden * shape.num_experts
        return (experts + self._attention_params) * self._layout.weight_bits / 8 + plain * BF16_BYTES

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
