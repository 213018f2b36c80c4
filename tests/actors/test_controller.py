"""The controller with scripted shards: order of events, isolation of faults, delivery."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from actors.service import connect, start_service
from rollout.async_client import AsyncRolloutClient
from rollout.config import ClusterConfig, EngineConfig, InFlight, ModelConfig, SchedulerConfig, SyncConfig
from rollout.errors import EngineDead, InvalidRequest, LongrollError, ServiceLost, SyncRefused, UnknownHandle
from rollout.sync.outgoing import OutgoingVersion
from rollout.types import Prompt, SamplingParams, Status
from tests.actors import fakes

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
SAMPLING = SamplingParams(max_tokens=4)
WEIGHTS = {"a": torch.ones(4), "b": torch.ones(2, 3)}


def write_model(path: Path) -> str:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"vocab_size": fakes.VOCAB_SIZE}))
    save_file({"a": torch.zeros(4), "b": torch.zeros(2, 3)}, path / "model.safetensors")
    words = {f"w{i}": i for i in range(fakes.VOCAB_SIZE)}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(path / "tokenizer.json"))
    return str(path)


def start(tmp_path, namespace, *, num_shards=2, fake="ok", sync=None, **scheduler):
    return start_service(
        ModelConfig(path=write_model(tmp_path / "model")),
        EngineConfig(num_shards=num_shards, vllm={"fake": fake}),
        SchedulerConfig(**{"num_reward_workers": 1, "reward_timeout_s": 1.0} | scheduler),
        sync or SyncConfig(),
        ClusterConfig(namespace=namespace),
        shard_class=fakes.FakeShard,
    )


@pytest.fixture(scope="module")
def service(ray_cluster, tmp_path_factory):
    with start(tmp_path_factory.mktemp("shared"), "shared") as service:
        yield service


def statuses(groups):
    return [t.status for g in groups for t in g.trajectories]


def wait_until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition not reached"
        time.sleep(0.02)


def test_rollout_returns_groups_in_order_with_rewards(service):
    seen = []
    groups = connect("shared").rollout(
        [[1, 7], [1, 8], [1, 9]],
        2,
        SAMPLING,
        reward="tests.actors.fakes:words",
        progress=lambda done, total, tokens: seen.append((done, total, tokens)),
    )
    assert [g.prompt.token_ids for g in groups] == [(1, 7), (1, 8), (1, 9)]
    assert seen[-1] == (3, 3, 24)
    for trajectory in (t for g in groups for t in g.trajectories):
        assert (trajectory.status, trajectory.reward) == (Status.TRUNCATED, 4.0)
        assert trajectory.metadata["score"] == {"num_tokens": 4.0}


def test_async_client_and_over_sampling(service):
    async def over_sample():
        client = AsyncRolloutClient(service.controller)
        handle = await client.submit([[1], [2], [2]], 2, SAMPLING)
        received = []
        async for group in client.groups(handle):
            received.append(group)
            if len(received) == 1:
                assert (await client.progress(handle)).num_pending == 4
                await client.abort(handle)
        return handle.in_order(received)

    groups = asyncio.run(over_sample())
    assert statuses(groups) == [Status.TRUNCATED] * 2 + [Status.ABORTED] * 4


def test_faults_stay_with_their_trajectory(service):
    before = service.client.stats()
    groups = service.client.rollout([[fakes.RAISE], [fakes.ANSWER], [fakes.MALFORMED]], 1, SAMPLING)
    assert statuses(groups) == [Status.FAILED, Status.TRUNCATED, Status.FAILED]
    assert "this request is cursed" in groups[0].trajectories[0].error
    assert "log-probabilities" in groups[2].trajectories[0].error
    after = service.client.stats()
    assert after.num_failed["engine_error"] - before.num_failed.get("engine_error", 0) == 2
    assert len(after.shards) == 2 and after.num_internal_errors == 0


@pytest.mark.parametrize("reward, reason", [("boom", "KeyError"), ("not_a_number", "nan"), ("die", "process died")])
def test_a_failing_reward_fails_the_trajectory_with_the_reason(service, reward, reason):
    [group] = service.client.rollout([[1]], 1, SAMPLING, reward=f"tests.actors.fakes:{reward}")
    [trajectory] = group.trajectories
    assert (trajectory.status, trajectory.reward) == (Status.FAILED, None)
    assert reason in trajectory.error and len(trajectory.token_ids) == 4


def test_a_hanging_reward_is_killed_and_the_others_are_scored(service):
    prompts = [Prompt(token_ids=(1,), prompt_id=str(i), metadata={"hang": i == 0}) for i in range(3)]
    groups = service.client.rollout(prompts, 1, SAMPLING, reward="tests.actors.fakes:hang_if_told")
    assert statuses(groups) == [Status.FAILED, Status.TRUNCATED, Status.TRUNCATED]
    assert "timed out after 1 s" in groups[0].trajectories[0].error
    assert service.client.stats().num_failed["reward_timeout"] == 1


def test_bad_requests_arrive_in_their_own_class_and_lose_nothing_else(service):
    client = service.client
    held = client.submit([[fakes.HOLD]], 1, SAMPLING)
    for prompts, options, match in [
        ([[]], {}, "at least one token"),
        ([[1, 50]], {}, r"\[0, 50\)"),
        ([[1] * 61], {}, "max_model_len = 64"),
        ([], {}, "at least one prompt"),
        ([[1]], {"n": 0}, "n_samples_per_prompt"),
        ([[1]], {"reward": "unknown"}, "one of none, reasoning_gym"),
        ([[1]], {"reward": "tests.actors.fakes:missing"}, "missing"),
        ([[1]], {"run_seed": -1}, "run_seed"),
    ]:
        options = dict(options)
        with pytest.raises(InvalidRequest, match=match) as info:
            client.submit(prompts, options.pop("n", 1), SAMPLING, **options)
        assert type(info.value) is InvalidRequest and "Traceback" not in str(info.value)
    wait_until(lambda: client.stats().num_running == 1)
    ray.get([shard.release.remote() for shard in service.shards])
    assert statuses(client.groups(held)) == [Status.TRUNCATED]
    with pytest.raises(UnknownHandle):
        next(client.groups(held))


def test_groups_are_delivered_again_until_acknowledged(service):
    client = service.client
    handle = client.submit([[1], [1], [1]], 1, SAMPLING)
    wait_until(lambda: client.progress(handle).num_groups_finished == 3)
    deliveries = [ray.get(service.controller.next_groups.remote(handle.handle_id, 2, 5.0)) for _ in range(2)]
    lost, again = ([g.group_id for g in delivery.groups] for delivery in deliveries)  # as if the first reply was lost
    assert lost == again and len(set(again)) == 2
    reader = client.groups(handle)
    first = next(reader).group_id
    reader.close()
    rest = [g.group_id for g in client.groups(handle)]
    assert sorted([first, *rest]) == sorted(handle.group_ids)


def test_publication_closes_the_gate_and_restarts_aborted_chunks(tmp_path):
    sync = SyncConfig(in_flight=InFlight.ABORT, bucket_bytes=16)
    with start(tmp_path, "abort", sync=sync) as service:
        client = service.client
        handle = client.submit([[fakes.HOLD], [fakes.HOLD]], 1, SAMPLING)
        wait_until(lambda: all(s.num_running == 1 for s in client.stats().shards))
        report = client.publish(7, WEIGHTS)
        assert (report.version, report.num_tensors, client.stats().live_version) == (7, 2, 7)
        wait_until(lambda: all(s.num_running == 1 for s in client.stats().shards))
        for shard in service.shards:
            events = ray.get(shard.take_events.remote())
            assert events == [
                *("generate", "begin", "stage", "stage", "verify", "pause abort", "arm", "flip 7", "resume", "generate")
            ]
        ray.get([shard.release.remote() for shard in service.shards])
        for group in client.groups(handle):
            spans = group.trajectories[0].weight_versions
            assert [(s.version, s.start, s.stop) for s in spans] == [(0, 0, 1), (7, 1, 4)]
        check_refusals(client)


def check_refusals(client):
    for version, weights, match in [
        (7, WEIGHTS, "above the live version 7"),
        (8, {"a": WEIGHTS["a"]}, "b: missing"),
        (8, WEIGHTS | {"a": torch.ones(5)}, r"got shape \(5,\)"),
        (8, WEIGHTS | {"c": torch.ones(1)}, "c: not a tensor of the model"),
    ]:
        with pytest.raises(SyncRefused, match=match):
            client.publish(version, weights)
    plans = client._call("served_plans")
    outgoing = OutgoingVersion(8, WEIGHTS, plans, 2**20)
    [ref] = outgoing.buckets(client.begin_publish(8, None, outgoing.pieces))
    wrong = dataclasses.replace(ref.entries[0], digest="0" * 32)
    with pytest.raises(SyncRefused, match="got digest"):
        client.publish_bucket(dataclasses.replace(ref, entries=(wrong, *ref.entries[1:])))
    stats = client.stats()
    assert (stats.live_version, stats.num_syncs, stats.num_syncs_refused) == (7, 1, 5)


def test_death_of_shards_retries_elsewhere_then_refuses(tmp_path):
    with start(tmp_path, "death") as service:
        client = service.client
        groups = client.rollout([[fakes.DIE], [fakes.ANSWER], [fakes.DIE]], 1, SAMPLING)
        assert statuses(groups) == [Status.TRUNCATED] * 3
        assert client.stats().num_retries >= 1
        handle = client.submit([[fakes.HOLD]], 1, SAMPLING)
        wait_until(lambda: client.stats().num_running == 1)
        ray.kill(service.shards[1])
        [group] = client.groups(handle)
        assert "no live engine" in group.trajectories[0].error or "lost" in group.trajectories[0].error
        with pytest.raises(EngineDead, match="no live engine"):
            client.submit([[fakes.ANSWER]], 1, SAMPLING)
    with pytest.raises(ServiceLost):
        connect("death")


def test_a_silent_client_loses_its_work_and_nobody_elses(tmp_path):
    with start(tmp_path, "silent", num_shards=1, client_timeout_s=1.0) as service:
        silent, alive = service.client, service.client
        silent.submit([[fakes.HOLD]], 1, SAMPLING)
        handle = alive.submit([[fakes.HOLD]], 1, SAMPLING)
        wait_until(lambda: alive.progress(handle) and alive.stats().num_aborted == 1)
        wait_until(lambda: alive.progress(handle) and alive.stats().num_groups_expired == 1)
        ray.get([shard.release.remote() for shard in service.shards])
        assert statuses(alive.groups(handle)) == [Status.TRUNCATED]


def test_start_failures_stop_everything(tmp_path, service):
    with pytest.raises(EngineDead, match="no memory"):
        start(tmp_path, "broken", num_shards=1, fake="broken")
    with pytest.raises(LongrollError, match="running already"):
        start(tmp_path / "b", "shared")
    with pytest.raises(InvalidRequest, match=r"model\.path"):
        start_service(
            ModelConfig(path=str(tmp_path / "none")),
            EngineConfig(),
            SchedulerConfig(),
            SyncConfig(),
            ClusterConfig(namespace="none"),
        )
    with pytest.raises(LongrollError, match="expected 8 nodes with at least 8 GPUs"):
        start_service(
            ModelConfig(path=write_model(tmp_path / "gpu")),
            EngineConfig(num_shards=64),
            SchedulerConfig(),
            SyncConfig(),
            ClusterConfig(namespace="gpu", num_nodes=8, num_gpus_per_node=8),
        )
