"""What one shard of an expert-parallel group holds: weights by encoding, KV cache by element type.

Pure arithmetic on tensor plans and shapes; measures nothing. A shard holds its share of the routed
experts and a replica of everything else (tensor parallelism is not considered).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rollout.errors import InvalidRequest
from rollout.sync.encoding import TensorPlan
from rollout.sync.manifest import torch_dtype

EXPERT_PART = ".experts."  # in the checkpoint name of every routed expert's tensor
KV_SCALE_BYTES = 4  # one float32 for each token and head, for K and for V
KV_INT8 = "int8_per_token_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What decides the size of a token's KV: layers, KV heads in each, elements in each head."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def kv_bytes_per_token(self, kv_dtype: str) -> int:
        """Bytes of K and V of one token over all layers.

        Args:
            kv_dtype: "int8_per_token_head", or the name of a torch dtype.
        """
        if kv_dtype == KV_INT8:
            head_bytes = self.head_dim + KV_SCALE_BYTES
        else:
            head_bytes = self.head_dim * torch_dtype(kv_dtype).itemsize
        return 2 * self.num_layers * self.num_kv_heads * head_bytes


def shard_weight_bytes(plans: Iterable[TensorPlan], num_shards: int) -> int:
    """Bytes of weights on one shard of `num_shards`.

    Raises:
        InvalidRequest: The experts cannot be dealt out evenly.
    """
    replicated = experts = num_tensors = 0
    for plan in plans:
        if EXPERT_PART in plan.name:
            experts += plan.num_bytes
            num_tensors += 1
        else:
            replicated += plan.num_bytes
    if num_tensors % num_shards:
        raise InvalidRequest("num_shards", num_shards, f"a divisor of the {num_tensors} tensors of routed experts")
    return replicated + experts // num_shards
