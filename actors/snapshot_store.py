"""Where all bytes of the live version can be had, kept outside the controller so that its successor knows it too.

Owns one entry of the cluster's key-value store, as Ray Serve keeps its controller's state there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from rollout.sync.manifest import BucketRef


def _key() -> bytes:
    return f"longroll/{ray.get_runtime_context().namespace}/snapshot".encode()


def save_snapshot(version: int, refs: Sequence[BucketRef]) -> None:
    """Replace what is kept."""
    _internal_kv_put(_key(), json.dumps({"version": version, "refs": [ref.to_json() for ref in refs]}).encode())


def load_snapshot(version: int) -> tuple[BucketRef, ...]:
    """The buckets of a version; () if those of another one are kept, or none."""
    kept = _internal_kv_get(_key())
    if kept is None:
        return ()
    record = json.loads(kept)
    return tuple(map(BucketRef.from_json, record["refs"])) if record["version"] == version else ()
