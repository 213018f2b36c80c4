"""Starting and stopping the service: placement, shards, controller.

Owns everything it starts and stops all of it when anything fails. Knows nothing of requests.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group

from actors.controller import Controller
from actors.process import kill_process
from actors.served_encoding import ServedEncoding
from actors.shard_parts import ShardParts, StartCallback, check_resources, reserve, start_shards
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
from rollout.errors import LongrollError, ServiceLost
from rollout.fleet import CONTROLLER_NAME, Health, Place, ShardInfo
from rollout.remote import client_error
from rollout.sync.encoding import TensorPlan
from rollout.sync.segments import sweep

logger = logging.getLogger(__name__)
CONTROLLER_CONCURRENCY = 4096  # every long poll holds one place
SHUTDOWN_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 20.0


@dataclass(kw_only=True)
class Service:
    """A running service; `stop` ends every process of it. Usable as a context manager."""

    namespace: str
    shards: list[Any] = field(default_factory=list)
    infos: list[ShardInfo] = field(default_factory=list)
    controller: Any = None
    placement: Any = None  # of the groups that were there at the start
    added_placements: dict[int, Any] = field(default_factory=dict)  # of each group that was added
    parts: ShardParts | None = None
    plans: dict[str, TensorPlan] = field(default_factory=dict)
    bucket_bytes: int = SyncConfig().bucket_bytes
    newest_version: int = 0  # that is known to have been live
    health: Health | None = None  # as the controller last told it
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

    @property
    def num_groups(self) -> int:
        """Expert-parallel groups that were started and not stopped."""
        assert self.parts is not None, "a service that was started has its parts"
        return len(self.shards) // self.parts.engine.num_shards

    def add_group(self, stop: threading.Event | None = None) -> None:
        """Start one more expert-parallel group; it serves once it holds the live version. `stop` ends the wait for it.

        Raises:
            LongrollError: There is no room for it.
            EngineDead: It did not start.
            SyncRefused: It could not be brought to the live version, and was stopped again.
        """
        assert self.parts is not None, "a service that was started has its parts"
        engine, group, shards = self.parts.engine, self.num_groups, []
        ranks = self._ranks_of(group)
        try:
            if self.parts.cluster.num_gpus_per_node and group >= engine.num_groups:
                self.added_placements[group] = reserve(engine, self.parts.cluster, engine.num_shards)
            for rank in ranks:
                shards.append(self._make_shard(rank))
            infos = start_shards(shards, engine, None, stop)
            ray.get(self.controller.join.remote(dict(zip(ranks, shards, strict=True)), infos))
        except BaseException as error:
            for shard in shards:
                ray.kill(shard)
            self._free_placement(group)
            raise client_error(error) from (error.__cause__ if isinstance(error, LongrollError) else None)
        self.shards, self.infos = [*self.shards, *shards], [*self.infos, *infos]

    def remove_group(self, group: int) -> bool:
        """Stop the last group, which the controller has named as surplus. False if it is needed after all."""
        assert group == self.num_groups - 1, "ranks are numbered without gaps"
        if not ray.get(self.controller.leave.remote(group)):
            return False
        ranks = self._ranks_of(group)
        gone = self.shards[ranks.start :]
        self.shards, self.infos = self.shards[: ranks.start], self.infos[: ranks.start]
        _settle([shard.shutdown.remote() for shard in gone], "a shard")
        for shard in gone:
            ray.kill(shard)
        self._free_placement(group)
        return True

    def _ranks_of(self, group: int) -> range:
        assert self.parts is not None, "a service that was started has its parts"
        return range(group * self.parts.engine.num_shards, (group + 1) * self.parts.engine.num_shards)

    def _make_shard(self, rank: int) -> Any:
        assert self.parts is not None, "a service that was started has its parts"
        group, bundle = divmod(rank, self.parts.engine.num_shards)
        if group in self.added_placements:
            return self.parts.make_shard(rank, self.added_placements[group], bundle)
        return self.parts.make_shard(rank, self.placement, rank)

    def _free_placement(self, group: int) -> None:
        placement = self.added_placements.pop(group, None)
        if placement is not None:
            remove_placement_group(placement)

    def restart_group(self, group: int, stop: threading.Event | None = None) -> None:
        """Start the shards of an expert-parallel group anew; they serve once they hold the live version.

        `stop` ends the wait for them.

        Raises:
            EngineDead: They did not start.
            SyncRefused: They could not be brought to the live version, and stay out.
        """
        assert self.parts is not None, "a service that was started has its parts"
        engine = self.parts.engine
        ranks = self._ranks_of(group)
        for rank in ranks:
            place = self.infos[rank].place
            if place is not None:  # a process that is stopped does not hear Ray
                kill_process(place)
            ray.kill(self.shards[rank])
            self.shards[rank] = self._make_shard(rank)
        try:
            infos = start_shards([self.shards[rank] for rank in ranks], engine, None, stop)
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
        if self.health is not None:  # what was asked of the one before
            ray.get(self.controller.restore_fleet.remote(self.health))

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
        for placement in [self.placement, *self.added_placements.values()]:
            if placement is not None:
                remove_placement_group(placement)
        self.controller, self.shards, self.placement, self.added_placements = None, [], None, {}


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
            service.placement = reserve(engine, cluster, engine.num_all_shards)
        for rank in range(engine.num_all_shards):
            service.shards.append(service._make_shard(rank))
        service.infos = start_shards(service.shards, engine, on_progress)
        service.start_controller()
    except BaseException as error:
        service.stop()
        raise client_error(error) from (error.__cause__ if isinstance(error, LongrollError) else None)
    return service


def served_plans(model: ModelConfig, engine: EngineConfig) -> dict[str, TensorPlan]:
    """How every tensor of the model directory, and of a draft that travels with it, is served by these engines.

    Raises:
        InvalidRequest: The directory, the group size, the dtype or the draft's directory is wrong.
    """
    encoding = ServedEncoding.of(model, engine)
    return encoding.plans(model.path) | encoding.draft_plans()


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


def _check_name_is_free(namespace: str) -> None:
    try:
        ray.get_actor(CONTROLLER_NAME, namespace=namespace)
    except ValueError:
        return
    raise LongrollError(
        f"cluster.namespace: got {namespace!r}, in which a service is running already, expected one of its own"
    )


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
