"""A Clover-2 draft model on a CPU with AVX-512: two calls a step instead of some hundred small operations.

Owns the layout of what ``draft.cpp`` reads. The model itself, its tensors' names and the definition of what is computed
are `rollout.speculation.clover` and `clover_trees`; where this cannot run, they do.

Shape legend: B requests, R rows, H hidden, V vocabulary, K KV heads, D head width, N nodes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.native import vector_library

__all__ = ["DraftMemory", "DraftShape", "NativeDraft"]

_DECODER = ("norm.weight", "query.weight", "query.bias", "key_value.weight", "key_value.bias")
_LAYER = (
    "input_norm.weight",
    "qkv_proj.weight",
    "q_norm.weight",
    "k_norm.weight",
    "o_proj.weight",
    "post_norm.weight",
    "gate_up_proj.weight",
    "down_proj.weight",
)
_REST = (
    "root_project.weight",
    "root_project.bias",
    "state_project.weight",
    "state_project.bias",
    "token_project.weight",
    "head_norm.weight",
    "trust.weight",
    "trust.bias",
    "trust_by_depth",
)
_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_MULTIPLE = 32
"""Input features of a tile, and twice the floats of a vector."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftShape:
    """Of a draft; fields as `rollout.speculation.clover_config.DraftConfig` has them."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_steps: int
    rope_theta: float

    @property
    def fits(self) -> bool:
        """Whether rows and heads are whole vectors and tiles."""
        sizes = (self.hidden_size, self.intermediate_size, self.head_dim, self.hidden_size // self.num_heads)
        return not any(size % _MULTIPLE for size in sizes) and not self.vocab_size % (_MULTIPLE // 2)

    def numbers(self) -> ctypes.Array[ctypes.c_int64]:
        """In the order of ``Sizes``."""
        names = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        values = [getattr(self, name) for name in (*names, "intermediate_size", "num_steps")]
        return (ctypes.c_int64 * len(values))(*values)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftMemory:
    """Keys and values of one sequence, and the rows that are to follow.

    Attributes:
        rows: [layers, 2, K, capacity, D] in the draft's dtype, contiguous, with room for them; they are written.
        length: Tokens in it.
        count: New rows.
        position: Of the first of them.
    """

    rows: torch.Tensor
    length: int
    count: int
    position: int


class NativeDraft:
    """A draft model; its tensors stay the caller's and may be overwritten between calls.

    Args:
        library: Of ``draft.cpp``.
        shape: See `DraftShape`.
        tensors: In the order that ``Draft`` reads.
    """

    def __init__(self, library: ctypes.CDLL, shape: DraftShape, tensors: Sequence[torch.Tensor]) -> None:
        self._shape, self._tensors, self._numbers = shape, tuple(tensors), shape.numbers()
        self._dtype = tensors[0].dtype
        name = _DTYPES[tensors[0].dtype]
        self._grow, self._extend = (getattr(library, f"{call}_{name}") for call in ("grow", "extend"))

    @classmethod
    def of(
        cls, shape: DraftShape, tensors: Mapping[str, torch.Tensor], embedding: torch.Tensor, head: torch.Tensor
    ) -> NativeDraft | None:
        """The draft with these tensors, by name, and the target's [V, H] matrices.

        Returns:
            None where they are not contiguous, all of one dtype (bfloat16 or float32), on a CPU with AVX-512, or their
            shapes no multiples of its vectors: H, the heads' parts of it, D and the inner width of 32, V of 16.
        """
        names = [f"extract.{name}" for name in _DECODER]
        names += [f"layers.{layer}.{name}" for layer in range(shape.num_layers) for name in _LAYER]
        names += ["block_norm.weight", *(f"regress.{name}" for name in _DECODER), *_REST]
        all_tensors = [*(tensors[name] for name in names), embedding, head]
        is_plain = head.dtype in _DTYPES and embedding.shape == head.shape == (shape.vocab_size, shape.hidden_size)
        is_plain = is_plain and all(
            one.dtype == head.dtype and one.device.type == "cpu" and one.is_contiguous() for one in all_tensors
        )
        library = _library() if is_plain and shape.fits else None
        return None if library is None else cls(library, shape, all_tensors)

    def grow(
        self,
        roots: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor | None = None,
        top_p: torch.Tensor | None = None,
        *,
        max_depth: int,
        max_width: int,
        budget: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Trees from roots, by logits and noise together, as `rollout.speculation.clover_trees.grow_beams`.

        Args:
            roots: [B, H] states, in the draft's dtype.
            seeds: [B] int64 keys of the noise.
            positions: [B] int64, of the roots.
            temperature: [B] float32; 0 is greedy.
            top_k, top_p: [B] int64 and float32, 0 and 1 keeping everything; None where all do.
            max_depth: Layers at most.
            max_width: Nodes of each layer.
            budget: Growth ends once no node can still be among so many best of its tree.

        Returns:
            tokens and parents [B, N] int64 and scores [B, N] float32: see `Beams`. Where fewer tokens are kept than
            a layer has nodes, the scores of the rest are -inf.
        """
        count = len(roots)
        roots = self._checked("roots", roots, self._dtype, (count, self._shape.hidden_size))
        seeds = self._checked("seeds", seeds, torch.int64, (count,))
        positions = self._checked("positions", positions, torch.int64, (count,))
        temperature = self._checked("temperature", temperature, torch.float32, (count,))
        top_k = None if top_k is None else self._checked("top_k", top_k, torch.int64, (count,))
        top_p = None if top_p is None else self._checked("top_p", top_p, torch.float32, (count,))
        width = min(max_width, self._shape.vocab_size)
        tokens = torch.empty(count, max_depth, width, dtype=torch.int64)
        parents, scores = torch.empty_like(tokens), torch.empty(tokens.shape, dtype=torch.float32)
        depth = self._grow(
            self._pointers(),
            self._numbers,
            roots.data_ptr(),
            count,
            seeds.data_ptr(),
            positions.data_ptr(),
            temperature.data_ptr(),
            None if top_k is None else top_k.data_ptr(),
            None if top_p is None else top_p.data_ptr(),
            max_depth,
            width,
            budget,
            tokens.data_ptr(),
            parents.data_ptr(),
            scores.data_ptr(),
        )
        return tuple(found[:, :depth].flatten(1) for found in (tokens, parents, scores))  # type: ignore[return-value]

    def extend(self, memories: Sequence[DraftMemory], tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Take new rows into the memories, as `rollout.speculation.clover.CloverDraft.extend`.

        Args:
            memories: One for each request.
            tokens: int64 [R], rows one request after the other.
            hidden: [R, H] in the draft's dtype.

        Returns:
            [B, H], the roots.
        """
        tokens = self._checked("tokens", tokens, torch.int64, (sum(one.count for one in memories),))
        hidden = self._checked("hidden", hidden, self._dtype, (len(tokens), self._shape.hidden_size))
        for one in memories:
            if one.rows.dtype != self._dtype or not one.rows.is_contiguous():
                raise ValueError(f"draft's memory: got {one.rows.dtype}, expected dense {self._dtype}")
        roots = torch.empty(len(memories), self._shape.hidden_size, dtype=hidden.dtype)
        numbers = [n for one in memories for n in (one.rows.shape[3], one.length, one.count, one.position)]
        self._extend(
            self._pointers(),
            self._numbers,
            self._shape.rope_theta,
            len(memories),
            (ctypes.c_void_p * len(memories))(*(one.rows.data_ptr() for one in memories)),
            (ctypes.c_int64 * len(numbers))(*numbers),
            tokens.data_ptr(),
            hidden.data_ptr(),
            roots.data_ptr(),
        )
        return roots

    @staticmethod
    def _checked(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor, dense; what ``draft.cpp`` would misread is refused."""
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device.type != "cpu":
            got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"draft's {name}: got {got}, expected {dtype} {shape} on a CPU")
        return tensor.contiguous()

    def _pointers(self) -> ctypes.Array[ctypes.c_void_p]:
        return (ctypes.c_void_p * len(self._tensors))(*(tensor.data_ptr() for tensor in self._tensors))


@functools.cache
def _library() -> ctypes.CDLL | None:
    """``draft.cpp``, which checks nothing; None where it does not run."""
    library = vector_library(Path(__file__).with_name("draft.cpp"))
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name in _DTYPES.values():
        grow, extend = getattr(library, f"grow_{name}"), getattr(library, f"extend_{name}")
        grow.argtypes = [pointer] * 3 + [number] + [pointer] * 5 + [number] * 3 + [pointer] * 3
        grow.restype = number
        extend.argtypes = [pointer, pointer, ctypes.c_float, number, *[pointer] * 5]
        extend.restype = None
    return library
