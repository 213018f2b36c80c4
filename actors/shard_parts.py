"""What the shards of a service are made of, where there is room for them, and how they start together.

Owns nothing; the service owns the actors. Knows nothing of controllers or requests.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rollout.config import (
    ClusterConfig,
    EngineConfig,
    JournalConfig,
    ModelConfig,
    SchedulerConfig,
    SupervisorConfig,
    SyncConfig,
)
from rollout.errors import EngineDead, InvalidRequest, LongrollError
from rollout.fleet import Rendezvous, ShardInfo

StartCallback = Callable[[int, int], None]
"""Called with shards ready and shards in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardParts:
    """What shards are made of, kept for making them again."""

    model: ModelConfig
    engine: EngineConfig
    scheduler: SchedulerConfig
    sync: SyncConfig
    cluster: ClusterConfig
    journal: JournalConfig
    supervisor: SupervisorConfig | None
    initial_version: int
    shard_class: type | None

    def make_shard(self, rank: int, placement: Any, bundle: int) -> Any:
        """The actor of one shard, not started yet, in a bundle of a placement group if there is one."""
        from actors.shard import Shard

        strategy: Any = "DEFAULT"
        if placement is not None:
            strategy = PlacementGroupSchedulingStrategy(
                placement, placement_group_bundle_index=bundle, placement_group_capture_child_tasks=True
            )
        actor = ray.remote(self.shard_class or Shard).options(
            num_cpus=self.cluster.num_cpus_per_shard,
            num_gpus=self.engine.tensor_parallel_size if self.cluster.num_gpus_per_node else 0,
            max_concurrency=self.scheduler.max_running_per_shard + 64,  # chunks, and room for control calls
            scheduling_strategy=strategy,
        )
        return actor.remote(
            rank=rank, model=self.model, engine=self.engine, sync=self.sync, initial_version=self.initial_version
        )


def check_resources(engine: EngineConfig, cluster: ClusterConfig) -> None:
    """Compare what the engines need with what the cluster has, before anything waits for it.

    Raises:
        InvalidRequest: The shards do not fit the configured nodes.
        LongrollError: The cluster has less than configured.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if cluster.num_gpus_per_node == 0:
        need, have = engine.num_all_shards * cluster.num_cpus_per_shard, sum(n.get("CPU", 0.0) for n in nodes)
        if engine.tensor_parallel_size != 1:
            raise InvalidRequest("engine.tensor_parallel_size", engine.tensor_parallel_size, "1 without GPUs")
        if have < need:
            raise LongrollError(
                f"cluster: got {have:g} CPUs, expected {need:g} for {engine.num_all_shards} shards of "
                f"{cluster.num_cpus_per_shard:g} (cluster.num_cpus_per_shard)"
            )
        return
    per_node = cluster.num_gpus_per_node // engine.tensor_parallel_size
    if engine.num_all_shards > per_node * cluster.num_nodes:
        raise InvalidRequest(
            "engine.num_groups × engine.num_shards",
            f"{engine.num_all_shards} of {engine.tensor_parallel_size} GPUs",
            f"at most {per_node * cluster.num_nodes} on {cluster.num_nodes} nodes of {cluster.num_gpus_per_node} GPUs",
        )
    gpus = sorted((int(n.get("GPU", 0)) for n in nodes), reverse=True)
    if sum(g >= cluster.num_gpus_per_node for g in gpus) < cluster.num_nodes:
        raise LongrollError(
            f"cluster: got {len(gpus)} nodes with {gpus} GPUs, expected {cluster.num_nodes} nodes with at least "
            f"{cluster.num_gpus_per_node} GPUs each (cluster.num_nodes, cluster.num_gpus_per_node)"
        )


def reserve(engine: EngineConfig, cluster: ClusterConfig, num_shards: int) -> Any:
    """One bundle for each of so many shards, so that its GPUs lie on one node."""
    bundle = {"GPU": float(engine.tensor_parallel_size), "CPU": cluster.num_cpus_per_shard}
    group = placement_group([bundle] * num_shards, strategy=cluster.placement_strategy)
    if not group.wait(timeout_seconds=engine.start_timeout_s):
        remove_placement_group(group)
        free = ray.available_resources()
        raise LongrollError(
            f"cluster: got {free.get('GPU', 0):g} free GPUs and {free.get('CPU', 0):g} free CPUs, expected room for "
            f"{num_shards} bundles of {bundle} within {engine.start_timeout_s:g} s"
        )
    return group


def start_shards(
    shards: list[Any], engine: EngineConfig, on_progress: StartCallback | None, stop: threading.Event | None = None
) -> list[ShardInfo]:
    """Start all shards together; returns what they say, by rank. The first of each group says where it meets.

    Args:
        shards: Actors of whole groups.
        engine: How many make up a group, and how long they may take.
        on_progress: Told how many are ready.
        stop: Ends the wait when it is set.

    Raises:
        EngineDead: One failed, they took too long, or there was no room for them.
    """
    began = time.monotonic()
    waiting = [shard.rendezvous.remote() for shard in shards[:: engine.num_shards]]
    meetings: list[Rendezvous] = _gather(
        waiting, "to be placed", began, engine.start_timeout_s, stop, lambda done: None
    )
    starting = [shard.start.remote(meetings[rank // engine.num_shards]) for rank, shard in enumerate(shards)]

    def tell(num_ready: int) -> None:
        if on_progress is not None:
            on_progress(num_ready, len(shards))

    return _gather(starting, "to be ready", began, engine.start_timeout_s, stop, tell)


def _gather(
    references: list[Any],
    what: str,
    began: float,
    timeout_s: float,
    stop: threading.Event | None,
    tell: Callable[[int], None],
) -> list[Any]:
    """Results in the order of the references; the first error is raised as soon as it is there."""
    place = {reference: index for index, reference in enumerate(references)}
    found: dict[int, Any] = {}
    waiting = list(references)
    while waiting:
        remaining_s = began + timeout_s - time.monotonic()
        if remaining_s <= 0 or (stop is not None and stop.is_set()):
            free = ray.available_resources()
            why = f"start_timeout_s = {timeout_s:g} s" if remaining_s <= 0 else "the time until the service was stopped"
            raise EngineDead(
                f"shards: got {len(found)} of {len(references)}, expected all {what} within {why}; free on the "
                f"cluster are {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"
            )
        ready, waiting = ray.wait(waiting, timeout=min(1.0, remaining_s))
        for reference in ready:
            found[place[reference]] = ray.get(reference)
        if ready:
            tell(len(found))
    return [found[index] for index in range(len(references))]
