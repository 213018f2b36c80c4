"""A client whose controller dies and is replaced: every group once, nothing learned asked for again."""

from __future__ import annotations

import asyncio
import itertools
from concurrent.futures import Future

import pytest

from rollout.async_client import AsyncRolloutClient
from rollout.client import RolloutClient
from rollout.errors import ServiceLost, UnknownHandle
from rollout.handles import Delivery, RolloutHandle
from rollout.reading import Reading
from rollout.types import Group, ModelLimits, Prompt, RolloutRequest, SamplingParams

SAMPLING = SamplingParams(max_tokens=4)
IDS = ("a", "b", "c", "d", "e")


class RayActorError(Exception):
    """Named like Ray's, by which the client knows that an actor is gone."""


class Call:
    def __init__(self, function, args):
        self._future = Future()
        try:
            self._future.set_result(function(*args))
        except Exception as error:
            self._future.set_exception(error)

    def future(self):
        return self._future

    def __await__(self):
        return asyncio.wrap_future(self._future).__await__()


class Method:
    def __init__(self, function):
        self._function = function

    def remote(self, *args):
        return Call(self._function, args)


class Controller:
    """Finishes everything at once and hands out two groups a call; dies for good before call number `dies_at`."""

    def __init__(self, dies_at=None):
        self.dies_at, self.num_calls = dies_at, 0
        self.asked, self.finished = [], {}

    def __getattr__(self, name):
        return Method(lambda *args: self._answer(name, *args))

    def _answer(self, name, *args):
        self.num_calls += 1
        if self.dies_at is not None and self.num_calls >= self.dies_at:
            raise RayActorError("the actor died")
        return getattr(self, f"on_{name}")(*args)

    def on_limits(self):
        return ModelLimits(vocab_size=10, max_model_len=16)

    def on_submit(self, request, client_id):
        handle_id = f"{id(self)}:{len(self.asked)}"
        self.asked.append(request.group_ids)
        pairs = zip(request.group_ids, request.prompts, strict=True)
        self.finished[handle_id] = {g: Group(group_id=g, prompt=p, trajectories=[]) for g, p in pairs}
        return RolloutHandle(handle_id=handle_id, group_ids=request.group_ids, n_samples_per_prompt=1)

    def on_next_groups(self, handle_id, max_groups, timeout_s, acknowledged):
        self.on_acknowledge(handle_id, acknowledged)
        left = self.finished[handle_id]
        return Delivery(groups=tuple(left.values())[:2], is_done=len(left) <= 2)

    def on_acknowledge(self, handle_id, group_ids):
        if handle_id not in self.finished:
            raise UnknownHandle(handle_id)
        for group_id in group_ids:
            self.finished[handle_id].pop(group_id, None)

    def on_abort(self, handle_id):
        self.on_acknowledge(handle_id, ())


def read(client_class, controllers, run_id="run"):
    """All groups that a client yields, told in order, while controllers die one after the other."""
    left = iter(controllers[1:])
    client = client_class(controllers[0], find=lambda: next(left))
    arguments = ([[1]] * len(IDS), 1, SAMPLING)
    if client_class is RolloutClient:
        handle = client.submit(*arguments, group_ids=IDS, run_id=run_id)
        return [group.group_id for group in client.groups(handle)]

    async def reading():
        handle = await client.submit(*arguments, group_ids=IDS, run_id=run_id)
        return [group.group_id async for group in client.groups(handle)]

    return asyncio.run(reading())


@pytest.mark.parametrize("client_class", [RolloutClient, AsyncRolloutClient])
@pytest.mark.parametrize("dies_at", range(2, 7))
def test_every_group_is_seen_once_whenever_the_controller_dies(client_class, dies_at):
    controllers = [Controller(dies_at), Controller(dies_at=3), Controller()]
    got = read(client_class, controllers)
    assert sorted(got) == sorted(IDS)
    for before, after in itertools.pairwise(controllers):
        assert not after.asked or not before.asked or set(after.asked[-1]) <= set(before.asked[-1])


@pytest.mark.parametrize("client_class", [RolloutClient, AsyncRolloutClient])
def test_only_what_was_not_had_is_asked_for_again(client_class):
    controllers = [Controller(dies_at=4), Controller()]  # limits, submit, one delivery, and no more
    assert read(client_class, controllers) == list(IDS)
    assert controllers[0].asked == [IDS] and controllers[1].asked == [IDS[2:]]


@pytest.mark.parametrize("client_class", [RolloutClient, AsyncRolloutClient])
def test_without_a_run_id_a_death_is_an_error(client_class):
    with pytest.raises(ServiceLost):
        read(client_class, [Controller(dies_at=4), Controller()], run_id=None)


def test_what_was_given_up_is_not_asked_for_again():
    controllers = [Controller(dies_at=4), Controller()]
    client = RolloutClient(controllers[0], find=lambda: controllers[1])
    handle = client.submit([[1]] * len(IDS), 1, SAMPLING, group_ids=IDS, run_id="run")
    reader = client.groups(handle)
    assert [next(reader).group_id for _ in range(2)] == ["a", "b"]
    client.abort(handle)  # the controller is gone, and with it all that ran
    assert list(client.groups(handle)) == [] and controllers[1].asked == []


def test_the_missing_groups_keep_their_prompts():
    handle = RolloutHandle(handle_id="h", group_ids=IDS, n_samples_per_prompt=1)
    reading = Reading(handle=handle, request=a_request())
    groups = tuple(Group(group_id=g, prompt=None, trajectories=[]) for g in ("d", "b"))
    for _ in reading.new_groups(Delivery(groups=groups, is_done=False)):
        continue
    missing = reading.missing()
    assert missing.group_ids == ("a", "c", "e") and [p.prompt_id for p in missing.prompts] == ["p0", "p2", "p4"]
    assert missing.run_id == "run"


def a_request():
    prompts = tuple(Prompt(token_ids=(1,), prompt_id=f"p{i}") for i in range(len(IDS)))
    return RolloutRequest(
        prompts=prompts, n_samples_per_prompt=1, sampling=SAMPLING, run_seed=0, group_ids=IDS, run_id="run"
    )
