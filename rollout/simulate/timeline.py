"""How many sequences ran on every shard, when: recorded event by event, read as integrals or as a raster.

Knows nothing of what the sequences were.
"""

from __future__ import annotations

from array import array

import numpy as np


class Timeline:
    """Changes of the running count of each shard. Times must not fall for any one shard.

    Args:
        num_shards: Shards 0 … num_shards - 1.
    """

    def __init__(self, num_shards: int) -> None:
        self._times = [array("d", [0.0]) for _ in range(num_shards)]
        self._counts = [array("i", [0]) for _ in range(num_shards)]

    def __len__(self) -> int:
        return len(self._times)

    def record(self, shard: int, time_s: float, num_running: int) -> None:
        """The shard runs so many sequences from now on."""
        counts = self._counts[shard]
        if counts[-1] != num_running:
            self._times[shard].append(time_s)
            counts.append(num_running)

    def mean_running(self, end_s: float) -> float:
        """Sequences on a shard, averaged over shards and time."""
        return float(np.mean([self._integral(shard, np.array([0.0, end_s]))[1] for shard in self._shards])) / end_s

    def idle_share(self, end_s: float) -> float:
        """Share of the shards' time in which they ran nothing."""
        idle = 0.0
        for times, counts in zip(self._times, self._counts, strict=True):
            bounds = np.append(np.asarray(times), end_s)
            idle += float(np.diff(bounds)[np.asarray(counts) == 0].sum())
        return idle / (len(self._times) * end_s)

    def raster(self, end_s: float, num_rows: int, num_columns: int) -> np.ndarray:
        """Mean running count, float64 of shape (rows, columns); a row is a run of neighbouring shards."""
        edges = np.linspace(0.0, end_s, num_columns + 1)
        means = np.array([np.diff(self._integral(s, edges)) for s in self._shards]) * (num_columns / end_s)
        rows = np.array_split(np.arange(len(self._times)), min(num_rows, len(self._times)))
        return np.array([means[row].mean(axis=0) for row in rows])

    @property
    def _shards(self) -> range:
        return range(len(self._times))

    def _integral(self, shard: int, at: np.ndarray) -> np.ndarray:
        """Sequence-seconds up to each of the given times, which ascend."""
        times, counts = np.asarray(self._times[shard]), np.asarray(self._counts[shard], dtype=np.float64)
        done = np.concatenate([[0.0], np.cumsum(counts[:-1] * np.diff(times))])
        last = np.searchsorted(times, at, side="right") - 1
        return done[last] + counts[last] * (at - times[last])
