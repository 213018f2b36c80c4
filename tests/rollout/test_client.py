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
from rollout.sync import segments
from rollout.sync.encoding import plain_tensor, plan_tensors
from rollout.sync.manifest import TensorSpec, check_tiling
from rollout.sync.segments import SHARED_MEMORY
from rollout.sync.shadow import Shadow
from rollout.types import Group, ModelLimits, SamplingParams

SAMPLING = SamplingParams(max_tokens=4)
PLANS = plan_tensors((TensorSpec(name=name, shape=(100,), dtype="float32") for name in "abc"), int4=None)
ROW_BYTES = 256


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
        self.live_version, self.attempt = 0, 7
        self.shadow = Shadow(PLANS, {n: torch.zeros(p.num_rows, p.row_bytes).byte() for n, p in PLANS.items()}, 0)

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

    def on_served_plans(self):
        return PLANS

    def on_begin_publish(self, version, base, pieces):
        self.calls.append(f"begin {version} on {base}")
        check_tiling({name: plan.num_rows for name, plan in PLANS.items()}, (piece for _, piece in pieces))
        if base not in (None, self.live_version):
            raise SyncRefused("send everything")
        self.shadow.drop()
        self.attempt += 1
        return self.attempt

    def on_publish_bucket(self, ref):
        if self.fault is not None:
            raise self.fault
        assert (ref.attempt, ref.sender, ref.index) == (self.attempt, 0, len(self.buckets))
        self.shadow.stage(ref, segments.map(ref))
        self.buckets.append((tuple(e.name for e in ref.entries), ref.num_bytes))

    def on_commit_publish(self, version):
        self.calls.append("commit")
        assert self.shadow.missing() == []
        self.shadow.commit(version)
        self.live_version, buckets, self.buckets = version, self.buckets, []
        return SyncReport(
            version=version,
            num_tensors=len(PLANS),
            num_bytes=sum(num_bytes for _, num_bytes in buckets),
            num_bytes_full=0,
            num_rows_changed=0,
            stage_s=0.0,
            flip_s=0.0,
            stall_s=0.0,
        )

    def served(self, name):
        return plain_tensor(self.shadow.rows(name), PLANS[name])

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


def publish(controller, is_async, version, weights, **options):
    if is_async:
        return asyncio.run(AsyncRolloutClient(controller, **options).publish(version, weights))
    return RolloutClient(controller, **options).publish(version, weights)


def random_weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(100, generator=generator) for name in PLANS}


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("read", [dict, lambda w: list(w.items()), lambda w: iter(reversed(w.items()))])
def test_publish_sends_bounded_buckets_and_leaves_no_segment(is_async, read):
    controller, weights = FakeController(), random_weights(0)
    before = set(SHARED_MEMORY.glob("longroll-*"))
    sizes = []
    controller.buckets = Recorder(sizes)
    report = publish(controller, is_async, 1, read(weights), bucket_bytes=4 * ROW_BYTES)
    assert sorted(map(len, (names for names, _ in sizes))) == [1, 2] and max(size for _, size in sizes) <= 4 * ROW_BYTES
    assert report.num_bytes == 6 * ROW_BYTES and controller.calls == ["begin 1 on None", "commit"]
    assert all(torch.equal(controller.served(name), weights[name]) for name in PLANS)
    assert set(SHARED_MEMORY.glob("longroll-*")) <= before


class Recorder(list):
    """A list that also tells another one."""

    def __init__(self, told):
        super().__init__()
        self._told = told

    def append(self, item):
        super().append(item)
        self._told.append(item)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_client_that_sends_changes_sends_only_those_and_everything_where_they_do_not_apply(is_async):
    controller, weights = FakeController(), random_weights(0)
    with asyncio.Runner() as runner:
        if is_async:
            client = AsyncRolloutClient(controller, send_changes=True)

            def publish(*args):
                return runner.run(client.publish(*args))
        else:
            publish = RolloutClient(controller, send_changes=True).publish
        assert publish(1, weights).num_bytes == 6 * ROW_BYTES
        weights["b"][70] += 1.0  # in place: what the client remembers must not change with it
        mask_bytes = 16
        assert publish(2, weights).num_bytes == ROW_BYTES + mask_bytes
        assert publish(3, weights).num_bytes == 0
        controller.live_version = 9  # somebody else published
        weights["c"][0] += 1.0
        assert publish(10, weights).num_bytes == 6 * ROW_BYTES
    begins = [call for call in controller.calls if call != "commit"]
    assert begins == ["begin 1 on None", "begin 2 on 1", "begin 3 on 2", "begin 10 on 3", "begin 10 on None"]
    assert all(torch.equal(controller.served(name), weights[name]) for name in PLANS)


def test_a_refused_publication_is_not_what_the_next_one_changes():
    controller, weights = FakeController(), random_weights(0)
    client = RolloutClient(controller, send_changes=True)
    client.publish(1, weights)
    weights["a"][0] += 1.0
    controller.fault = SyncRefused("no room")
    with pytest.raises(SyncRefused, match="no room"):
        client.publish(2, weights)
    controller.fault = None
    client.publish(2, weights)
    assert controller.calls[-2:] == ["begin 2 on 1", "commit"] and torch.equal(controller.served("a"), weights["a"])


def test_a_refused_bucket_abandons_the_publication():
    controller = FakeController()
    controller.fault = SyncRefused("digest differs")
    before = set(SHARED_MEMORY.glob("longroll-*"))
    with pytest.raises(SyncRefused, match="digest differs"):
        RolloutClient(controller).publish(1, random_weights(0))
    assert controller.calls == ["begin 1 on None", "abandon"]
    assert set(SHARED_MEMORY.glob("longroll-*")) <= before


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w | {"x": torch.ones(1)}, "x: not a tensor of the model"),
        (lambda w: {name: w[name] for name in "ab"}, "c: missing"),
        (lambda w: [*w.items(), ("a", w["a"])], "a: sent twice"),
        (lambda w: w | {"a": torch.ones(10, 10)}, r"a: got shape \(10, 10\), expected \(100,\)"),
        (lambda w: w | {"a": torch.ones(100).bfloat16()}, "a: got dtype bfloat16, expected float32"),
        (lambda w: w | {"a": torch.full((100,), float("nan"))}, "a: got NaN"),
    ],
)
def test_weights_that_are_not_those_of_the_model_are_refused_and_abandoned(is_async, change, match):
    controller = FakeController()
    with pytest.raises(SyncRefused, match=match):
        publish(controller, is_async, 1, change(random_weights(0)))
    assert controller.calls == ["begin 1 on None", "abandon"]


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
            RolloutClient(controller).publish(1, random_weights(0))
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
