"""What dies or hangs in the middle of a rollout comes back, on real engines, and nobody's tokens change."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
import torch

from actors.service import Service, start_service
from actors.supervisor import Supervisor
from launch.near_ties import compare, near_tie
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
from rollout.errors import ServiceLost
from rollout.handles import RolloutHandle
from rollout.journal.opening import open_reader
from rollout.types import Prompt, SamplingParams, Status, Trajectory
from tests.actors.fakes import FakeShard

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
CHUNK_TOKENS = 8
NUM_TOKENS = 120
N = 4
GROUP_IDS = ("supervised/0", "supervised/1", "supervised/2", "supervised/3")
NUM_TRAJECTORIES = N * len(GROUP_IDS)
SAMPLING = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
DURABLE_BEFORE_DEATH = NUM_TRAJECTORIES * 3 * CHUNK_TOKENS
HANG_TIMEOUT_S = 10.0  # hundreds of steps
Tokens = dict[str, Trajectory]


class LoneShard(FakeShard):
    """A scripted shard that a successor of its controller can take over."""

    async def abort_all(self):
        for trajectory_id in list(self.held):
            self._end(trajectory_id, False)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A supervised service, its journal, and what it generates when nobody disturbs it."""

    service: Service
    supervisor: Supervisor
    journal: JournalConfig
    undisturbed: Tokens


def submit(client: RolloutClient, run_id: str | None) -> RolloutHandle:
    draw = random.Random(11)
    prompts = [
        Prompt(token_ids=tuple(draw.randrange(3, 500) for _ in range(draw.randrange(20, 60))), prompt_id=group_id)
        for group_id in GROUP_IDS
    ]
    return client.submit(prompts, N, SAMPLING, run_seed=5, group_ids=GROUP_IDS, run_id=run_id)


def read(client: RolloutClient, handle: RolloutHandle) -> Tokens:
    groups = list(client.groups(handle))
    assert sorted(group.group_id for group in groups) == sorted(GROUP_IDS), "each group once"
    return {one.trajectory_id: one for group in groups for one in group.trajectories}


@pytest.fixture(scope="module")
def world(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    journal = JournalConfig(dsn=f"sqlite:///{tmp_path_factory.mktemp('supervised') / 'journal.sqlite'}")
    config = SupervisorConfig(check_every_s=0.5, hang_timeout_s=HANG_TIMEOUT_S, retry_s=1.0)
    with (
        start_service(
            ModelConfig(path=str(TINY)),
            EngineConfig(num_shards=2),
            SchedulerConfig(policy="divided", chunk_tokens=CHUNK_TOKENS),
            SyncConfig(),
            ClusterConfig(namespace="tests-supervision"),
            journal=journal,
            supervisor=config,
        ) as service,
        Supervisor(service, config) as supervisor,
    ):
        client = service.client
        undisturbed = read(client, submit(client, None))
        yield World(service=service, supervisor=supervisor, journal=journal, undisturbed=undisturbed)


def begun(world: World, client: RolloutClient, run_id: str) -> RolloutHandle:
    """A submission that is well under way."""
    handle = submit(client, run_id)
    while client.progress(handle).num_tokens < DURABLE_BEFORE_DEATH:
        time.sleep(0.005)
    return handle


def check_whole(world: World, run_id: str, got: Tokens) -> None:
    """Nothing is lost or doubled, in the client's hands and in the journal; tokens differ at near ties at most."""
    assert got.keys() == world.undisturbed.keys()
    differences = []
    for name, trajectory in got.items():
        other = world.undisturbed[name]
        assert trajectory.status is Status.TRUNCATED and trajectory.error is None
        assert len(trajectory.token_ids) == len(trajectory.logprobs) == NUM_TOKENS
        difference = compare(
            (trajectory.token_ids, trajectory.logprobs),
            (other.token_ids, other.logprobs),
            seed=trajectory.seed,
            num_prompt_tokens=len(trajectory.prompt_token_ids),
            temperature=SAMPLING.temperature,
            vocab_size=world.service.infos[0].vocab_size,
            within=near_tie("float32", SAMPLING.temperature),
        )
        assert difference is None or difference.is_near_tie, f"{name}: {difference}"
        differences += [difference] if difference is not None else []
    assert len(differences) <= NUM_TRAJECTORIES // 8, [str(one) for one in differences]
    with open_reader(world.journal) as reader:
        durable = [one for group in reader.load(reader.run_keys(run_id)) for one in group.trajectories]
    assert {one.outline.trajectory_id: one.to_trajectory().token_ids for one in durable} == {
        name: trajectory.token_ids for name, trajectory in got.items()
    }


@pytest.mark.engine
@pytest.mark.slow
def test_a_controller_that_is_killed_is_replaced(world: World) -> None:
    client, before = world.service.client, world.supervisor.num_controller_restarts
    handle = begun(world, client, "killed")
    os.kill(ray.get(world.service.controller.place.remote()).pid, signal.SIGKILL)
    check_whole(world, "killed", read(client, handle))
    assert world.supervisor.num_controller_restarts == before + 1
    assert world.supervisor.num_group_restarts == 0, "the engines went on"
    stats = client.stats()
    assert stats.num_tokens_restored > 0  # fewer than in the records: the last chunk of each was being written
    assert stats.num_tokens_generated == NUM_TRAJECTORIES * NUM_TOKENS - stats.num_tokens_restored


@pytest.mark.engine
@pytest.mark.slow
def test_a_controller_that_hangs_is_replaced(world: World) -> None:
    client, before = world.service.client, world.supervisor.num_controller_restarts
    handle = begun(world, client, "stopped")
    stopped = psutil.Process(ray.get(world.service.controller.place.remote()).pid)
    stopped.suspend()
    check_whole(world, "stopped", read(client, handle))
    assert world.supervisor.num_controller_restarts == before + 1
    assert not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE


@pytest.mark.engine
@pytest.mark.slow
def test_an_engine_that_hangs_is_started_again(world: World) -> None:
    client, info = world.service.client, world.service.infos[1]
    assert info.place is not None
    below = psutil.Process(info.place.pid).children(recursive=True)
    (engine,) = [one for one in below if one.cmdline()[0].startswith("VLLM::EngineCore")]
    num_retries, began = client.stats().num_retries, time.monotonic()
    handle = begun(world, client, "hanging")
    engine.suspend()
    check_whole(world, "hanging", read(client, handle))
    assert time.monotonic() - began > HANG_TIMEOUT_S
    assert world.supervisor.num_group_restarts == 1 and world.supervisor.num_failed_restarts == 0
    assert client.stats().num_retries > num_retries, "its chunks were generated again"
    assert world.service.infos[1].place != info.place
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE


@pytest.mark.ray
def test_a_new_controller_does_not_go_back_to_what_restarted_shards_serve(ray_cluster: None, tmp_path: Path) -> None:
    """The controller died while the only group was being started anew, with the weights of the model directory."""
    with start_service(
        ModelConfig(path=str(TINY)),
        EngineConfig(num_shards=1),
        SchedulerConfig(num_reward_workers=1),
        SyncConfig(),
        ClusterConfig(namespace="tests-lone"),
        shard_class=LoneShard,
        supervisor=SupervisorConfig(),
    ) as service:
        plans = service.plans
        service.client.publish(1, {name: torch.zeros(plan.shape) for name, plan in plans.items()})
        service.note_version()
        ray.kill(service.controller)
        with pytest.raises(ServiceLost):
            service.restart_group(0)
        service.replace_controller()
        assert service.client.stats().live_version == 1
        assert ray.get(service.controller.health.remote()).dead_groups == (0,)
