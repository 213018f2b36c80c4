"""Publications of whole parameters by several ranks in threads, each with its own gloo group.

The receiver is a real shadow, so bytes are compared with those of whole tensors encoded at once. How
partitions of real DeepSpeed ranks are published is tested in test_trainer_sync.py.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from actors.ports import free_port
from actors.rank_group import RankGroup
from actors.transport import MAX_IN_FLIGHT, shared_memory_transport
from actors.weight_source import WeightSource
from rollout.config import Int4Config, SyncConfig
from rollout.errors import EngineDead, SyncRefused
from rollout.sync.checkpoint_names import split_parameter
from rollout.sync.encoding import TensorPlan, encode, plan_tensors
from rollout.sync.manifest import aligned, spec_of
from rollout.sync.segments import SHARED_MEMORY
from tests.actors.shadow_controller import DirectReceiver, ShadowController

CPU = torch.device("cpu")
NUM_RANKS = 3
BUCKET_BYTES = 1000
GLOO_TIMEOUT = timedelta(seconds=30)


def bare_model(seed: int) -> torch.nn.Module:
    """Parameters of a small model with fused experts, under their transformers names."""
    torch.manual_seed(seed)
    root = torch.nn.Module()
    shapes = {
        "embed_tokens.weight": (37, 64),
        "layers.0.norm.weight": (100,),
        "layers.0.q_proj.weight": (24, 64),
        "layers.0.q_proj.bias": (24,),
        "layers.0.mlp.experts.gate_up_proj": (5, 6, 64),
        "layers.0.mlp.experts.down_proj": (5, 3, 64),
    }
    for name, shape in shapes.items():
        module = root
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, torch.nn.Parameter(torch.randn(shape).bfloat16()))
    return root


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: t for key, p in model.named_parameters() for n, t in split_parameter(key, p.data)}


def plans_of(model: torch.nn.Module) -> dict[str, TensorPlan]:
    specs = [spec_of(name, tensor) for name, tensor in tensors_of(model).items()]
    return plan_tensors(specs, Int4Config(group_size=32))


def encoded(model: torch.nn.Module, plans: dict[str, TensorPlan]) -> dict[str, torch.Tensor]:
    return {name: encode(tensor, plans[name]) for name, tensor in tensors_of(model).items()}


class Trainers:
    """Ranks in threads that hold one module together, and publish it to a shadow."""

    def __init__(self, num_ranks: int = NUM_RANKS, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.model = bare_model(0)
        self.plans = plans_of(self.model)
        self.controller = ShadowController(self.plans)
        self.threads = ThreadPoolExecutor(num_ranks)
        port, self.num_ranks = free_port(), num_ranks
        self.ranks = self.on_all(lambda rank: join(port, rank, num_ranks))
        receiver = DirectReceiver(self.controller)
        config = SyncConfig(bucket_bytes=bucket_bytes)
        self.sources = [
            WeightSource(self.model, self.plans, config, receiver, shared_memory_transport(receiver), ranks)
            for ranks in self.ranks
        ]

    def on_all(self, action: Callable) -> list:
        futures = [self.threads.submit(action, rank) for rank in range(self.num_ranks)]
        return [future.result(60) for future in futures]

    def publish(self, version: int) -> list:
        """Reports by rank."""
        return self.on_all(lambda rank: self.sources[rank].publish(version))

    def faults(self, version: int) -> list[Exception | None]:
        """What each rank raises."""

        def attempt(rank: int) -> Exception | None:
            try:
                self.sources[rank].publish(version)
            except Exception as error:
                return error
            return None

        return self.on_all(attempt)

    def assert_served(self, version: int) -> None:
        assert self.controller.live == self.controller.shadow.version == version
        for name, want in encoded(self.model, self.plans).items():
            assert torch.equal(self.controller.shadow.rows(name), want), name

    def close(self) -> None:
        for source in self.sources:
            source.release()
        self.threads.shutdown()


def join(port: int, rank: int, num_ranks: int) -> RankGroup:
    store = dist.TCPStore("127.0.0.1", port, num_ranks, is_master=rank == 0, timeout=GLOO_TIMEOUT)
    return RankGroup(dist.ProcessGroupGloo(store, rank, num_ranks, GLOO_TIMEOUT), CPU)


@pytest.fixture
def trainers() -> Iterator[Trainers]:
    trainers = Trainers()
    yield trainers
    trainers.close()
    assert not list(SHARED_MEMORY.glob(f"longroll-{os.getpid()}-*")), "segments were left behind"


def change(model: torch.nn.Module, name: str, row: int) -> None:
    with torch.no_grad():
        model.get_parameter(name).view(-1, 64)[row] *= 3


def test_first_everything_then_only_rows_that_changed(trainers: Trainers) -> None:
    reports = trainers.publish(1)
    assert reports[1:] == [None, None] and reports[0].version == 1
    trainers.assert_served(1)
    assert trainers.controller.calls[0] == "begin full"
    assert {ref.sender for ref in trainers.controller.buckets} == {0, 1, 2}

    before = encoded(trainers.model, trainers.plans)
    change(trainers.model, "layers.0.q_proj.weight", 5)
    change(trainers.model, "layers.0.mlp.experts.down_proj", 14)
    report = trainers.publish(2)[0]
    trainers.assert_served(2)
    after = encoded(trainers.model, trainers.plans)
    num_changed = sum(int((before[name] != after[name]).any(dim=1).sum()) for name in before)
    assert trainers.controller.calls[0] == "begin delta" and report.num_rows_changed == num_changed == 4
    entries = [(ref, entry) for ref in trainers.controller.buckets for entry in ref.entries]
    row_bytes = trainers.plans["layers.0.q_proj.weight"].row_bytes
    masks = sum(aligned(entry.num_mask_bytes) for _, entry in entries)
    assert report.num_bytes == masks + sum(aligned(e.num_changed * row_bytes) for _, e in entries)
    assert sum(entry.num_mask_bytes > 0 for _, entry in entries) <= 3


def test_nothing_changed_sends_no_bytes_and_what_is_kept_is_given_to_a_late_shard(trainers: Trainers) -> None:
    trainers.publish(1)
    assert trainers.publish(2)[0].num_bytes == 0
    change(trainers.model, "embed_tokens.weight", 30)
    trainers.publish(3)
    trainers.assert_served(3)
    want = encoded(trainers.model, trainers.plans)
    for name, rows in trainers.controller.late_rows().items():
        assert torch.equal(rows, want[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_before_anything_is_sent(trainers: Trainers, value: float) -> None:
    trainers.publish(1)
    trainers.controller.calls.clear()
    weight = trainers.model.get_parameter("layers.0.norm.weight")
    old = weight.data[99].clone()
    weight.data[99] = value
    faults = trainers.faults(2)
    assert all(isinstance(f, SyncRefused) and "layers.0.norm.weight" in str(f) for f in faults)
    assert trainers.controller.calls == [] and trainers.controller.live == trainers.controller.shadow.version == 1
    weight.data[99] = old
    trainers.publish(3)
    assert trainers.controller.calls[0] == "begin delta"
    trainers.assert_served(3)


@pytest.mark.parametrize(("kind", "reason"), [("refuse", "digest differs"), ("truncate", r"got \d+ bytes, expected")])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_fault_of_one_bucket_is_the_reason_on_every_rank(trainers: Trainers, kind, reason, is_first) -> None:
    live = 0
    if not is_first:
        trainers.publish(1)
        live = 1
        with torch.no_grad():
            for parameter in trainers.model.parameters():
                parameter.mul_(1.5)
    trainers.controller.set_fault((1, 1, kind))
    faults = trainers.faults(2)
    assert [type(fault) for fault in faults] == [SyncRefused] * NUM_RANKS
    assert all("bucket 1 of sender 1, version 2" in str(fault) for fault in faults)
    with pytest.raises(SyncRefused, match=reason):
        raise faults[0]
    assert trainers.controller.live == live and "commit" not in trainers.controller.calls
    assert trainers.controller.shadow.version == (None if is_first else live), "only a delta is undone"
    trainers.controller.set_fault(None)
    trainers.publish(3)
    assert trainers.controller.calls[0] == "begin full"
    trainers.assert_served(3)


def test_a_failed_flip_is_the_same_error_on_every_rank_and_the_next_publication_is_full(trainers: Trainers) -> None:
    trainers.publish(1)
    trainers.controller.commit_fault = EngineDead("no shard is left")
    assert [type(fault) for fault in trainers.faults(2)] == [EngineDead] * NUM_RANKS
    trainers.controller.commit_fault = None
    trainers.publish(3)
    assert trainers.controller.calls[0] == "begin full"
    trainers.assert_served(3)


def test_a_version_published_by_somebody_else_is_no_base(trainers: Trainers) -> None:
    trainers.publish(1)
    trainers.controller.flip(7)
    trainers.publish(8)
    assert trainers.controller.calls[0] == "begin full"
    trainers.assert_served(8)


def test_an_encoder_that_fails_half_way_is_heard_of_on_every_rank(trainers: Trainers) -> None:
    """Weights that change under the encoder, for want of another way to break it after the first check."""
    source = trainers.sources[2]
    original = source._weights.encode

    def poison(share, out) -> None:
        if share.piece.name == "layers.0.q_proj.weight":
            raise MemoryError("no memory")
        original(share, out)

    source._weights.encode = poison
    faults = trainers.faults(1)
    assert all("trainer rank 2: MemoryError: no memory" in str(fault) for fault in faults), faults
    source._weights.encode = original
    trainers.publish(2)
    trainers.assert_served(2)


def test_several_buckets_are_on_their_way_at_once_but_not_more_than_the_limit() -> None:
    trainers = Trainers(num_ranks=1, bucket_bytes=BUCKET_BYTES // 2)
    assert len(trainers.sources[0]._weights.buckets) > 2 * MAX_IN_FLIGHT
    receiver, lock, full = DirectReceiver(trainers.controller), threading.Lock(), threading.Event()
    counts = []

    def stage(ref, payload=()) -> None:
        with lock:
            under_way.add(ref)
            counts.append(len(under_way))
            if len(under_way) == MAX_IN_FLIGHT:
                full.set()
        assert full.wait(30), "the limit is never reached"
        with lock:
            under_way.remove(ref)
        trainers.controller.publish_bucket(ref, payload)

    under_way: set = set()
    receiver.stage = stage
    trainers.sources[0]._transport = shared_memory_transport(receiver)
    trainers.publish(1)
    trainers.assert_served(1)
    assert max(counts) == MAX_IN_FLIGHT
    trainers.close()
