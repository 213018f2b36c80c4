"""Experts of a layer on weights that can be overwritten in place: INT4, or in the activation dtype.

Both methods run the experts held here for the tokens of all data-parallel ranks and return this rank's
part of the sum. vLLM's own method on CPU ignores the expert map: with expert parallelism it reads past
the local experts and the worker dies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm._custom_ops import cpu_fused_moe
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from actors.vllm_plugin.slots import Int4Store, PackedStore, Slot, instructions, is_int4, plain_slots, stored_slot
from kernels.int4 import int4_moe
from rollout.config import Int4Config
from rollout.errors import InvalidRequest

CPU_TILE = 32  # of vLLM's grouped kernel


def experts_method(layer: RoutedExperts, prefix: str, int4: Int4Config | None) -> FusedMoEMethodBase:
    """The method of a layer of routed experts.

    Raises:
        InvalidRequest: The layer is of a kind that is not known here, or its tensors cannot be served so.
    """
    moe = layer.moe_config
    _check_kind(layer, prefix)
    gate, up, down = layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name
    layer.longroll_names = [
        tuple(f"{prefix}.{expert}.{part}.weight" for part in (gate, up, down)) for expert in range(moe.num_experts)
    ]
    outer = [name for names in layer.longroll_names for name in names[:2]]
    inner = [names[2] for names in layer.longroll_names]
    wants = {
        is_int4(outer, moe.hidden_dim, moe.in_dtype, int4),
        is_int4(inner, moe.intermediate_size_per_partition, moe.in_dtype, int4),
    }
    if len(wants) > 1:
        raise InvalidRequest("engine.int4.skip", f"{down} or {gate} alone of {prefix}", "all or none of an expert")
    if int4 is not None and wants == {True}:
        return Int4MoEMethod(moe, int4)
    return PlainMoEMethod(moe) if current_platform.is_cpu() else PlainTritonMoEMethod(moe)


def _check_kind(layer: RoutedExperts, prefix: str) -> None:
    moe = layer.moe_config
    if (
        moe.activation is not MoEActivation.SILU
        or moe.has_bias
        or layer.apply_router_weight_on_input
        or layer.swiglu_limit is not None
    ):
        raise InvalidRequest(
            f"experts of {prefix}", f"{moe.activation}", "SwiGLU with silu, without biases, limits or input weights"
        )
    if moe.num_experts != moe.num_logical_experts:
        raise InvalidRequest("expert load balancing", f"{moe.num_experts} physical experts", "no redundant experts")


def _experts_held(layer: RoutedExperts) -> Iterator[tuple[int, tuple[str, str, str]]]:
    """(place on this rank, names of its gate, up and down projections) of every expert held here."""
    if layer.expert_map is None:
        yield from enumerate(layer.longroll_names)
        return
    for expert, place in enumerate(layer.expert_map.tolist()):
        if place >= 0:
            yield place, layer.longroll_names[expert]


def _create_weights(
    layer: RoutedExperts,
    num_experts: int,
    hidden_size: int,
    width: int,
    dtype: torch.dtype,
    device: str | None,
    attributes: dict[str, Any],
) -> None:
    moe = layer.moe_config
    if (hidden_size, width) != (moe.hidden_dim_unpadded, moe.intermediate_size_per_partition_unpadded):
        raise InvalidRequest(
            f"experts of {layer.layer_name}",
            f"[{hidden_size}, {width}] after padding",
            f"[{moe.hidden_dim_unpadded}, {moe.intermediate_size_per_partition_unpadded}], sizes without padding",
        )
    for name, shape in (
        ("w13_weight", (num_experts, 2 * width, hidden_size)),  # gate rows above up rows
        ("w2_weight", (num_experts, hidden_size, width)),
    ):
        weight = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
        layer.register_parameter(name, weight)
        set_weight_attrs(weight, attributes)


def _stored_slots(layer: RoutedExperts) -> Iterator[Slot]:
    for place, (gate, up, down) in _experts_held(layer):
        yield stored_slot((gate, up), layer.longroll_w13, place)
        yield stored_slot((down,), layer.longroll_w2, place)


class PlainMoEMethod(FusedMoEMethodBase):
    """Experts in the activation dtype, on CPU, through vLLM's grouped kernel.

    The kernel reads each weight in an order of its own (`PackedStore`). It knows no expert map, so rows of
    experts that are elsewhere are left out before it; what it computes for a row does not depend on the
    other rows.
    """

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        width = intermediate_size_per_partition
        if hidden_size % CPU_TILE or width % CPU_TILE:
            raise InvalidRequest(
                f"experts of {layer.layer_name}", f"[{hidden_size}, {width}]", f"multiples of {CPU_TILE} on the CPU"
            )
        _create_weights(layer, num_experts, hidden_size, width, params_dtype, None, extra_weight_attrs)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        layer.longroll_w13 = PackedStore(layer, "w13_weight")
        layer.longroll_w2 = PackedStore(layer, "w2_weight")

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: object,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """This rank's part of the mixture.

        Args:
            layer: Holds the weights and `expert_map` (global id → local place, -1 = elsewhere).
            x: [T, H] tokens of all data-parallel ranks.
            topk_weights: [T, k] float32 router weights.
            topk_ids: [T, k] int32 global expert ids.
            shared_experts: Run by vLLM's layer, not here.
            shared_experts_input: Likewise.

        Returns:
            [T, H]; zero where none of a token's experts is local.
        """
        return packed_moe(x, layer.longroll_w13.form, layer.longroll_w2.form, topk_weights, topk_ids, layer.expert_map)

    def slots(self, layer: RoutedExperts) -> Iterator[Slot]:
        return _stored_slots(layer)


def packed_moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    """Per token, the weighted sum of its local experts: W2 (silu(gate) · up).

    Args:
        x: [T, H].
        w13: [E, 2I, H], gate rows above up rows, as `PackedStore` holds it.
        w2: [E, H, I], likewise.
        topk_weights: [T, k] float32.
        topk_ids: [T, k] int32 experts of the whole model.
        expert_map: [experts of the whole model] int32 place among the E, -1 if elsewhere; None: ids are places.

    Returns:
        [T, H] in x.dtype; with a map, terms are added in float32 in the order of `topk_ids`.
    """
    if expert_map is None:
        return _grouped(x, w13, w2, topk_weights, topk_ids)
    places = expert_map[topk_ids.reshape(-1)]
    kept = (places >= 0).nonzero().squeeze(1)
    output = torch.zeros(x.shape, dtype=torch.float32)
    if len(kept):
        token = kept // topk_ids.shape[1]
        weights = topk_weights.reshape(-1, 1).index_select(0, kept)
        terms = _grouped(x.index_select(0, token), w13, w2, weights, places.index_select(0, kept).unsqueeze(1))
        output.index_add_(0, token, terms.float())
    return output.to(x.dtype)


def _grouped(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    output = torch.empty_like(x)
    cpu_fused_moe(output, x, w13, w2, None, None, topk_weights, topk_ids, "silu", instructions(x.dtype))
    return output


class PlainTritonMoEMethod(UnquantizedFusedMoEMethod):
    """vLLM's Triton experts on CUDA, which read the weights where they were loaded.

    Not run on a GPU so far.
    """

    def __init__(self, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        if self.unquantized_backend not in (UnquantizedMoeBackend.TRITON, UnquantizedMoeBackend.BATCHED_TRITON):
            raise InvalidRequest(
                "engine.vllm.moe_backend", self.unquantized_backend.value, "triton, which leaves weights as loaded"
            )

    def slots(self, layer: RoutedExperts) -> Iterator[Slot]:
        for place, (gate, up, down) in _experts_held(layer):
            both = layer.w13_weight[place]
            yield from plain_slots((gate, up), both, (len(both) // 2,) * 2)
            yield from plain_slots((down,), layer.w2_weight[place], (layer.w2_weight.shape[1],))


class Int4MoEMethod(FusedMoEMethodBase):
    """INT4 experts, filled in float32 and quantised as soon as all of a layer are here."""

    uses_meta_device = True

    def __init__(self, moe: FusedMoEConfig, int4: Int4Config) -> None:
        super().__init__(moe)
        self._group_size = int4.group_size

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        width = intermediate_size_per_partition
        layer.longroll_dtype = params_dtype
        _create_weights(layer, num_experts, hidden_size, width, torch.float32, "meta", extra_weight_attrs)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Called when the layer is complete, and once more by the loader after all layers."""
        if not hasattr(layer, "longroll_w2"):
            dtype = layer.longroll_dtype
            layer.longroll_w13 = Int4Store(layer, "w13_weight", self._group_size, dtype)
            layer.longroll_w2 = Int4Store(layer, "w2_weight", self._group_size, dtype)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: object,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `PlainMoEMethod.apply`, with float32 router weights."""
        return int4_moe(
            x,
            layer.longroll_w13.form,
            layer.longroll_w2.form,
            topk_weights,
            topk_ids,
            layer.expert_map,
            self._group_size,
        )

    def slots(self, layer: RoutedExperts) -> Iterator[Slot]:
        return _stored_slots(layer)
