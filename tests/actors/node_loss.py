"""A cluster of three raylets loses one with a shard on it, and gets another later. Run by test_fleet, by itself.

Prints what happened, as a line of JSON.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

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
from rollout.fleet import ServiceStats
from rollout.handles import RolloutHandle
from rollout.journal.opening import open_reader
from rollout.types import SamplingParams, Status, Trajectory
from tests.actors.fakes import HOLD, VOCAB_SIZE
from tests.actors.fleet_shard import FleetShard

SAMPLING = SamplingParams(max_tokens=24)
SUPERVISOR = SupervisorConfig(check_every_s=0.2, hang_timeout_s=30.0, retry_s=1.0)
PATIENCE_S = 120.0
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


def until(client: RolloutClient, wanted: dict[int, int]) -> ServiceStats:
    """Wait until these shards run so many chunks each, and no others serve."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        stats = client.stats()
        running = {shard.rank: shard.num_running for shard in stats.shards}  # of those that answered
        if running == wanted and stats.num_running == sum(wanted.values()):
            return stats
        assert time.monotonic() < deadline, f"got {stats}, expected {wanted}"
        time.sleep(0.05)


def read(client: RolloutClient, handle: RolloutHandle, into: list[Trajectory]) -> None:
    """As a trainer does: whoever reads asks a new controller again, if the old one was on that node."""
    into.extend(one for group in client.groups(handle) for one in group.trajectories)


def lose_a_node(cluster: Cluster, service: Service, journal: JournalConfig) -> dict[str, object]:
    """Everything, while 16 trajectories are generated."""
    client, other = service.client, service.client  # one for each thread
    with Supervisor(service, SUPERVISOR) as supervisor:
        handle = client.submit(
            [(HOLD, 7)] * 4, 4, SAMPLING, group_ids=[f"lost/{i}" for i in range(4)], run_id="node-loss"
        )
        trajectories: list[Trajectory] = []
        reading = threading.Thread(target=read, args=(client, handle, trajectories))
        reading.start()
        until(other, {0: 4, 1: 4})
        before = service.infos[1].place
        assert before is not None and service.infos[0].place is not None
        assert before.node_id != service.infos[0].place.node_id, "one shard a node"
        (node,) = [one for one in cluster.worker_nodes if one.node_id == before.node_id]
        cluster.remove_node(node, allow_graceful=False)
        without = until(other, {0: 4})
        cluster.add_node(**NODE)
        stats = until(other, {0: 4, 1: 4})
        after = service.infos[1].place
        ray.get([shard.go_on.remote() for shard in service.shards])
        reading.join()
        num_restarts = supervisor.num_group_restarts
    expected = [i % VOCAB_SIZE for i in range(2, 2 + SAMPLING.max_tokens)]
    with open_reader(journal) as reader:
        durable = [one for group in reader.load(reader.run_keys("node-loss")) for one in group.trajectories]
    return {
        "num_trajectories": len(trajectories),
        "num_whole": sum(t.status is Status.TRUNCATED and t.token_ids == expected for t in trajectories),
        "num_durable": sum(one.num_tokens for one in durable),
        "num_running_without": without.num_running,
        "num_group_deaths": sum(stats.num_group_deaths.values()),
        "num_retries": stats.num_retries,
        "num_controller_restarts": stats.supervision.num_controller_restarts,
        "num_failed": stats.num_failed,
        "num_group_restarts": num_restarts,
        "node_before": before.node_id,
        "node_after": after.node_id if after is not None else None,
    }


def main(model: str, file: str) -> None:
    logging.basicConfig(level=logging.WARNING)
    journal = JournalConfig(dsn=f"sqlite:///{Path(file)}")
    # The head has no CPUs: shards lie on the other nodes, and the controller, which takes none, on any.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20})
    try:
        for _ in range(2):
            cluster.add_node(**NODE)
        cluster.connect(namespace="node-loss")
        with start_service(
            ModelConfig(path=model),
            EngineConfig(num_shards=1, num_groups=2),
            SchedulerConfig(policy="divided", chunk_tokens=4, max_running_per_shard=4, num_reward_workers=1),
            SyncConfig(),
            ClusterConfig(namespace="node-loss", num_cpus_per_shard=1.0),
            shard_class=FleetShard,
            journal=journal,
            supervisor=SUPERVISOR,
        ) as service:
            told = lose_a_node(cluster, service, journal)
        print(json.dumps(told), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
