"""Shards as a dashboard shows them: one by one where they are few; cells, histograms and outliers where they are many.

Owns these records and the aggregation, so that what is told of a fleet is bounded whatever its size. Knows nothing of
where the figures of a shard come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

MAX_TILES = 64  # shards that are told one by one; of more, cells
MAX_CELLS = 256
MAX_OUTLIERS = 3  # shards named at each end
NUM_BINS = 10  # of a histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTile:
    """One shard.

    Attributes:
        rank, group: Of the shard, and of its expert-parallel group.
        is_live: It serves.
        is_draining: It is given nothing new.
        num_running: Chunks that the scheduler runs on it.
        num_waiting: Of them, those that wait inside the engine; None: it has not said.
        kv_used: Share of its KV cache that its engine holds; None: it has not said.
        kv_reserved: Share that the scheduler has promised to running chunks, up to their ends.
        tokens_per_s: Sampled in the last seconds; None: not known yet.
        version: Of its weights; None: it has not said.
        num_preemptions: Since its engine's start.
    """

    rank: int
    group: int
    is_live: bool = True
    is_draining: bool = False
    num_running: int = 0
    num_waiting: int | None = None
    kv_used: float | None = None
    kv_reserved: float = 0.0
    tokens_per_s: float | None = None
    version: int | None = None
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Neighbouring shards as one; a single shard in a small fleet. Means are over live shards that have spoken.

    Attributes:
        first_rank, last_rank: Ranks in it, without gaps in their order.
        first_group, last_group: Expert-parallel groups in it.
        num_shards, num_live, num_draining: How many, and of them.
        num_running, num_waiting: Sums.
        kv_used, kv_used_max, kv_reserved: Mean and highest share in use, mean share reserved.
        tokens_per_s: Sum; None where nobody has spoken.
        version_min, version_max: Of the weights.
    """

    first_rank: int
    last_rank: int
    first_group: int
    last_group: int
    num_shards: int
    num_live: int
    num_draining: int
    num_running: int
    num_waiting: int
    kv_used: float | None
    kv_used_max: float | None
    kv_reserved: float
    tokens_per_s: float | None
    version_min: int | None
    version_max: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Numbers of shards in equal bins from `low` to `high`; what is at the upper end counts in the last one."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """All shards.

    Attributes:
        num_shards, num_live, num_draining, num_groups: How many.
        num_groups_wanted: Expert-parallel groups that there shall be; None: nobody said.
        is_aggregated: A cell is more than a shard.
        cells: In the order of ranks.
        kv_used: Over live shards that have spoken.
        kv_histogram, rate_histogram: The same shards by KV in use and by tokens per second; None: nobody has spoken.
        fullest, slowest: Live shards at the ends, the worst first; the slowest of those that run something.
        focus: Shards of the cell that was asked for.
        age_s: Since shards were last asked; None: never.
    """

    num_shards: int = 0
    num_live: int = 0
    num_draining: int = 0
    num_groups: int = 0
    num_groups_wanted: int | None = None
    is_aggregated: bool = False
    cells: tuple[Cell, ...] = ()
    kv_used: float | None = None
    kv_histogram: Histogram | None = None
    rate_histogram: Histogram | None = None
    fullest: tuple[ShardTile, ...] = ()
    slowest: tuple[ShardTile, ...] = ()
    focus: tuple[ShardTile, ...] = ()
    age_s: float | None = None


def fleet_of(
    tiles: Sequence[ShardTile],
    *,
    num_groups_wanted: int | None = None,
    age_s: float | None = None,
    cell: int | None = None,
) -> Fleet:
    """What is told of these shards.

    Up to MAX_TILES of them are a cell each. Of more, a cell is an expert-parallel group, or as many neighbouring ones
    as it takes to keep to MAX_CELLS.

    Args:
        tiles: All shards, in the order of their ranks.
        num_groups_wanted: How many expert-parallel groups there shall be.
        age_s: Since the shards were last asked for their figures.
        cell: Place of the cell to tell of shard by shard; one that does not exist is ignored.
    """
    parts = _parts(tiles)
    live = [tile for tile in tiles if tile.is_live]
    known = [tile.kv_used for tile in live if tile.kv_used is not None]
    rates = [tile.tokens_per_s for tile in live if tile.tokens_per_s is not None]
    focus = parts[cell] if cell is not None and 0 <= cell < len(parts) else []
    return Fleet(
        num_shards=len(tiles),
        num_live=len(live),
        num_draining=sum(tile.is_draining for tile in live),
        num_groups=len({tile.group for tile in tiles}),
        num_groups_wanted=num_groups_wanted,
        is_aggregated=len(tiles) > MAX_TILES,
        cells=tuple(_cell(part) for part in parts),
        kv_used=_mean(known),
        kv_histogram=histogram(known, high=1.0) if known else None,
        rate_histogram=histogram(rates) if rates else None,
        fullest=_first(live, lambda tile: None if tile.kv_used is None else -tile.kv_used),
        slowest=_first([tile for tile in live if tile.num_running], lambda tile: tile.tokens_per_s),
        focus=tuple(focus[:MAX_TILES]),
        age_s=age_s,
    )


def histogram(values: Sequence[float], *, high: float | None = None, num_bins: int = NUM_BINS) -> Histogram:
    """Of values from 0 on.

    Args:
        values: At least one; below 0 they count as 0, above `high` in the last bin.
        high: Upper end; None: the largest value, or 1 if that is 0.
        num_bins: Equal bins.
    """
    top = high if high is not None else max(values) or 1.0
    counts = [0] * num_bins
    for value in values:
        counts[min(num_bins - 1, int(max(0.0, value) / top * num_bins))] += 1
    return Histogram(low=0.0, high=top, counts=tuple(counts))


def _parts(tiles: Sequence[ShardTile]) -> list[list[ShardTile]]:
    """The shards of each cell."""
    if len(tiles) <= MAX_TILES:
        return [[tile] for tile in tiles]
    groups = [list(members) for _, members in groupby(tiles, key=lambda tile: tile.group)]
    width = -(-len(groups) // MAX_CELLS)
    return [list(chain(*groups[start : start + width])) for start in range(0, len(groups), width)]


def _cell(part: Sequence[ShardTile]) -> Cell:
    live = [tile for tile in part if tile.is_live]
    known = [tile.kv_used for tile in live if tile.kv_used is not None]
    rates = [tile.tokens_per_s for tile in live if tile.tokens_per_s is not None]
    versions = [tile.version for tile in live if tile.version is not None]
    return Cell(
        first_rank=part[0].rank,
        last_rank=part[-1].rank,
        first_group=part[0].group,
        last_group=part[-1].group,
        num_shards=len(part),
        num_live=len(live),
        num_draining=sum(tile.is_draining for tile in live),
        num_running=sum(tile.num_running for tile in live),
        num_waiting=sum(tile.num_waiting or 0 for tile in live),
        kv_used=_mean(known),
        kv_used_max=max(known, default=None),
        kv_reserved=_mean([tile.kv_reserved for tile in live]) or 0.0,
        tokens_per_s=sum(rates) if rates else None,
        version_min=min(versions, default=None),
        version_max=max(versions, default=None),
    )


def _first(tiles: Iterable[ShardTile], key: Callable[[ShardTile], float | None]) -> tuple[ShardTile, ...]:
    """Those that the key puts first; it is None where it does not apply."""
    known = [(value, tile.rank, tile) for tile in tiles if (value := key(tile)) is not None]
    return tuple(tile for _, _, tile in sorted(known, key=lambda entry: entry[:2])[:MAX_OUTLIERS])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
