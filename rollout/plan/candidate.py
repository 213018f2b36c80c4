"""What can be configured: precision, parallelism, batch, chunk and drafts of one expert-parallel group.

Owns the choices and which of them exist. Knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from rollout.memory import KV_INT8
from rollout.plan.drafts import NO_DRAFT, Draft
from rollout.simulate.costs import BF16_BYTES, Layout, MoeShape

SCALE_BITS = 16  # of a group of INT4 weights
TENSOR_RANKS = (1, 2, 4, 8)
CHUNKS = (512, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024)
MAX_DRAFT = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How weights and KV are held.

    Attributes:
        name: For tables.
        weight_bits: Of a quantised weight with its share of the scale.
        kv_dtype: As in rollout.memory.
        arithmetic: Of matrix products.
        exchanges: Ways to the experts that engines have for it.
    """

    name: str
    weight_bits: float
    kv_dtype: str
    arithmetic: str = "bf16"
    exchanges: tuple[str, ...] = ("gather", "dispatch")

    @property
    def is_quantised(self) -> bool:
        return self.weight_bits < 8 * BF16_BYTES


KV_NAMES = {  # of engine.kv_cache_dtype, and what it is
    KV_INT8: KV_INT8,
    "fp8": "float8_e4m3fn",
    "auto": "bfloat16",
}


def int4(group_size: int = 128, kv_dtype: str = KV_INT8) -> Precision:
    """Symmetric INT4 weights; engines run their experts under vLLM's gathering all-to-all only."""
    short = {KV_INT8: "int8", "float8_e4m3fn": "fp8", "bfloat16": "bf16"}[kv_dtype]
    return Precision(
        name=f"int4 + {short} kv",
        weight_bits=4 + SCALE_BITS / group_size,
        kv_dtype=kv_dtype,
        exchanges=("gather",),
    )


BF16 = Precision(name="bf16", weight_bits=16, kv_dtype="bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One group of engines.

    Attributes:
        ranks: GPUs of the group; each holds its share of the experts.
        tensor_ranks: GPUs that share the attention of one data-parallel rank.
        batch: Sequences decoded together on one data-parallel rank.
        chunk: Tokens in one step of one data-parallel rank.
        precision: Of weights and KV.
        exchange: How rows reach their experts.
        draft: Tokens speculated.
    """

    ranks: int
    tensor_ranks: int
    batch: int
    chunk: int
    precision: Precision
    exchange: str = "gather"
    draft: Draft = field(default=NO_DRAFT)

    @property
    def data_ranks(self) -> int:
        return self.ranks // self.tensor_ranks

    def layout(self) -> Layout:
        """For the cost model."""
        return Layout(
            weight_bits=self.precision.weight_bits,
            arithmetic=self.precision.arithmetic,
            kv_dtype=self.precision.kv_dtype,
            tensor_ranks=self.tensor_ranks,
            exchange=self.exchange,
        )


def groups(
    num_gpus: int, shape: MoeShape, precision: Precision, tensor_ranks: tuple[int, ...] = (1,)
) -> Iterator[Candidate]:
    """Every way to cut a fleet into equal groups, without batch, chunk and drafts."""
    for ranks in range(1, min(num_gpus, shape.num_experts) + 1):
        if num_gpus % ranks or shape.num_experts % ranks:
            continue
        for tensor in tensor_ranks:
            if ranks % tensor or shape.num_query_heads % tensor:
                continue
            blank = Candidate(ranks=ranks, tensor_ranks=tensor, batch=1, chunk=CHUNKS[0], precision=precision)
            # Where there is one data-parallel rank, rows are everywhere already.
            exchanges = precision.exchanges if ranks > tensor else ("gather",)
            yield from (replace(blank, exchange=exchange) for exchange in exchanges)
