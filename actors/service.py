"""Starting and stopping the service: placement, shards, controller.

Owns everything it starts and stops all of it when anything fails. Knows nothing of requests.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.controller import Controller
from actors.process import kill_process
from rollout.client import RolloutClient
from rollout.config import (
    ClusterConfig,
    EngineConfig,
    JournalConfig,
    ModelConfig,
    SchedulerConfig,
    SupervisorConfig,
    SyncConfig,
)
from rollout.errors import EngineDead, InvalidRequest, LongrollError, ServiceLost
from rollout.fleet import CONTROLLER_NAME, Place, Rendezvous, ShardInfo
from rollout.remote import client_error
from rollout.sync.checkpoint_names import checkpoint_specs
from rollout.sync.encoding import TensorPlan, plan_tensors
from rollout.sync.segments import sweep

logger = logging.getLogger(__name__)
CONTROLLER_CONCURRENCY = 4096  # every long poll holds one place
SHUTDOWN_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 20.0
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

    def make_shard(self, rank: int, placement: Any) -> Any:
        """The actor of one shard, not started yet, in its bundle of a placement group if there is one."""
        from actors.shard import Shard

        strategy: Any = "DEFAULT"
        if placement is not None:
            strategy = PlacementGroupSchedulingStrategy(
                placement, placement_group_bundle_index=rank, placement_group_capture_child_tasks=True
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


@dataclass(kw_only=True)
class Service:
    """A running service; `stop` ends every process of it. Usable as a context manager."""

    namespace: str
    shards: list[Any] = field(default_factory=list)
    infos: list[ShardInfo] = field(default_factory=list)
    controller: Any = None
    placement: Any = None
    parts: ShardParts | None = None
    plans: dict[str, TensorPlan] = field(default_factory=dict)
    bucket_bytes: int = SyncConfig().bucket_bytes
    newest_version: int = 0  # that is known to have been live
    _controller_place: Place | None = None

    @property
    def client(self) -> RolloutClient:
        """A new client of this service."""
        find = partial(ray.get_actor, CONTROLLER_NAME, namespace=self.namespace)
        return RolloutClient(self.controller, self.bucket_bytes, find=find if self._is_supervised else None)

    @property
    def _is_supervised(self) -> bool:
        return self.parts is not None and self.parts.supervisor is not None

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def restart_group(self, group: int, on_progress: StartCallback | None = None) -> None:
        """Start the shards of an expert-parallel group anew; they serve once they hold the live version.

        Raises:
            EngineDead: They did not start.
            SyncRefused: They could not be brought to the live version, and stay out.
        """
        assert self.parts is not None, "a service that was started has its parts"
        engine = self.parts.engine
        ranks = range(group * engine.num_shards, (group + 1) * engine.num_shards)
        for rank in ranks:
            place = self.infos[rank].place
            if place is not None:  # a process that is stopped does not hear Ray
                kill_process(place)
            ray.kill(self.shards[rank])
            self.shards[rank] = self.parts.make_shard(rank, self.placement)
        try:
            infos = _start_shards([self.shards[rank] for rank in ranks], engine, on_progress)
            ray.get(self.controller.rejoin.remote({rank: self.shards[rank] for rank in ranks}))
        except BaseException as error:
            raise client_error(error) from (error.__cause__ if isinstance(error, LongrollError) else None)
        self.infos = [*self.infos[: ranks.start], *infos, *self.infos[ranks.stop :]]

    def replace_controller(self) -> None:
        """Make a new controller in place of one that died or hangs; clients find it by its name.

        The groups of shards that all serve the newest version go on with it; others must be restarted. Shards that
        were being restarted when it died may serve an older one than was live: it is not gone back to.

        Raises:
            JournalError: The journal cannot be opened.
        """
        if self._controller_place is not None:
            kill_process(self._controller_place)
        ray.kill(self.controller)
        versions = _live_versions(self.shards)
        live = max([self.newest_version, *versions.values()])
        _settle([self.shards[rank].abort_all.remote() for rank in versions], "a shard")  # nobody waits for it
        self.start_controller(live)
        lost = [info.rank for info in self.infos if versions.get(info.rank) != live]
        ray.get(self.controller.lose.remote(lost, "it does not serve the newest version, or gave no answer"))

    def start_controller(self, version: int | None = None) -> None:
        """Make the controller, for shards that serve this version; None = the model directory's.

        Raises:
            JournalError: The journal cannot be opened.
        """
        assert self.parts is not None, "a service that was started has its parts"
        parts = self.parts
        actor = ray.remote(Controller).options(
            name=CONTROLLER_NAME, namespace=self.namespace, num_cpus=0, max_concurrency=CONTROLLER_CONCURRENCY
        )
        self.controller = actor.remote(
            parts.scheduler,
            parts.sync,
            parts.model,
            self.shards,
            self.infos,
            self.plans,
            parts.initial_version if version is None else version,
            parts.journal,
            parts.supervisor,
        )
        ray.get(self.controller.start.remote())
        self._controller_place = ray.get(self.controller.place.remote())
        self.note_version()

    def note_version(self, timeout_s: float | None = None) -> None:
        """Ask the controller for the live version. Raises as ray.get does."""
        live: int = ray.get(self.controller.live_version.remote(), timeout=timeout_s)
        self.newest_version = max(self.newest_version, live)

    def stop(self) -> None:
        """Shut down controller and shards, then kill their actors; may be called again."""
        if not ray.is_initialized():
            return
        if self.controller is not None:
            _settle([self.controller.shutdown.remote()], "the controller")
            ray.kill(self.controller)
        _settle([shard.shutdown.remote() for shard in self.shards], "a shard")
        for shard in self.shards:
            ray.kill(shard)
        if self.placement is not None:
            remove_placement_group(self.placement)
        self.controller, self.shards, self.placement = None, [], None


def start_service(
    model: ModelConfig,
    engine: EngineConfig,
    scheduler: SchedulerConfig,
    sync: SyncConfig,
    cluster: ClusterConfig,
    *,
    on_progress: StartCallback | None = None,
    initial_version: int = 0,
    shard_class: type | None = None,
    journal: JournalConfig | None = None,
    supervisor: SupervisorConfig | None = None,
) -> Service:
    """Start all shards of all expert-parallel groups and their controller.

    Args:
        on_progress: Told how many shards are ready.
        initial_version: Version of the weights in the model directory.
        shard_class: Class of the shard actors; None = actors.shard.Shard.
        journal: Where rollouts are made durable; None = nowhere.
        supervisor: What the service's supervisor will do (see actors.supervisor); None: there will be none.

    Raises:
        InvalidRequest: The model directory or the configuration is wrong.
        LongrollError: The cluster lacks resources, or another service has the same name.
        EngineDead: A shard did not start, with its reason.
    """
    plans = served_plans(model, engine)
    num_stale = sweep()
    if num_stale:
        logger.info("removed %d shared-memory segments of writers that are gone", num_stale)
    ensure_ray(cluster)
    _check_name_is_free(cluster.namespace)
    check_resources(engine, cluster)
    service = Service(namespace=cluster.namespace, bucket_bytes=sync.bucket_bytes, plans=plans)
    try:
        service.parts = ShardParts(
            model=model,
            engine=engine,
            scheduler=scheduler,
            sync=sync,
            cluster=cluster,
            journal=journal or JournalConfig(),
            supervisor=supervisor,
            initial_version=initial_version,
            shard_class=shard_class,
        )
        if cluster.num_gpus_per_node:
            service.placement = _reserve(engine, cluster)
        for rank in range(engine.num_all_shards):
            service.shards.append(service.parts.make_shard(rank, service.placement))
        service.infos = _start_shards(service.shards, engine, on_progress)
        service.start_controller()
    except BaseException as error:
        service.stop()
        raise client_error(error) from (error.__cause__ if isinstance(error, LongrollError) else None)
    return service


def served_plans(model: ModelConfig, engine: EngineConfig) -> dict[str, TensorPlan]:
    """How every tensor of the model directory is served by these engines.

    Raises:
        InvalidRequest: The directory, the group size or the dtype is wrong.
    """
    int4 = engine.int4 if engine.quantization == "int4" else None
    return plan_tensors(checkpoint_specs(model.path, engine.dtype or model.dtype).values(), int4)


def connect(namespace: str) -> RolloutClient:
    """A client of the service that runs in a namespace of the Ray cluster this process has joined.

    Raises:
        ServiceLost: If there is none.
    """
    try:
        return RolloutClient(ray.get_actor(CONTROLLER_NAME, namespace=namespace))
    except ValueError:
        raise ServiceLost(f"rollout service: got none in namespace {namespace!r}, expected a running one") from None


def ensure_ray(cluster: ClusterConfig) -> None:
    """Join the cluster of the configuration, that of the job, or start a local one."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_worker_niceness", "0")  # a local cluster's workers would run at nice 15
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    options = {"namespace": cluster.namespace, "log_to_driver": True}
    if address is None:
        ray.init(address="local", include_dashboard=cluster.dashboard, **options)
    else:
        ray.init(address=address, **options)


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


def _check_name_is_free(namespace: str) -> None:
    try:
        ray.get_actor(CONTROLLER_NAME, namespace=namespace)
    except ValueError:
        return
    raise LongrollError(
        f"cluster.namespace: got {namespace!r}, in which a service is running already, expected one of its own"
    )


def _reserve(engine: EngineConfig, cluster: ClusterConfig) -> Any:
    """One bundle for each shard, so that its GPUs lie on one node."""
    bundle = {"GPU": float(engine.tensor_parallel_size), "CPU": cluster.num_cpus_per_shard}
    group = placement_group([bundle] * engine.num_all_shards, strategy=cluster.placement_strategy)
    if not group.wait(timeout_seconds=engine.start_timeout_s):
        remove_placement_group(group)
        free = ray.available_resources()
        raise LongrollError(
            f"cluster: got {free.get('GPU', 0):g} free GPUs and {free.get('CPU', 0):g} free CPUs, expected room for "
            f"{engine.num_all_shards} bundles of {bundle} within {engine.start_timeout_s:g} s"
        )
    return group


def _start_shards(shards: list[Any], engine: EngineConfig, on_progress: StartCallback | None) -> list[ShardInfo]:
    """Start all shards together; returns what they say, by rank. The first of each group says where it meets."""
    timeout_s = engine.start_timeout_s
    deadline = time.monotonic() + timeout_s
    asked = [shard.rendezvous.remote() for shard in shards[:: engine.num_shards]]
    meetings: list[Rendezvous] = ray.get(asked, timeout=timeout_s)
    waiting = [shard.start.remote(meetings[rank // engine.num_shards]) for rank, shard in enumerate(shards)]
    place = {reference: rank for rank, reference in enumerate(waiting)}
    infos: dict[int, ShardInfo] = {}
    while waiting:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            ranks = sorted(place[reference] for reference in waiting)
            raise EngineDead(f"shards {ranks}: not ready within start_timeout_s = {timeout_s:g} s")
        ready, waiting = ray.wait(waiting, timeout=min(1.0, remaining_s))
        for reference in ready:
            infos[place[reference]] = ray.get(reference)
        if on_progress is not None and ready:
            on_progress(len(infos), len(shards))
    return [infos[rank] for rank in range(len(shards))]


def _live_versions(shards: list[Any]) -> dict[int, int]:
    """Live version of every shard that answers, by rank."""
    waiting = {shard.live_version.remote(): rank for rank, shard in enumerate(shards)}
    ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=ANSWER_TIMEOUT_S)
    versions = {}
    for reference in ready:
        try:
            versions[waiting[reference]] = ray.get(reference)
        except Exception as error:  # whatever it is, this shard does not serve
            logger.warning("shard %d: %s", waiting[reference], client_error(error))
    return versions


def _settle(references: list[Any], what: str) -> None:
    """Wait for calls to end; their failures are logged, as everything is killed next."""
    if not references:
        return
    ready, late = ray.wait(references, num_returns=len(references), timeout=SHUTDOWN_TIMEOUT_S)
    if late:
        logger.warning("%s did not shut down within %g s", what, SHUTDOWN_TIMEOUT_S)
    for reference in ready:
        try:
            ray.get(reference)
        except Exception as error:  # it may be dead, which is what is wanted
            logger.warning("%s failed to shut down: %s", what, client_error(error))
