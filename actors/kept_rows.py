"""The encoded rows that a trainer rank last had committed: what its next publication is compared with.

Lies where the transport wants whole payloads, one buffer a bucket: with shared memory these are segments
that stay for as long as the version is live, so that a full publication encodes straight into what is
sent, and a shard that joins late can be given it. Takes 0.28 of the rank's share of a bfloat16 model in
INT4 groups of 64. Knows nothing of training or of when a version is committed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from actors.weight_partition import Share
from rollout.sync import segments
from rollout.sync.delta import Allocate, travelling_rows
from rollout.sync.encoding import TensorPlan
from rollout.sync.manifest import BucketRef, Entry, aligned, digest


class KeptRows:
    """Rows of every bucket of one rank.

    Args:
        buckets: This rank's.
        plans: Encoding of every tensor.
        allocate: Makes the buffer of a bucket, and names its segment if it is one.
    """

    def __init__(self, buckets: Sequence[Sequence[Share]], plans: Mapping[str, TensorPlan], allocate: Allocate) -> None:
        self._buckets, self._plans, self._allocate = buckets, plans, allocate
        self._payloads: list[torch.Tensor] = []
        self._segments: list[str | None] = []
        self._refs: list[BucketRef] = []  # of sealed buckets

    def add(self) -> list[torch.Tensor]:
        """Make the buffer of the next bucket; returns the rows of its shares, to be written.

        Raises:
            OSError: There is no room.
        """
        index = len(self._payloads)
        segment, payload = self._allocate(sum(aligned(self._num_bytes(share)) for share in self._buckets[index]))
        self._payloads.append(payload)
        self._segments.append(segment)
        return self.rows(index)

    def scratch(self) -> torch.Tensor:
        """A private buffer that takes the rows of any one bucket."""
        return torch.empty(max((payload.numel() for payload in self._payloads), default=0), dtype=torch.uint8)

    def rows(self, index: int, buffer: torch.Tensor | None = None) -> list[torch.Tensor]:
        """uint8 [rows, row_bytes] of every share of a bucket: those kept, or the same places in another buffer."""
        buffer = self._payloads[index] if buffer is None else buffer
        found, offset = [], 0
        for share in self._buckets[index]:
            num_bytes = self._num_bytes(share)
            row_bytes = self._plans[share.piece.name].row_bytes
            found.append(buffer[offset : offset + num_bytes].view(-1, row_bytes))
            offset += aligned(num_bytes)
        return found

    def seal(self, *, version: int, attempt: int, sender: int) -> tuple[BucketRef, torch.Tensor]:
        """Describe the bucket added last, now that its rows are written; returns it with its payload."""
        index = len(self._payloads) - 1
        entries, offset = [], 0
        for share, rows in zip(self._buckets[index], self.rows(index), strict=True):
            entries.append(
                Entry(
                    name=share.piece.name,
                    first_row=share.piece.first_row,
                    num_rows=share.piece.num_rows,
                    num_changed=share.piece.num_rows,
                    digest=digest(rows),
                    mask_offset=None,
                    rows_offset=offset,
                )
            )
            offset += aligned(rows.numel())
        ref = BucketRef(
            version=version,
            attempt=attempt,
            base=None,
            sender=sender,
            index=index,
            segment=self._segments[index],
            num_bytes=self._payloads[index].numel(),
            entries=tuple(entries),
        )
        self._refs.append(ref)
        return ref, self._payloads[index]

    def advance(self, ref: BucketRef, payload: torch.Tensor) -> None:
        """Bring a bucket to the version of a delta that was made against it and is now live."""
        kept = self._refs[ref.index]
        assert kept.version == ref.base, "a delta against rows that are not kept"
        for entry, rows in zip(ref.entries, self.rows(ref.index), strict=True):
            changed = travelling_rows(entry, payload)
            end = entry.rows_offset + entry.num_changed * rows.shape[1]
            new = payload[entry.rows_offset : end].view(-1, rows.shape[1])
            if changed is None:
                rows.copy_(new)
            else:
                rows[changed] = new
        self._refs[ref.index] = replace(
            kept,
            version=ref.version,
            attempt=ref.attempt,
            entries=tuple(replace(old, digest=new.digest) for old, new in zip(kept.entries, ref.entries, strict=True)),
        )

    @property
    def refs(self) -> tuple[BucketRef, ...]:
        """All buckets as full ones, with the digests of what they hold now."""
        return tuple(self._refs)

    def release(self) -> None:
        """Give up the segments; harmless when there are none, or it was done before."""
        for segment in self._segments:
            segments.unlink(segment)

    def _num_bytes(self, share: Share) -> int:
        return share.piece.num_rows * self._plans[share.piece.name].row_bytes
