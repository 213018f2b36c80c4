"""Packed routing in Ray's object store: put once where it was sampled, fetched where it is trained on.

References travel inside trajectories and count: the bytes live as long as somebody holds one, and Ray
spills them to disk when memory is short. The owner is the shard's actor, so its death loses them; whoever
fetches is told that nothing is there and trains without. Knows nothing of what the rows are used for.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import ray
from ray.exceptions import RayError

from rollout.errors import RoutingBroken
from rollout.routing import RoutingRef, covers, rows_of
from rollout.types import Chunk

logger = logging.getLogger(__name__)
FETCH_TIMEOUT_S = 30.0  # an owner that died is noticed at once; this is for one that hangs


def first_row(chunk: Chunk) -> int:
    """Position of the first token whose routing a chunk brings: earlier ones came with earlier chunks.

    The last token of the context was sampled by the chunk before, and goes through the model in this one.
    """
    is_first = len(chunk.token_ids) == chunk.num_prompt_tokens
    return 0 if is_first else len(chunk.token_ids) - 1


def put(blob: bytes, chunk: Chunk, num_new_tokens: int) -> RoutingRef:
    """Keep the packed routing of a chunk that ended with `num_new_tokens` more tokens than it began with."""
    first = first_row(chunk)
    return RoutingRef(
        ref=ray.put(blob),
        num_bytes=len(blob),
        first_token=first,
        num_tokens=len(chunk.token_ids) + num_new_tokens - 1 - first,
    )


def fetch(refs: Sequence[RoutingRef], num_rows: int, timeout_s: float = FETCH_TIMEOUT_S) -> np.ndarray | None:
    """Experts [num_rows, layers, places] of a trajectory; None if any row of it is missing or damaged."""
    if not refs or not covers(refs, num_rows):
        return None
    try:
        blobs = ray.get([one.ref for one in refs], timeout=timeout_s)
        rows = [rows_of(blob, one) for blob, one in zip(blobs, refs, strict=True)]
        return np.concatenate(rows)
    except (RayError, RoutingBroken, ValueError) as error:  # ValueError: chunks of different models
        logger.warning("routing of a trajectory is lost: %s: %s", type(error).__name__, str(error).splitlines()[0])
        return None
