"""Which shard runs the next chunk.

A continuation goes back to the shard that holds its prefix, if that one has room. Everything else
goes to the live shard with the fewest reserved tokens, so that the members of a group spread over
the fleet: their common prompt is short against what they generate, and an even load ends a batch
sooner than one shared prefill saves.
"""

from __future__ import annotations

from collections.abc import Mapping

from rollout.scheduler.records import ShardLoad


def choose_shard(shards: Mapping[int, ShardLoad], home: int | None, max_running: int) -> int | None:
    """Return the rank of the shard to use, or None while no live shard has room.

    Args:
        shards: Load of each shard by rank.
        home: Shard that ran the trajectory last.
        max_running: Most chunks in flight on one shard.
    """
    if home is not None and _has_room(shards[home], max_running):
        return home
    free = [rank for rank, load in shards.items() if _has_room(load, max_running)]
    return min(free, key=lambda r: (shards[r].reserved_tokens, len(shards[r].running), r), default=None)


def _has_room(load: ShardLoad, max_running: int) -> bool:
    return load.is_live and len(load.running) < max_running
