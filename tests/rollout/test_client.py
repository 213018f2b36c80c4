"""The clients against a scripted controller: what crosses the border, and what is told again."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Future
from itertools import islice

import pytest
import torch

from rollout.async_client import AsyncRolloutClient
from rollout.client import RolloutClient
from rollout.errors import InvalidRequest, ServiceLost, SyncRefused
from rollout.fleet import SyncReport
from rollout.handles import Delivery, RolloutHandle
from rollout.prompts import read_prompts
from rollout.sync.manifest import spec_of
from rollout.sync.segments import SHARED_MEMORY
from rollout.types import Group, ModelLimits, SamplingParams

SAMPLING = SamplingParams(max_tokens=4)


class Reference:
    """Stands for a Ray reference: it can be awaited, and has a future."""

    def __init__(self, call):
        self._future = Future()
        try:
            self._future.set_result(call())
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
        return Reference(lambda: self._function(*args))


class FakeController:
    """Finishes everything at once, two groups a call, and keeps what it was told."""

    def __init__(self):
        self.requests, self.acknowledged, self.calls, self.buckets = [], [], [], []
        self.fault = None
        self.finished = {}

    def __getattr__(self, name):
        return Method(getattr(self, f"on_{name}"))

    def on_limits(self):
        return ModelLimits(vocab_size=10, max_model_len=16)

    def on_submit(self, request, client_id):
        self.requests.append(request)
        self.finished = {
            g: Group(group_id=g, prompt=p, trajectories=[])
            for g, p in reversed(list(zip(request.group_ids, request.prompts, strict=True)))
        }
        return RolloutHandle(handle_id="h", group_ids=request.group_ids, n_samples_per_prompt=1)

    def on_next_groups(self, handle_id, max_groups, timeout_s, acknowledged):
        self.on_acknowledge(handle_id, acknowledged)
        groups = tuple(self.finished.values())[:2]
        return Delivery(groups=groups, is_done=len(groups) == len(self.finished))

    def on_acknowledge(self, handle_id, group_ids):
        self.acknowledged.extend(group_ids)
        for group_id in group_ids:
            self.finished.pop(group_id, None)

    def on_abort(self, handle_id):
        self.calls.append("abort")

    def on_begin_publish(self, version, specs):
        self.calls.append("begin")

    def on_publish_bucket(self, ref):
        if self.fault is not None:
            raise self.fault
        self.buckets.append((tuple(s.name for s in ref.tensors), len(list(SHARED_MEMORY.glob(ref.segment)))))

    def on_commit_publish(self, version):
        self.calls.append("commit")
        return SyncReport(version=version, num_tensors=0, num_bytes=0, stage_s=0.0, stall_s=0.0)

    def on_abandon_publish(self, version):
        self.calls.append("abandon")


def test_groups_are_yielded_once_although_iteration_was_interrupted():
    controller = FakeController()
    client = RolloutClient(controller)
    handle = client.submit([[1], [2], [3]], 1, SAMPLING)
    reader = client.groups(handle)
    first = next(reader)
    reader.close()
    rest = list(client.groups(handle))
    assert sorted(g.group_id for g in [first, *rest]) == sorted(handle.group_ids)
    assert sorted(controller.acknowledged) == sorted(handle.group_ids)


def test_taking_exactly_all_groups_acknowledges_the_last():
    controller = FakeController()
    client = RolloutClient(controller)
    handle = client.submit([[1], [2], [3]], 1, SAMPLING)
    assert len(list(islice(client.groups(handle), 3))) == 3
    assert sorted(controller.acknowledged) == sorted(handle.group_ids)


def test_rollout_orders_groups_and_reports_progress_in_both_clients():
    for collect in (
        lambda controller, **options: RolloutClient(controller).rollout([[1], [2], [3]], 1, SAMPLING, **options),
        lambda controller, **options: asyncio.run(
            AsyncRolloutClient(controller).rollout([[1], [2], [3]], 1, SAMPLING, **options)
        ),
    ):
        seen: list[tuple[int, ...]] = []
        groups = collect(FakeController(), progress=lambda *state, seen=seen: seen.append(state))
        assert [g.prompt.token_ids for g in groups] == [(1,), (2,), (3,)]
        assert [state[0] for state in seen] == [1, 2, 3]


def test_a_raising_callback_aborts_the_rollout():
    controller = FakeController()
    with pytest.raises(ZeroDivisionError):
        RolloutClient(controller).rollout([[1]], 1, SAMPLING, progress=lambda *state: 1 / 0)
    assert controller.calls == ["abort"]


@pytest.mark.parametrize(
    "prompt, match",
    [
        ([], "at least one token"),
        ([10], r"\[0, 10\)"),
        ([1] * 13, "max_model_len = 16"),
        ("text", "tokenize text first"),
        ([1.5], "token ids"),
        (7, "token ids"),
    ],
)
def test_faults_are_found_before_anything_is_sent(prompt, match):
    controller = FakeController()
    with pytest.raises(InvalidRequest, match=match):
        RolloutClient(controller).submit([[1], prompt], 1, SAMPLING)
    assert controller.requests == []


def test_group_ids_of_later_submissions_differ():
    controller = FakeController()
    client = RolloutClient(controller)
    ids = [client.submit([[1]], 1, SAMPLING).group_ids for _ in range(2)]
    assert ids[0] != ids[1]


@pytest.mark.parametrize("is_async", [False, True])
def test_publish_sends_bounded_buckets_and_leaves_no_segment(is_async):
    controller = FakeController()
    weights = {name: torch.ones(4) for name in "abc"}
    if is_async:
        asyncio.run(AsyncRolloutClient(controller, bucket_bytes=32).publish(1, weights))
    else:
        RolloutClient(controller, bucket_bytes=32).publish(1, weights)
    assert controller.buckets == [(("a", "b"), 1), (("c",), 1)]
    assert controller.calls == ["begin", "commit"]


def test_a_refused_bucket_abandons_the_publication():
    controller = FakeController()
    controller.fault = SyncRefused("digest differs")
    before = set(SHARED_MEMORY.glob("longroll-*"))
    with pytest.raises(SyncRefused, match="digest differs"):
        RolloutClient(controller).publish(1, {"a": torch.ones(4)})
    assert controller.calls == ["begin", "abandon"]
    assert set(SHARED_MEMORY.glob("longroll-*")) <= before


def test_a_generator_of_weights_needs_specs_and_must_follow_them():
    client = RolloutClient(FakeController())
    with pytest.raises(SyncRefused, match="read only once"):
        client.publish(1, iter([("a", torch.ones(4))]))
    specs = [spec_of("a", torch.ones(4)), spec_of("b", torch.ones(4))]
    client.publish(1, iter([("a", torch.ones(4)), ("b", torch.ones(4))]), specs)
    for wrong in ([("b", torch.ones(4)), ("a", torch.ones(4))], [("a", torch.ones(4))]):
        with pytest.raises(SyncRefused, match="bucket 0 of version 1"):
            client.publish(1, iter(wrong), specs)


def test_remote_errors_arrive_as_their_cause():
    class RayTaskError(Exception):
        pass

    class Dual(RayTaskError, SyncRefused):
        cause = SyncRefused("short")

    class ActorDiedError(type("RayActorError", (Exception,), {})):
        pass

    controller = FakeController()
    for fault, expected in ((Dual("a long traceback"), SyncRefused), (ActorDiedError("x"), ServiceLost)):
        controller.fault = fault
        with pytest.raises(expected) as info:
            RolloutClient(controller).publish(1, {"a": torch.ones(4)})
        assert type(info.value) is expected and "traceback" not in str(info.value)


class Characters:
    def encode(self, text):
        return [ord(c) for c in text]

    def apply_chat_template(self, conversation, *, add_generation_prompt, tokenize, return_dict):
        return [0, *self.encode(conversation[-1]["content"])]


def test_prompts_from_jsonl(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [
        {"prompt": "ab"},
        {"prompt": [{"role": "user", "content": "a"}], "prompt_id": "x"},
        {"token_ids": [5], "metadata": {"index": 1}},
    ]
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    prompts = read_prompts(path, Characters())
    assert [p.token_ids for p in prompts] == [(97, 98), (0, 97), (5,)]
    assert [p.prompt_id for p in prompts] == ["p.jsonl:1", "x", "p.jsonl:5"]
    assert prompts[2].metadata == {"index": 1}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"prompt": "a", "token_ids": [1]}',
        '{"prompt": ""}',
        '{"prompt": 3}',
        '{"token_ids": [true]}',
        '{"prompt": "a", "metadata": 1}',
        '{"prompt": "a", "answer": 1}',
        '{"prompt": [{"role": "user"}]}',
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(InvalidRequest, match=r"p\.jsonl:2"):
        read_prompts(path, Characters())


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, match in (("x.parquet", "jsonl"), ("none.jsonl", "exists"), ("empty.jsonl", "at least one line")):
        with pytest.raises(InvalidRequest, match=match):
            read_prompts(tmp_path / name, Characters())
