"""Weights inside vLLM as plain tensors that can be overwritten in place: INT4, or in the activation dtype.

Owns the two out-of-tree quantisation configurations and their linear and embedding layers (experts:
moe.py). Weights load through vLLM's own loaders; a layer that is served in INT4 is filled in float32,
quantised as soon as it is complete and its float32 weight freed, so that one layer at most is held in
full and the bytes depend on the checkpoint alone. vLLM's CPU prepacking is kept away from both kinds.

Which tensors are INT4 is the rule of rollout.sync.encoding, asked for the checkpoint tensors a layer is
made of. Knows nothing of publications; live.py says which tensor of a layer is which of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from actors.vllm_plugin import QUANTIZATIONS
from actors.vllm_plugin.moe import experts_method
from actors.vllm_plugin.options import PluginOptions
from actors.vllm_plugin.slots import Int4Store, Slot, is_int4, plain_slots, stored_slot
from kernels.dense import dense_linear
from kernels.int4 import dequantise, int4_linear
from rollout.config import Int4Config
from rollout.errors import InvalidRequest

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Checkpoint names of what vLLM fuses, for models that do not say so themselves."""


def source_modules(prefix: str, packed_modules: dict[str, list[str]]) -> tuple[str, ...]:
    """Checkpoint modules whose weights a layer holds, in the order of its rows."""
    parent, dot, leaf = prefix.rpartition(".")
    parts: Sequence[str] = packed_modules.get(leaf) or FUSED.get(leaf) or (leaf,)
    return tuple(f"{parent}{dot}{part}" for part in parts)


def _linear_op(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, group_size: int, bias: torch.Tensor | None
) -> torch.Tensor:
    return int4_linear(x, (first, second), group_size, bias)


def _linear_shape(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, group_size: int, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(x.shape[0], first.shape[0])


# One opaque operation for torch.compile, which could not look into the launch of a kernel.
direct_register_custom_op(op_name="longroll_int4_linear", op_func=_linear_op, fake_impl=_linear_shape)


def multiply(x: torch.Tensor, store: Int4Store, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] @ W^T + bias for the INT4 matrix of a store."""
    if x.is_cuda:
        product: torch.Tensor = torch.ops.vllm.longroll_int4_linear(x, *store.form, store.group_size, bias)
        return product
    return int4_linear(x, store.form, store.group_size, bias)


class _LiveConfig(QuantizationConfig):
    """What both configurations share."""

    name: str

    def _int4(self) -> Int4Config | None:
        """How matrices are quantised; None for plain weights. Called while layers are built."""
        raise NotImplementedError

    def get_name(self) -> str:
        return self.name

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # bfloat16

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        raise InvalidRequest("model.path", f"a checkpoint quantised as {config}", "one that is not quantised")

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        int4 = self._int4()
        if isinstance(layer, RoutedExperts):
            return experts_method(layer, prefix, int4)
        if isinstance(layer, VocabParallelEmbedding):
            num_in = layer.embedding_dim
        elif isinstance(layer, LinearBase):
            num_in = layer.input_size
        else:
            return None
        modules = source_modules(prefix, self.packed_modules_mapping)
        layer.longroll_sources = modules
        names = [f"{module}.weight" for module in modules]
        is_embedding = isinstance(layer, VocabParallelEmbedding)
        if int4 is None or not is_int4(names, num_in, get_current_vllm_config().model_config.dtype, int4):
            return PlainEmbeddingMethod() if is_embedding else PlainLinearMethod()
        return Int4EmbeddingMethod(int4) if is_embedding else Int4LinearMethod(int4)


@register_quantization_config(QUANTIZATIONS[None])
class PlainConfig(_LiveConfig):
    """Every weight in the activation dtype."""

    name = QUANTIZATIONS[None]

    def _int4(self) -> None:
        return None

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]


@register_quantization_config(QUANTIZATIONS["int4"])
class Int4WeightsConfig(_LiveConfig):
    """INT4 matrices, as `PluginOptions.int4` of the engine says."""

    name = QUANTIZATIONS["int4"]

    def _int4(self) -> Int4Config:
        # vLLM builds this object before it knows the engine's options; layers are built after.
        return PluginOptions.of(get_current_vllm_config()).int4 or Int4Config()

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32] if current_platform.is_cpu() else [torch.bfloat16]


class PlainLinearMethod(UnquantizedLinearMethod):
    """A dense layer on the weight as it was loaded."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing: on CPU vLLM would move the weight into a form that cannot be overwritten."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return super().apply(layer, x, bias) if x.is_cuda else dense_linear(x, layer.weight, bias)

    def slots(self, layer: torch.nn.Module) -> Iterator[Slot]:
        yield from plain_slots(_names(layer, "weight"), layer.weight, layer.output_partition_sizes)
        yield from _bias_slots(layer)


class Int4LinearMethod(LinearMethodBase):
    """A dense layer on an INT4 weight; its bias stays in the activation dtype."""

    uses_meta_device = True

    def __init__(self, int4: Int4Config) -> None:
        self._group_size = int4.group_size

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        if input_size_per_partition % self._group_size:
            raise InvalidRequest(
                f"engine.int4.group_size for {layer.prefix}",
                self._group_size,
                f"a divisor of the {input_size_per_partition} input features on one tensor rank",
            )
        layer.longroll_dtype = params_dtype
        weight = ModelWeightParameter(
            data=torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=torch.float32, device="meta"),
            input_dim=1,
            output_dim=0,
            weight_loader=extra_weight_attrs["weight_loader"],
        )
        layer.register_parameter("weight", weight)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Called when the layer is complete, and once more by the loader after all layers."""
        if not hasattr(layer, "longroll_weight"):
            layer.longroll_weight = Int4Store(layer, "weight", self._group_size, layer.longroll_dtype)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return multiply(x, layer.longroll_weight, bias)

    def slots(self, layer: torch.nn.Module) -> Iterator[Slot]:
        yield stored_slot(_names(layer, "weight"), layer.longroll_weight)
        yield from _bias_slots(layer)


class PlainEmbeddingMethod(UnquantizedEmbeddingMethod):
    """A table of rows, and the output head, on the weight as it was loaded."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing: on CPU vLLM would copy the weight into a form that cannot be overwritten."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return super().apply(layer, x, bias) if x.is_cuda else dense_linear(x, layer.weight, bias)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        return _tie(embed_tokens)

    def slots(self, layer: torch.nn.Module) -> Iterator[Slot]:
        rows = [layer.org_vocab_size]  # padding below them
        yield from plain_slots(_names(layer, "weight"), layer.weight[: rows[0]], rows)
        yield from _head_bias_slots(layer)


class Int4EmbeddingMethod(QuantizeMethodBase):
    """A table of INT4 rows that are dequantised as they are looked up; an INT4 output head.

    Looking rows up needs the canonical tensors and a matmul its own form, so a table that is also the
    head (tied) is held twice where the two differ.
    """

    uses_meta_device = True

    def __init__(self, int4: Int4Config) -> None:
        self._group_size = int4.group_size

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        layer.longroll_dtype = params_dtype
        weight = torch.nn.Parameter(
            torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=torch.float32, device="meta"),
            requires_grad=False,
        )
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, **extra_weight_attrs})
        layer.register_parameter("weight", weight)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Called when the layer is complete, and once more by the loader after all layers."""
        if hasattr(layer, "longroll_weight"):
            return
        is_head = isinstance(layer, ParallelLMHead)
        layer.longroll_weight = Int4Store(
            layer,
            "weight",
            self._group_size,
            layer.longroll_dtype,
            is_looked_up=not is_head,
            is_multiplied=is_head or getattr(layer, "longroll_is_tied", False),
        )

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        packed, scale = layer.longroll_weight.canonical
        return dequantise(packed[input_], scale[input_], layer.longroll_dtype)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return multiply(x, layer.longroll_weight, bias)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        return _tie(embed_tokens)

    def slots(self, layer: torch.nn.Module) -> Iterator[Slot]:
        yield stored_slot(_names(layer, "weight"), layer.longroll_weight)
        yield from _head_bias_slots(layer)


def _tie(embed_tokens: torch.nn.Module) -> torch.nn.Module:
    """The embedding in the place of the head, whatever the head was built as: there is one tensor in the checkpoint."""
    embed_tokens.longroll_is_tied = True
    return embed_tokens


def _names(layer: torch.nn.Module, leaf: str) -> list[str]:
    return [f"{module}.{leaf}" for module in layer.longroll_sources]


def _bias_slots(layer: torch.nn.Module) -> Iterator[Slot]:
    if layer.bias is not None:
        yield from plain_slots(_names(layer, "bias"), layer.bias, layer.output_partition_sizes)


def _head_bias_slots(layer: torch.nn.Module) -> Iterator[Slot]:
    if getattr(layer, "bias", None) is not None:
        yield from plain_slots(_names(layer, "bias"), layer.bias[: layer.org_vocab_size], [layer.org_vocab_size])
