"""What a GPU of a group holds, and how many sequences fit beside it.

Owns the ledger. The bytes of weights and of a token's KV are those of the cost model and of `rollout.memory`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rollout.plan.workload import Workload
from rollout.simulate.accelerators import Accelerator
from rollout.simulate.costs import RooflineCosts

MEMORY_SHARE = 0.90  # of the GPU's memory that the engine may take: engine.gpu_memory_utilization
WORKSPACE_BYTES = 8e9  # activations and graphs, as in conf/engine/ep8_int4.yaml
KV_FILL = 0.95  # of the KV that admission fills on average: chunks reserve theirs to the end


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Bytes of one GPU.

    Attributes:
        limit: What the engine may take.
        weights: Of its experts, attention, embedding and head.
        workspace: Activations and graphs.
        flip: For a flip of in-place weights, at most their size.
        kv_token: Of one token of KV.
    """

    limit: float
    weights: float
    workspace: float
    flip: float
    kv_token: float

    @property
    def kv(self) -> float:
        """What is left for KV; below 0 where the weights do not fit."""
        return self.limit - self.weights - self.workspace - self.flip

    @property
    def kv_tokens(self) -> int:
        return max(0, int(self.kv // self.kv_token))

    def sequences(self, workload: Workload) -> int:
        """Sequences that fit, members of a group sharing their prompt; 0 unless the longest one fits alone."""
        if self.kv_tokens < workload.prompt_tokens + workload.output_tokens:
            return 0
        held = workload.held_output + workload.prefilled_tokens
        return int(self.kv_tokens * KV_FILL // held)


def ledger(costs: RooflineCosts, gpu: Accelerator, is_flipping: bool) -> Ledger:
    """Of one GPU under a cost model's layout.

    Args:
        costs: Of the group.
        gpu: Its accelerator.
        is_flipping: Whether new weights are written into the served ones.
    """
    weights = costs.weight_bytes()
    return Ledger(
        limit=gpu.memory_bytes * MEMORY_SHARE,
        weights=weights,
        workspace=WORKSPACE_BYTES,
        flip=weights if is_flipping else 0.0,
        kv_token=costs.kv_bytes_per_token,
    )


def peak_ratio(own: Ledger, plain: Ledger, num_tokens: float) -> float:
    """Weights and KV of a GPU, of those of `plain`, at an equal load of KV tokens."""
    return (own.weights + num_tokens * own.kv_token) / (plain.weights + num_tokens * plain.kv_token)
