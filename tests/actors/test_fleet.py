"""Groups of shards that are drained, added, stopped and lost with their node while rollouts run. Scripted shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from actors.service import Service, start_service
from actors.supervisor import Supervisor
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
from rollout.errors import InvalidRequest
from rollout.fleet import ServiceStats
from rollout.types import Group, SamplingParams, Status
from tests.actors import fakes
from tests.actors.fleet_shard import FleetShard
from tests.actors.test_controller import WEIGHTS, write_model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
PATIENCE_S = 60.0
SUPERVISOR = SupervisorConfig(check_every_s=0.1, hang_timeout_s=30.0, retry_s=0.5)
SAMPLING = SamplingParams(max_tokens=24)
CHUNK_TOKENS = 4
HOLD = (fakes.HOLD, 7)


@pytest.fixture
def service(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Service]:
    """Two groups of one shard each, supervised, with a journal."""
    name = request.node.name
    with start_service(
        ModelConfig(path=write_model(tmp_path / "model")),
        EngineConfig(num_shards=1, num_groups=2),
        SchedulerConfig(policy="divided", chunk_tokens=CHUNK_TOKENS, max_running_per_shard=4, num_reward_workers=1),
        SyncConfig(),
        ClusterConfig(namespace=name),
        shard_class=FleetShard,
        journal=JournalConfig(dsn=f"sqlite:///{tmp_path / 'journal.sqlite'}"),
        supervisor=SUPERVISOR,
    ) as service:
        yield service


def until(client: RolloutClient, holds: Callable[[ServiceStats], bool]) -> ServiceStats:
    """Poll until something holds."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        stats = client.stats()
        if holds(stats):
            return stats
        assert time.monotonic() < deadline, stats
        time.sleep(0.02)


def running(stats: ServiceStats) -> dict[int, int]:
    return {shard.rank: shard.num_running for shard in stats.shards}


def let_go(service: Service) -> None:
    ray.get([shard.go_on.remote() for shard in service.shards])


def check_whole(groups: list[Group]) -> None:
    """Every token once, in order: a fake's token is its position."""
    for one in (t for group in groups for t in group.trajectories):
        first = len(one.prompt_token_ids)
        assert one.status is Status.TRUNCATED, one.error
        assert one.token_ids == [i % fakes.VOCAB_SIZE for i in range(first, first + SAMPLING.max_tokens)]


def test_a_drained_group_runs_nothing_until_it_may_again(service: Service) -> None:
    client = service.client
    handle = client.submit([HOLD] * 2, 4, SAMPLING)
    until(client, lambda stats: running(stats) == {0: 4, 1: 4})
    client.drain(1)
    assert running(client.stats()) == {0: 4, 1: 0}
    with pytest.raises(InvalidRequest, match="at least one group"):
        client.drain(0)
    with pytest.raises(InvalidRequest, match=r"one of \[0, 1\]"):
        client.drain(2)
    assert client.publish(1, WEIGHTS).ranks_lost == ()
    assert ray.get(service.shards[1].live_version.remote()) == 1, "a drained group gets weights"
    client.undrain(1)
    until(client, lambda stats: running(stats) == {0: 4, 1: 4})
    let_go(service)
    groups = list(client.groups(handle))
    check_whole(groups)
    stats = client.stats()
    assert stats.num_cuts == 4 and stats.num_failed == {} and stats.num_retries == 0
    assert {len(set(t.metadata["shards"])) for group in groups for t in group.trajectories} <= {1, 2}


def test_a_new_controller_knows_what_was_drained(service: Service) -> None:
    client = service.client
    with Supervisor(service, SUPERVISOR) as supervisor:
        client.drain(1)
        until(client, lambda stats: service.health is not None and service.health.drained_groups == (1,))
        ray.kill(service.controller)
        stats = until(client, lambda stats: stats.supervision.num_controller_restarts == 1)
        assert stats.drained_groups == (1,) and stats.num_groups_wanted == 2
        handle = client.submit([HOLD] * 2, 4, SAMPLING)
        until(client, lambda stats: running(stats) == {0: 4, 1: 0})
        let_go(service)
        check_whole(list(client.groups(handle)))
    assert supervisor.num_failed_restarts == 0


def test_a_fleet_grows_and_shrinks_while_rollouts_run(service: Service) -> None:
    client = service.client
    with Supervisor(service, SUPERVISOR) as supervisor:
        handle = client.submit([HOLD] * 4, 4, SAMPLING)
        until(client, lambda stats: running(stats) == {0: 4, 1: 4})
        with pytest.raises(InvalidRequest, match="num_groups"):
            client.resize(0)
        client.resize(3)
        until(client, lambda stats: running(stats) == {0: 4, 1: 4, 2: 4})
        client.publish(1, WEIGHTS)
        assert ray.get([shard.live_version.remote() for shard in service.shards]) == [1, 1, 1]
        client.resize(1)
        until(client, lambda stats: running(stats) == {0: 4} and stats.supervision.num_groups_removed == 2)
        assert client.publish(2, WEIGHTS).ranks_lost == ()
        let_go(service)
        check_whole(list(client.groups(handle)))
    assert service.num_groups == len(service.infos) == len(service.shards) == 1
    assert supervisor.num_groups_added == 1 and supervisor.num_failed_restarts == 0
    assert client.stats().num_group_deaths == {}, "what was asked for is no failure"


def test_a_group_without_the_live_version_does_not_serve(service: Service) -> None:
    client = service.client
    client.publish(1, WEIGHTS)  # a client keeps no full copy for shards that come later
    with Supervisor(service, SUPERVISOR):
        client.resize(3)
        stats = until(client, lambda stats: stats.supervision.num_failed.get("SyncRefused", 0) > 0)
        assert len(stats.shards) == service.num_groups == 2
        client.resize(2)
        handle = client.submit([HOLD] * 2, 4, SAMPLING)
        until(client, lambda stats: running(stats) == {0: 4, 1: 4})
        let_go(service)
        check_whole(list(client.groups(handle)))


def test_a_fleet_that_nobody_supervises_has_a_fixed_size(tmp_path: Path) -> None:
    with start_service(
        ModelConfig(path=write_model(tmp_path / "model")),
        EngineConfig(num_shards=1),
        SchedulerConfig(num_reward_workers=1),
        SyncConfig(),
        ClusterConfig(namespace="fixed"),
        shard_class=FleetShard,
    ) as service:
        with pytest.raises(InvalidRequest, match="supervised"):
            service.client.resize(2)
        assert service.client.stats().num_groups_wanted == 1


def test_the_loss_of_a_node_loses_no_token(tmp_path: Path) -> None:
    """Several raylets need a Ray of their own, and so a process of their own."""
    model = write_model(tmp_path / "model")
    command = [sys.executable, "-m", "tests.actors.node_loss", model, str(tmp_path / "journal.sqlite")]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    num_tokens = 16 * SAMPLING.max_tokens
    assert told["num_whole"] == told["num_trajectories"] == 16 and told["num_durable"] == num_tokens
    assert told["num_running_without"] == 4, "the node that was left ran full"
    assert told["num_group_deaths"] >= 1, "the loss was counted"
    # Its chunks go on elsewhere: under a controller that saw it die, or its successor if it ran there too.
    assert told["num_retries"] >= 4 or told["num_controller_restarts"] == 1
    assert told["num_group_restarts"] == 1, "on the node that came instead"
    assert told["node_before"] != told["node_after"]
    assert told["num_failed"] == {}
