"""Unquantised experts on CPU that honour the expert map.

vLLM 0.32's CPU kernel ignores `expert_map`: with expert parallelism it indexes past the local
experts and the worker dies. This out-of-tree layer replaces it. Delete it once the built-in CPU
method maps `topk_ids` itself.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, silu
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)


@CustomOp.register_oot(name="UnquantizedFusedMoEMethod")
class CpuExpertParallelMoE(UnquantizedFusedMoEMethod):
    """Runs the local experts one after another and returns this rank's partial sum."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing to prepack: the layer keeps `w13_weight` [E, 2I, H] and `w2_weight` [E, H, I]."""

    @property
    def is_monolithic(self) -> bool:
        return False

    def apply(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: object,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Partial mixture output of the experts held here.

        Args:
            layer: Holds the weights and `expert_map` (global id → local index, -1 = elsewhere).
            x: [T, H] tokens of all data-parallel ranks.
            topk_weights: [T, K] router weights.
            topk_ids: [T, K] global expert ids.
            shared_experts: Run by vLLM's layer, not here.
            shared_experts_input: Likewise.

        Returns:
            [T, H]; zero where none of a token's experts is local.
        """
        local_ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        out = torch.zeros_like(x)
        for expert in range(layer.w13_weight.shape[0]):
            rows, slots = (local_ids == expert).nonzero(as_tuple=True)
            if rows.numel() == 0:
                continue
            gate, up = linear(x[rows], layer.w13_weight[expert]).chunk(2, dim=-1)
            hidden = linear(silu(gate) * up, layer.w2_weight[expert])
            out.index_add_(0, rows, hidden * topk_weights[rows, slots, None].to(x.dtype))
        return out
