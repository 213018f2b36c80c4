"""Payloads of buckets in shared memory: written once by a sender, read by every shard of the host.

A segment is a file under /dev/shm that its writer creates and unlinks. Mapped readers keep their
pages until they drop the tensor, so unlinking early is safe once every reader has opened it.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import torch

from rollout.errors import SyncRefused
from rollout.sync.manifest import BucketRef

SHARED_MEMORY = Path("/dev/shm")


def create(num_bytes: int) -> tuple[str, torch.Tensor]:
    """Make a segment.

    Args:
        num_bytes: Its size, ≥ 0.

    Returns:
        Its name, and its bytes, uint8 [num_bytes], to be written in place.

    Raises:
        OSError: If shared memory is full; nothing is left behind.
    """
    segment = f"longroll-{os.getpid()}-{uuid.uuid4().hex}"
    path = SHARED_MEMORY / segment
    try:
        with path.open("xb") as file:
            # Takes the pages now: a store into a mapping of a full /dev/shm would kill the process instead.
            os.posix_fallocate(file.fileno(), 0, max(num_bytes, 1))
        return segment, _mapped(path, num_bytes)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def map(ref: BucketRef) -> torch.Tensor:
    """The payload of a bucket, uint8 [ref.num_bytes], mapped and not copied; to be read only.

    Raises:
        SyncRefused: If there is no segment, or it is missing or shorter than described.
    """
    if ref.segment is None:
        raise SyncRefused(f"{ref}: got one that is broadcast, expected one in shared memory")
    path = SHARED_MEMORY / ref.segment
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise SyncRefused(f"{ref}: segment is missing") from None
    if size < ref.num_bytes:
        raise SyncRefused(f"{ref}: got {size} bytes, expected {ref.num_bytes}")
    return _mapped(path, ref.num_bytes)


def unlink(segment: BucketRef | str | None) -> None:
    """Remove the name of a segment, or of a bucket's; does nothing if it is gone already, or there is none."""
    name = segment.segment if isinstance(segment, BucketRef) else segment
    if name is not None:
        (SHARED_MEMORY / name).unlink(missing_ok=True)


def sweep() -> int:
    """Remove segments whose writer is gone (killed between writing and unlinking); returns how many."""
    num_removed = 0
    for path in SHARED_MEMORY.glob("longroll-*-*"):
        writer = path.name.split("-")[1]
        if writer.isdigit() and not Path(f"/proc/{writer}").exists():
            path.unlink(missing_ok=True)
            num_removed += 1
    return num_removed


def _mapped(path: Path, num_bytes: int) -> torch.Tensor:
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_file(str(path), shared=True, size=num_bytes, dtype=torch.uint8)
