"""Which tensors of a layer hold which tensors of the checkpoint, and how INT4 matrices are held.

Shared by the methods that own layers (quantization.py, moe.py) and read by live.py. Knows no layer class.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from vllm._custom_ops import cpu_prepack_moe_weight

from kernels.int4 import kernel_form, quantise
from rollout.config import Int4Config
from rollout.errors import InvalidRequest
from rollout.sync.encoding import Encoding, plan_tensor
from rollout.sync.manifest import TensorSpec, dtype_name

GIVEN_AWAY = "initial weights: got a second call, expected one for each engine"
Canonical = tuple[torch.Tensor, torch.Tensor]
"""(packed, scale) of kernels.int4."""


@functools.cache
def instructions(dtype: torch.dtype) -> str:
    """Those that vLLM's grouped CPU kernel is to use, each with an order of weights of its own; as vLLM chooses."""
    return "amx" if dtype == torch.bfloat16 and torch.cpu._init_amx() else "vec"


def is_int4(names: Sequence[str], num_in: int, dtype: torch.dtype, int4: Int4Config | None) -> bool:
    """Whether the matrices that one layer is made of are served in INT4.

    Args:
        names: Checkpoint tensors.
        num_in: Their input features.
        dtype: Of the activations.
        int4: None for plain weights.

    Raises:
        InvalidRequest: They do not agree, or cannot be served so.
    """
    encodings = {
        name: plan_tensor(TensorSpec(name=name, shape=(1, num_in), dtype=dtype_name(dtype)), int4).encoding
        for name in names
    }
    if len(set(encodings.values())) > 1:
        plain = [name for name, encoding in encodings.items() if encoding is Encoding.PLAIN]
        raise InvalidRequest("engine.int4.skip", f"{plain[0]} alone of {len(names)}", "all or none of a fused layer")
    return Encoding.INT4 in encodings.values()


class Int4Store:
    """An INT4 matrix [N, K], or one for each expert [E, N, K], as parameters of a layer.

    Owns the canonical tensors that were loaded, on the CPU, until `forget_initial`.

    Args:
        layer: Its parameter `name` holds the full weight; it is replaced by what is held: `name`, `name_1` …
        name: Of that parameter.
        group_size: Input features that share a scale.
        dtype: Of the activations.
        is_looked_up: Single rows will be read: keep the canonical tensors.
        is_multiplied: There will be matmuls: keep their form.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        name: str,
        group_size: int,
        dtype: torch.dtype,
        *,
        is_looked_up: bool = False,
        is_multiplied: bool = True,
    ) -> None:
        self.group_size = group_size
        self._dtype, self._is_looked_up, self._is_multiplied = dtype, is_looked_up, is_multiplied
        weight = layer._parameters.pop(name)
        packed, scale = quantise(weight, group_size)
        self.num_rows, self.num_in = weight.shape[-2:]
        self._initial: Canonical | None = (packed.cpu(), scale.cpu())
        self._held = self.prepare(packed, scale)
        for place, tensor in enumerate(self._held):
            layer.register_parameter(f"{name}_{place}" if place else name, _parameter(tensor, weight))
        self.canonical: Canonical = (self._held[0], self._held[1])  # only if rows are looked up
        self.form: Canonical = (self._held[-2], self._held[-1])  # only if there are matmuls

    def prepare(self, packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is held of a canonical matrix, or of a stack of them, on their device."""
        canonical = (packed, scale) if self._is_looked_up else ()
        return canonical + (kernel_form(packed, scale, self._dtype) if self._is_multiplied else ())

    def live(self, expert: int | None) -> tuple[torch.Tensor, ...]:
        """Views of what is held, of one expert if there are several."""
        return self._held if expert is None else tuple(tensor[expert] for tensor in self._held)

    def initial(self, expert: int | None) -> Canonical:
        """Canonical tensors of what was loaded, on the CPU.

        Raises:
            RuntimeError: They were given away already.
        """
        if self._initial is None:
            raise RuntimeError(GIVEN_AWAY)
        packed, scale = self._initial
        return (packed, scale) if expert is None else (packed[expert], scale[expert])

    def forget_initial(self) -> None:
        self._initial = None


class PackedStore:
    """Matrices of experts [E, N, K] in the activation dtype, as vLLM's grouped CPU kernel reads them.

    The kernel's order is a permutation within each expert's matrix. Owns the weights in their own order
    until `forget_initial`.

    Args:
        layer: Its parameter `name` holds the weights; they are replaced by the packed ones.
        name: Of that parameter.
    """

    def __init__(self, layer: torch.nn.Module, name: str) -> None:
        weight = layer._parameters.pop(name)
        self._initial: torch.Tensor | None = weight.detach()
        self.num_rows, self.num_in = weight.shape[-2:]
        self.form = cpu_prepack_moe_weight(weight.detach(), instructions(weight.dtype))
        layer.register_parameter(name, _parameter(self.form, weight))

    def prepare(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is held of one expert's matrix [N, K]."""
        return (cpu_prepack_moe_weight(weight.unsqueeze(0), instructions(weight.dtype)).squeeze(0),)

    def live(self, expert: int | None) -> tuple[torch.Tensor, ...]:
        """View of what is held of one expert."""
        return (self.form if expert is None else self.form[expert],)

    def initial(self, expert: int | None) -> torch.Tensor:
        """The matrix of an expert as it was loaded.

        Raises:
            RuntimeError: They were given away already.
        """
        if self._initial is None:
            raise RuntimeError(GIVEN_AWAY)
        return self._initial if expert is None else self._initial[expert]

    def forget_initial(self) -> None:
        self._initial = None


def _parameter(tensor: torch.Tensor, replaced: torch.Tensor) -> torch.nn.Parameter:
    """A parameter that still has the loader: vLLM offers a layer the experts of other ranks to the end."""
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    parameter.weight_loader = replaced.weight_loader  # type: ignore[attr-defined]
    return parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Part of a layer's storage that holds whole checkpoint tensors, one below the other.

    Attributes:
        names: Checkpoint names, in the order of their rows; exactly one without a store.
        live: What the forward reads, as views: writing into them changes the layer.
        store: Of a matrix that is held in another form than its own; None for a tensor as it is.
        expert: Local number of the expert in the store; None if it holds one matrix.
    """

    names: tuple[str, ...]
    live: tuple[torch.Tensor, ...]
    store: Int4Store | PackedStore | None = None
    expert: int | None = None


def stored_slot(names: Sequence[str], store: Int4Store | PackedStore, expert: int | None = None) -> Slot:
    """A matrix of a store."""
    return Slot(names=tuple(names), live=store.live(expert), store=store, expert=expert)


def plain_slots(names: Sequence[str], tensor: torch.Tensor, sizes: Sequence[int]) -> Iterator[Slot]:
    """Plain tensors of `sizes` rows that lie one below the other in a tensor."""
    for name, rows in zip(names, tensor.detach().split(list(sizes)), strict=True):
        yield Slot(names=(name,), live=(rows,))
