"""What a weight version consists of: tensors by checkpoint name, cut into buckets of bounded size.

Knows nothing of where buckets travel or who receives them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from rollout.errors import SyncRefused


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name in the checkpoint, shape, and dtype as in "float32"."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * torch_dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketRef:
    """A bucket that its sender has described, and how every shard gets it.

    Attributes:
        version: Version the bucket belongs to.
        index: Its place in the plan, 0 … num_buckets-1.
        segment: Name of the shared-memory segment it was written to; None for one that its sender
            broadcasts tensor by tensor, in order, while this record travels.
        tensors: The tensors in the order in which they lie in it.
        offsets: First byte of each in the segment; empty without one.
        digests: BLAKE2b digest of each tensor's bytes.
    """

    version: int
    index: int
    segment: str | None
    tensors: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    digests: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> BucketRef:
        fields = json.loads(text)
        tensors = tuple(
            TensorSpec(name=t["name"], shape=tuple(t["shape"]), dtype=t["dtype"]) for t in fields["tensors"]
        )
        return cls(
            version=fields["version"],
            index=fields["index"],
            segment=fields["segment"],
            tensors=tensors,
            offsets=tuple(fields["offsets"]),
            digests=tuple(fields["digests"]),
        )


def torch_dtype(name: str) -> torch.dtype:
    """ "float32" → torch.float32. Raises ValueError for a name torch does not have."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: got {name!r}, expected the name of a torch dtype")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name=name, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype))


def digest(tensor: torch.Tensor) -> str:
    """BLAKE2b-128 of the bytes of a tensor (moved to the CPU if it is not there)."""
    flat = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy(), digest_size=16).hexdigest()


ALIGNMENT_BYTES = 16


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def plan_buckets(specs: Iterable[TensorSpec], bucket_bytes: int) -> list[tuple[TensorSpec, ...]]:
    """Cut tensors, in order, into buckets of at most `bucket_bytes` (a larger tensor goes alone).

    Args:
        specs: Tensors in the order of sending.
        bucket_bytes: Limit in bytes, > 0; alignment padding counts.
    """
    buckets: list[tuple[TensorSpec, ...]] = []
    current: list[TensorSpec] = []
    size = 0
    for spec in specs:
        need = aligned(spec.num_bytes)
        if current and size + need > bucket_bytes:
            buckets.append(tuple(current))
            current, size = [], 0
        current.append(spec)
        size += need
    if current:
        buckets.append(tuple(current))
    return buckets


def check_against(expected: Mapping[str, TensorSpec], offered: Sequence[TensorSpec]) -> None:
    """Refuse a publication whose names, shapes or dtypes are not exactly those being served.

    Raises:
        SyncRefused: With the first few differences.
    """
    faults = []
    seen: set[str] = set()
    for spec in offered:
        want = expected.get(spec.name)
        if spec.name in seen:
            faults.append(f"{spec.name}: sent twice")
        elif want is None:
            faults.append(f"{spec.name}: not a tensor of the model being served")
        elif want.shape != spec.shape:
            faults.append(f"{spec.name}: got shape {spec.shape}, expected {want.shape}")
        elif want.dtype != spec.dtype:
            faults.append(f"{spec.name}: got dtype {spec.dtype}, expected {want.dtype}")
        seen.add(spec.name)
    faults += [f"{name}: missing" for name in expected if name not in seen]
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise SyncRefused("publication refused: " + "; ".join(faults[:5]) + more)
