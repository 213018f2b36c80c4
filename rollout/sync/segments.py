"""Buckets in shared memory: written once by the trainer, read by every shard of the host.

A segment is a file under /dev/shm that its writer creates and unlinks. Mapped readers keep their
pages until they drop the tensors, so unlinking early is safe once every reader has opened it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from rollout.errors import SyncRefused
from rollout.sync.manifest import BucketRef, aligned, digest, spec_of, torch_dtype

SHARED_MEMORY = Path("/dev/shm")


def write_bucket(version: int, index: int, tensors: Sequence[tuple[str, torch.Tensor]]) -> BucketRef:
    """Copy tensors into a new segment and describe it.

    Args:
        version: Version being published.
        index: Place of the bucket in the plan.
        tensors: (checkpoint name, tensor on any device), in order.

    Raises:
        OSError: If shared memory is full; nothing is left behind.
    """
    specs = tuple(spec_of(name, tensor) for name, tensor in tensors)
    offsets, end = [], 0
    for spec in specs:
        offsets.append(end)
        end += aligned(spec.num_bytes)
    segment = f"longroll-{os.getpid()}-{uuid.uuid4().hex}"
    try:
        buffer = _map(segment, end, create=True)
        for (_, tensor), spec, offset in zip(tensors, specs, offsets, strict=True):
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            buffer[offset : offset + spec.num_bytes].copy_(flat)
        digests = tuple(digest(tensor) for _, tensor in tensors)
    except BaseException:
        (SHARED_MEMORY / segment).unlink(missing_ok=True)
        raise
    return BucketRef(
        version=version, index=index, segment=segment, tensors=specs, offsets=tuple(offsets), digests=digests
    )


def read_bucket(ref: BucketRef) -> list[tuple[str, torch.Tensor]]:
    """Map a segment and return views of its tensors, without checking digests.

    Raises:
        SyncRefused: If there is no segment, or it is missing or shorter than described.
    """
    if ref.segment is None:
        raise SyncRefused(
            f"bucket {ref.index} of version {ref.version}: got one that is broadcast, expected one in shared memory"
        )
    end = max((o + t.num_bytes for o, t in zip(ref.offsets, ref.tensors, strict=True)), default=0)
    path = SHARED_MEMORY / ref.segment
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise SyncRefused(f"bucket {ref.index} of version {ref.version}: segment is missing") from None
    if size < end:
        raise SyncRefused(f"bucket {ref.index} of version {ref.version}: got {size} bytes, expected {end}")
    buffer = _map(ref.segment, end, create=False)
    return [
        (spec.name, buffer[o : o + spec.num_bytes].view(torch_dtype(spec.dtype)).view(spec.shape))
        for o, spec in zip(ref.offsets, ref.tensors, strict=True)
    ]


def read_verified(ref: BucketRef) -> list[tuple[str, torch.Tensor]]:
    """Like `read_bucket`, and refuse it unless every tensor has the digest its sender gave it.

    Raises:
        SyncRefused: With the name of the first tensor that differs.
    """
    tensors = read_bucket(ref)
    for (name, tensor), expected in zip(tensors, ref.digests, strict=True):
        got = digest(tensor)
        if got != expected:
            raise SyncRefused(
                f"bucket {ref.index} of version {ref.version}, {name}: got digest {got}, expected {expected}"
            )
    return tensors


def unlink(ref: BucketRef) -> None:
    """Remove a segment's name; does nothing if it is gone already, or the bucket has none."""
    if ref.segment is not None:
        (SHARED_MEMORY / ref.segment).unlink(missing_ok=True)


def sweep() -> int:
    """Remove segments whose writer is gone (killed between writing and unlinking); returns how many."""
    num_removed = 0
    for path in SHARED_MEMORY.glob("longroll-*-*"):
        writer = path.name.split("-")[1]
        if writer.isdigit() and not Path(f"/proc/{writer}").exists():
            path.unlink(missing_ok=True)
            num_removed += 1
    return num_removed


def _map(segment: str, num_bytes: int, *, create: bool) -> torch.Tensor:
    path = SHARED_MEMORY / segment
    if create:
        with path.open("xb") as file:
            file.truncate(max(num_bytes, 1))
    return torch.from_file(str(path), shared=True, size=num_bytes, dtype=torch.uint8)
