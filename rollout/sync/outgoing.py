"""The sending side of a publication in one process: weights in, one bucket at a time out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch

from rollout.errors import SyncRefused
from rollout.sync.manifest import BucketRef, TensorSpec, plan_buckets, spec_of
from rollout.sync.segments import write_bucket

DEFAULT_BUCKET_BYTES = 64 * 2**20


class OutgoingVersion:
    """Tensors of a version, to be read once.

    Args:
        version: Version being published.
        weights: By checkpoint name, or (name, tensor) pairs; any iterable of pairs if `specs` are given.
        specs: Description of all tensors in the order of `weights`; None reads it off them.
        bucket_bytes: Largest bucket.

    Raises:
        SyncRefused: If `weights` can be read only once and `specs` are missing.
    """

    def __init__(
        self,
        version: int,
        weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
        specs: Sequence[TensorSpec] | None,
        bucket_bytes: int,
    ) -> None:
        pairs = weights.items() if isinstance(weights, Mapping) else weights
        if specs is None:
            if iter(pairs) is pairs:
                raise SyncRefused(
                    f"weights of version {version}: got {type(weights).__name__}, which can be read only once, "
                    "expected a mapping or a sequence of (name, tensor), or specs with it"
                )
            specs = [spec_of(name, tensor) for name, tensor in pairs]
        self.specs = tuple(specs)
        self._version, self._pairs, self._bucket_bytes = version, pairs, bucket_bytes

    def buckets(self) -> Iterator[BucketRef]:
        """Write one bucket after the other; the receiver of each unlinks it before the next is written.

        Raises:
            SyncRefused: If a tensor is not the next one of the specs.
        """
        pairs = iter(self._pairs)
        for index, planned in enumerate(plan_buckets(self.specs, self._bucket_bytes)):
            tensors = list(islice(pairs, len(planned)))
            got = [spec_of(name, tensor) for name, tensor in tensors]
            wrong = next(((g, p) for g, p in zip(got, planned, strict=False) if g != p), None)
            if wrong is not None or len(got) != len(planned):
                detail = f"got {wrong[0]}, expected {wrong[1]}" if wrong else "weights ended before the specs"
                raise SyncRefused(f"bucket {index} of version {self._version}: {detail}")
            yield write_bucket(self._version, index, tensors)
