"""The weights a worker serves, by checkpoint name, as tensors that can be overwritten in place.

Owns the map from checkpoint tensors to the storage of vLLM's layers, for a model whose layers are all
ours (quantization.py, moe.py) or plain parameters (norms). A tensor-parallel rank holds slices of
tensors, which the map does not know: tensor_parallel_size must be 1. Knows nothing of versions,
transports or when weights change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.vocab_parallel_embedding import DEFAULT_VOCAB_PADDING_SIZE

from actors.vllm_plugin.slots import Int4Store, Slot
from kernels.int4.reference import ZERO_NIBBLE
from rollout.sync.encoding import Encoding, TensorPlan, encode, int4_rows, int4_tensors, plain_tensor

PADDING_BYTE = ZERO_NIBBLE << 4 | ZERO_NIBBLE


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveWeight:
    """Checkpoint tensors that change together, and where the forward reads them.

    Attributes:
        plans: Of the checkpoint tensors, in the order of their rows in the layer.
        slot: Their place.
    """

    plans: tuple[TensorPlan, ...]
    slot: Slot

    @property
    def sources(self) -> tuple[str, ...]:
        """Checkpoint names."""
        return self.slot.names

    @property
    def live(self) -> tuple[torch.Tensor, ...]:
        """Views of the layer's storage."""
        return self.slot.live

    def prepare(self, rows: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Tensors to copy into `live`: of the same shapes and dtypes, on the same device.

        Args:
            rows: All canonical rows (rollout.sync.encoding) of every source, on the CPU; contiguous.

        Returns:
            New tensors, except that a plain one on the CPU may be a view of its rows.
        """
        device, store = self.live[0].device, self.slot.store
        if not isinstance(store, Int4Store):
            tensors = [plain_tensor(rows[plan.name], plan) for plan in self.plans]
            plain = (tensors[0] if store is None else torch.cat(tensors)).to(device, self.live[0].dtype)
            return (plain,) if store is None else store.prepare(plain)
        canonical = [int4_tensors(rows[plan.name], plan) for plan in self.plans]
        packed, scale = (torch.cat(tensors).to(device) for tensors in zip(*canonical, strict=True))
        missing = store.num_rows - len(packed)  # padding of a vocabulary: zeros, as when loaded
        if missing:
            packed = pad(packed, (0, 0, 0, missing), value=PADDING_BYTE)
            scale = pad(scale, (0, 0, 0, missing), value=1.0)
        return store.prepare(packed, scale)

    def initial_rows(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, canonical rows on the CPU) of every source as it was loaded."""
        store, start = self.slot.store, 0
        for plan in self.plans:
            rows = slice(start, start + plan.shape[0])
            start = rows.stop
            if isinstance(store, Int4Store):
                packed, scale = store.initial(self.slot.expert)
                yield plan.name, int4_rows(packed[rows], scale[rows])
            else:
                plain = self.live[0] if store is None else store.initial(self.slot.expert)
                yield plan.name, encode(plain[rows].clone(), plan).cpu()  # encode may return a view


def live_weights(model: torch.nn.Module, plans: Mapping[str, TensorPlan]) -> list[LiveWeight]:
    """Everything this rank holds of a checkpoint: of the experts only its own.

    Args:
        model: As vLLM loaded it, with engine.quantization's configuration.
        plans: Of every tensor of the checkpoint, with the activation dtype.

    Raises:
        ValueError: A parameter of the model is not, in full, a tensor of the plans; or no rank would hold one of
            these, as with a bias that vLLM's model does not have and leaves out without a word.
    """
    if get_tensor_model_parallel_world_size() != 1:
        raise ValueError("weights in place: got tensor_parallel_size > 1, expected 1")
    weights: list[LiveWeight] = []
    covered: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, MLAAttention):
            raise ValueError(f"{path}: got multi-head latent attention, which keeps copies of its weights")
        for slot in _slots(path, module):
            weights.append(LiveWeight(plans=_plans(slot, plans), slot=slot))
            covered |= {tensor.untyped_storage().data_ptr() for tensor in slot.live}
    for name, parameter in model.named_parameters():
        if parameter.untyped_storage().data_ptr() not in covered:
            raise ValueError(f"parameter {name}: got no checkpoint tensor for it, expected every parameter to have one")
    unheld = plans.keys() - _served_names(model, weights)
    if unheld:
        raise ValueError(f"checkpoint tensor {min(unheld)}: got no layer for it, expected one (of {len(unheld)} such)")
    return weights


def draft_weights(draft: torch.nn.Module, plans: Mapping[str, TensorPlan], prefix: str) -> list[LiveWeight]:
    """The tensors of a draft model, by the names they travel under.

    Args:
        draft: Its parameters are plain.
        plans: Of all of them.
        prefix: Of the names.
    """
    return [
        LiveWeight(plans=(plans[prefix + name],), slot=Slot(names=(prefix + name,), live=(tensor.detach(),)))
        for name, tensor in draft.state_dict().items()
    ]


def _served_names(model: torch.nn.Module, weights: list[LiveWeight]) -> set[str]:
    """Names of what this rank holds, and of the experts of other ranks."""
    experts = (getattr(module, "longroll_names", ()) for module in model.modules())
    return {name for layer in experts for expert in layer for name in expert} | {
        name for weight in weights for name in weight.sources
    }


def take_initial_rows(model: torch.nn.Module, plans: Mapping[str, TensorPlan]) -> dict[str, torch.Tensor]:
    """Canonical rows, on the CPU, of the weights that were loaded; frees what the layers kept for this.

    Raises:
        ValueError: As `live_weights`.
        RuntimeError: On a second call for a model with INT4 weights.
    """
    weights = live_weights(model, plans)
    rows = {name: found for weight in weights for name, found in weight.initial_rows()}
    for weight in weights:
        if weight.slot.store is not None:
            weight.slot.store.forget_initial()
    return rows


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of device memory that the model's parameters take."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def _slots(path: str, module: torch.nn.Module) -> Iterator[Slot]:
    slots = getattr(getattr(module, "quant_method", None), "slots", None)
    if slots is not None:
        yield from slots(module)
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield Slot(names=(f"{path}.{name}" if path else name,), live=(parameter.detach(),))


def _plans(slot: Slot, plans: Mapping[str, TensorPlan]) -> tuple[TensorPlan, ...]:
    """The plans of a slot, after comparing them with what the layer holds."""
    missing = [name for name in slot.names if name not in plans]
    if missing:
        raise ValueError(f"{missing[0]}: got a layer for it, expected a tensor of that name in the checkpoint")
    found = tuple(plans[name] for name in slot.names)
    store = slot.store
    expected = Encoding.INT4 if isinstance(store, Int4Store) else Encoding.PLAIN
    for plan in found:
        if plan.encoding is not expected:
            raise ValueError(f"{plan.name}: got the plan {plan.encoding.value}, expected {expected.value} as loaded")
        if isinstance(store, Int4Store) and plan.row_elements != store.group_size:
            raise ValueError(f"{plan.name}: got groups of {plan.row_elements}, expected {store.group_size} as loaded")
    if store is None:
        shape = tuple(slot.live[0].shape)
        fits = shape == found[0].shape
    else:
        shape = (store.num_rows, store.num_in)
        num_rows = sum(plan.shape[0] for plan in found)
        padding = store.num_rows - num_rows
        fits = all(plan.shape[1] == store.num_in for plan in found) and 0 <= padding < DEFAULT_VOCAB_PADDING_SIZE
    if not fits:
        raise ValueError(f"{slot.names}: got a layer of shape {shape}, expected {[plan.shape for plan in found]}")
    return found
