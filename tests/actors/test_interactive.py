"""The controller's calls for completions and for trainers over HTTP, with scripted shards."""

from __future__ import annotations

import time
import uuid

import pytest
import ray

from actors.service import start_service
from rollout.config import ClusterConfig, EngineConfig, JournalConfig, ModelConfig, SchedulerConfig, SyncConfig
from rollout.errors import InvalidRequest, QueueFull
from rollout.remote import original_error
from rollout.types import Prompt, RolloutRequest, SamplingParams, Status
from tests.actors import fakes
from tests.actors.test_controller import write_model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
SAMPLING = SamplingParams(max_tokens=4)


@pytest.fixture(scope="module")
def service(ray_cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interactive")
    with start_service(
        ModelConfig(path=write_model(folder / "model")),
        EngineConfig(num_shards=1, vllm={"fake": "ok"}),
        SchedulerConfig(max_running_per_shard=2),
        SyncConfig(),
        ClusterConfig(namespace="interactive"),
        shard_class=fakes.FakeShard,
        journal=JournalConfig(dsn=f"sqlite:///{folder / 'journal.sqlite'}"),
    ) as service:
        yield service


def completion(kind, **options):
    defaults = {"n_samples_per_prompt": 1, "sampling": SAMPLING, "run_seed": 0, "group_ids": ("a",), "priority": -1}
    prompts = (Prompt(token_ids=(kind, 7), prompt_id="p"),)
    return RolloutRequest(prompts=prompts, is_interactive=True, **(defaults | options))


def ask(service, request):
    handle_id = uuid.uuid4().hex
    return handle_id, service.controller.complete.remote(request, "test", handle_id)


def wait_for_running(service, number):
    deadline = time.monotonic() + 10
    while service.client.stats().num_running != number:
        assert time.monotonic() < deadline, f"{number} never ran"
        time.sleep(0.02)


def raised(reference):
    try:
        ray.get(reference, timeout=10)
    except Exception as error:
        return original_error(error)
    return None


def test_a_completion_is_one_call(service):
    _, answer = ask(service, completion(fakes.ANSWER))
    trajectory = ray.get(answer, timeout=10)
    assert trajectory.status is Status.TRUNCATED and len(trajectory.token_ids) == 4
    handle_id, answer = ask(service, completion(fakes.HOLD))
    wait_for_running(service, 1)
    ray.get(service.controller.abort.remote(handle_id), timeout=10)
    assert ray.get(answer, timeout=10).status is Status.ABORTED
    assert service.client.stats().num_clients == 0, "nothing is kept"


def test_who_would_wait_too_long_is_told_so_at_once(service):
    held = [ask(service, completion(fakes.HOLD, group_ids=(str(i),))) for i in range(2)]
    wait_for_running(service, 2)
    error = raised(ask(service, completion(fakes.ANSWER, max_wait_s=0.1))[1])
    assert isinstance(error, QueueFull) and "until 1 others have ended" in str(error)
    _, waiting = ask(service, completion(fakes.ANSWER))  # it says nothing of a limit: it may wait
    deadline = time.monotonic() + 10
    while service.client.stats().num_queued != 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    error = raised(ask(service, completion(fakes.ANSWER, max_wait_s=0.1))[1])
    assert isinstance(error, QueueFull) and "until 2 others have ended" in str(error)
    ray.get(service.shards[0].release.remote(), timeout=10)
    assert ray.get(waiting, timeout=10).status is Status.TRUNCATED
    assert all(ray.get(answer, timeout=10).status is Status.TRUNCATED for _, answer in held)


def test_rollouts_give_way_to_completions(service):
    client = service.client
    handle = client.submit([[fakes.HOLD], [fakes.HOLD]], 1, SAMPLING)
    wait_for_running(service, 2)
    _, answer = ask(service, completion(fakes.ANSWER, max_wait_s=0.001))
    assert ray.get(answer, timeout=10).status is Status.TRUNCATED, "what is less urgent was cut for it"
    deadline = time.monotonic() + 10
    while client.progress(handle).num_groups_finished < 2:
        assert time.monotonic() < deadline
        ray.get(service.shards[0].release.remote(), timeout=10)
        time.sleep(0.02)
    assert len(list(client.groups(handle))) == 2


def test_leases_from_the_journal(service):
    client, controller = service.client, service.controller
    handle = client.submit([[1, 5], [1, 6], [1, 7]], 2, SAMPLING, group_ids=["a", "b", "c"], run_id="run")
    deadline = time.monotonic() + 10
    leased = []
    while len(leased) < 2:
        assert time.monotonic() < deadline
        leased += ray.get(controller.lease.remote("run", "trainer", 2 - len(leased), 60.0))
    assert len({group.group_id for group in leased}) == 2
    assert all(len(t.token_ids) == 4 for group in leased for t in group.trajectories)
    (rest,) = client.groups(handle)
    assert {rest.group_id, *(group.group_id for group in leased)} == {"a", "b", "c"}, "what was leased comes once"
    ids = tuple(group.group_id for group in leased)
    assert ray.get(controller.acknowledge_groups.remote("run", ids[:1], "checkpoint")) == 1
    assert ray.get(controller.release.remote("run", "trainer")) == 1
    again = ray.get(controller.lease.remote("run", "other", 10, 60.0))
    assert {group.group_id for group in again} == {ids[1], rest.group_id}
    stored = ray.get(controller.stored_group.remote("run", "b"))
    assert stored.prompt.token_ids == (1, 6) and stored.sampling == SAMPLING
    assert isinstance(raised(controller.stored_group.remote("run", "z")), InvalidRequest)


def test_results_can_skip_what_was_seen(service):
    controller = service.controller
    handle = service.client.submit([[1, 5], [1, 6]], 1, SAMPLING, group_ids=["a", "b"])
    seen = frozenset()
    while len(seen) < 2:
        delivery = ray.get(controller.next_groups.remote(handle.handle_id, 1, 10.0, (), seen))
        assert not seen & {group.group_id for group in delivery.groups}
        seen |= {group.group_id for group in delivery.groups}
    assert delivery.is_done
    assert ray.get(controller.next_groups.remote(handle.handle_id, 1, 10.0, (), seen)).is_done
    assert ray.get(controller.acknowledge.remote(handle.handle_id, ("a", "b")))
