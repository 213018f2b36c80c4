"""Publications by broadcast: our ends of it, with gloo where NCCL would be.

Real here: Publisher, Shard, the workers' staging, NcclTransport, and a group of communicating ranks.
Stood in for: NCCL and vLLM's engine. So these tests say nothing about NCCL, streams or GPUs.
"""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo

import actors.shard
from actors.shard import Shard
from actors.shard_stats import LastStats
from actors.transport import NcclTransport, SharedMemoryTransport, make_transport
from actors.vllm_plugin.nccl import NcclWeightEngine
from actors.vllm_plugin.weights import StagedWeightEngine
from actors.vllm_plugin.worker import StagingMixin
from rollout.config import EngineConfig, ModelConfig, SyncConfig
from rollout.errors import InvalidRequest, SyncRefused
from rollout.sync.manifest import BucketRef, TensorSpec, digest, spec_of
from rollout.sync.publication import Publisher, State
from rollout.sync.segments import unlink, write_bucket
from tests.actors.gloo_link import GlooCommunicator

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TIMEOUT_S = 1.0  # where it must strike
PATIENT_S = 30.0  # where it must not, also on busy cores
SLACK_S = 3.0  # of busy cores
STUCK_S = 60.0
LARGE = 4 * 2**20  # elements; more than socket buffers take from a sender whose peer does not read


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(50, 16, generator=generator),
        "layers.0.mlp.experts.0.up_proj": torch.randn(8, 16, generator=generator).bfloat16(),
        "layers.0.mlp.experts.1.up_proj": torch.randn(8, 16, generator=generator).bfloat16(),
        "scale": torch.randn((), generator=generator),
        "none": torch.empty(0, 3),
    }


SPECS = {name: spec_of(name, tensor) for name, tensor in weights(0).items()}


class Model(torch.nn.Module):
    """Remembers what it was told to load."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, torch.Tensor] = {}

    def load_weights(self, pairs) -> None:
        self.loaded = dict(pairs)


class GlooEngine(NcclWeightEngine):
    """Joins over gloo; `mishap` is called with (number of the broadcast, tensor) after each one."""

    def __init__(self, rank: int) -> None:
        config = SimpleNamespace(parallel_config=None, model_config=None)
        super().__init__(None, config, CPU, Model())
        self.rank, self.num_joins = rank, 0
        self.mishap = lambda number, tensor: None
        self.before_join = lambda: None

    def connect(self, init_info: NCCLWeightTransferInitInfo) -> GlooCommunicator:
        self.num_joins += 1
        self.before_join()
        engine = self

        class Mishappy(GlooCommunicator):
            def broadcast(self, tensor, src, stream=None) -> None:
                super().broadcast(tensor, src, stream)
                engine.mishap(self.num_broadcasts, tensor)

        rank = self.rank + init_info.rank_offset
        return Mishappy(init_info.master_address, init_info.master_port, rank, init_info.world_size)


class FakeAsyncLLM:
    """Runs workers' calls one at a time and to their end, as vLLM's engine loop does."""

    def __init__(self, worker: StagingMixin) -> None:
        self.worker = worker

    async def collective_rpc(self, method: str, args: tuple = ()) -> list:
        return [getattr(self.worker, method)(*args)]

    async def init_weight_transfer_engine(self, request) -> None:
        engine = self.worker.weight_transfer_engine
        engine.init_transfer_engine(engine.parse_init_info(request.init_info))

    async def pause_generation(self, mode: str, clear_cache: bool) -> None: ...

    async def resume_generation(self) -> None: ...

    async def start_weight_update(self) -> None: ...

    async def update_weights(self, request) -> None:
        engine = self.worker.weight_transfer_engine
        engine.receive_weights(engine.parse_update_info(request.update_info))

    async def finish_weight_update(self, version: str) -> None:
        self.worker.weight_transfer_engine.drop(int(version))


class Fleet:
    """Shards and publisher in one event loop, in a thread; also the sender's Receiver, as the controller is."""

    def __init__(self, engines: list[GlooEngine]) -> None:
        self.engines = engines
        config = SyncConfig(timeout_s=PATIENT_S)
        shards = []
        for engine in engines:
            worker = StagingMixin()
            worker.weight_transfer_engine = engine
            shard = Shard(engine.rank, ModelConfig(), EngineConfig(), config)
            shard._engine = FakeAsyncLLM(worker)
            shard._stats = LastStats()
            shards.append(shard)
        self.publisher = Publisher(shards, SPECS, config)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(2 * PATIENT_S)

    def num_workers(self) -> int:
        return len(self.engines)

    def open_transport(self, rendezvous, world_size) -> None:
        self.call(self.publisher.open_transport(rendezvous, world_size))

    def begin(self, version, specs) -> None:
        self.call(self.publisher.begin(version, specs))

    def stage(self, ref) -> None:
        self.call(self.publisher.stage(ref))

    def commit(self, version):
        return self.call(self.publisher.commit(version))

    def abandon(self, version) -> None:
        self.call(self.publisher.abandon(version))


def join_over_gloo(rendezvous, world_size) -> GlooCommunicator:
    return GlooCommunicator(rendezvous.host, rendezvous.rpc_port, 0, world_size)


def transport_to(receiver) -> NcclTransport:
    return NcclTransport(receiver, "127.0.0.1", CPU, PATIENT_S, join=join_over_gloo)


def publish(fleet: Fleet, transport: NcclTransport, version: int, tensors: dict[str, torch.Tensor]):
    """What WeightSource does on rank 0, in two buckets."""
    pairs = list(tensors.items())
    try:
        transport.open()
        fleet.begin(version, tuple(spec_of(*pair) for pair in pairs))
        transport.send(version, 0, pairs[:2])
        transport.send(version, 1, pairs[2:])
        return fleet.commit(version)
    except SyncRefused:
        fleet.abandon(version)
        raise


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Fleet:
    monkeypatch.setattr(actors.shard.ray, "get_gpu_ids", lambda: [])  # it would start a cluster
    return Fleet([GlooEngine(0), GlooEngine(1)])


def assert_serving(fleet: Fleet, version: int, expected: dict[str, torch.Tensor]) -> None:
    assert fleet.publisher.live_version == version and fleet.publisher.state is State.IDLE
    for engine in fleet.engines:
        assert not engine._staged and engine._version is None
        assert engine.model.loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            got = engine.model.loaded[name]
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape) and torch.equal(got, tensor)


def test_every_shard_gets_every_version_exactly_over_one_group(fleet: Fleet) -> None:
    transport = transport_to(fleet)
    for version in (1, 2):
        report = publish(fleet, transport, version, weights(version))
        assert report.num_bytes == sum(spec.num_bytes for spec in SPECS.values())
        assert_serving(fleet, version, weights(version))
    assert [engine.num_joins for engine in fleet.engines] == [1, 1]


def test_a_corrupted_tensor_is_refused_dropped_everywhere_and_the_next_publication_reopens(fleet: Fleet) -> None:
    transport = transport_to(fleet)
    publish(fleet, transport, 1, weights(1))

    def flip_a_bit(number: int, tensor: torch.Tensor) -> None:
        if number == 7:  # the third tensor of the second publication (an empty one is not broadcast)
            tensor[0] ^= 1

    fleet.engines[1].mishap = flip_a_bit
    with pytest.raises(
        SyncRefused, match=r"shard 1: bucket 1 of version 2, layers\.0\.mlp\.experts\.1\.up_proj: got digest"
    ):
        publish(fleet, transport, 2, weights(2))
    assert_serving(fleet, 1, weights(1))
    publish(fleet, transport, 3, weights(3))
    assert_serving(fleet, 3, weights(3))
    assert [engine.num_joins for engine in fleet.engines] == [2, 2]


def test_a_silent_receiver_ends_in_time_while_the_engines_go_on(fleet: Fleet) -> None:
    """The shards' event loop stands for the engines': it must never wait for a broadcast."""
    stuck, ticks = threading.Event(), []
    fleet.engines[1].mishap = lambda number, tensor: stuck.wait(STUCK_S)

    async def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.05)

    asyncio.run_coroutine_threadsafe(tick(), fleet.loop)
    transport = transport_to(fleet)
    transport.open()
    assert_refused_in_time(fleet, transport)
    assert max(b - a for a, b in itertools.pairwise(ticks)) < SLACK_S
    fleet.engines[1].mishap = lambda number, tensor: None
    publish(fleet, transport, 2, weights(2))
    stuck.set()  # what arrives late belongs to nobody
    assert_serving(fleet, 2, weights(2))


def test_a_receiver_that_never_joins_ends_in_time_and_may_join_later(fleet: Fleet) -> None:
    never = threading.Event()
    fleet.engines[0].before_join = lambda: never.wait(STUCK_S)
    transport = transport_to(fleet)
    assert_refused_in_time(fleet, transport)
    fleet.engines[0].before_join = lambda: None
    publish(fleet, transport, 2, weights(2))
    assert_serving(fleet, 2, weights(2))
    never.set()


def assert_refused_in_time(fleet: Fleet, transport: NcclTransport) -> None:
    transport._timeout_s = TIMEOUT_S
    began = time.monotonic()
    with pytest.raises(SyncRefused, match=r"within sync\.timeout_s"):
        publish(fleet, transport, 1, weights(1))
    assert time.monotonic() - began < TIMEOUT_S + SLACK_S
    transport._timeout_s = PATIENT_S


def test_a_shard_bounds_its_own_wait_for_a_sender_that_died(fleet: Fleet) -> None:
    shard = Shard(0, ModelConfig(), EngineConfig(), SyncConfig(timeout_s=0.2))

    async def look() -> list[tuple[bool, str | None]]:
        return [(True, None), (False, None)]

    with pytest.raises(SyncRefused, match=r"bucket: not done within sync\.timeout_s"):
        asyncio.run(shard._until_done([(False, None)], look, "bucket"))


RECEIVER_THAT_DIES = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from tests.actors.gloo_link import GlooCommunicator
communicator = GlooCommunicator("127.0.0.1", int(sys.argv[2]), 1, 2)
sys.stdin.readline()
communicator.broadcast(torch.empty(4, dtype=torch.uint8), src=0)
os._exit(1)
"""


def test_the_death_of_a_receiving_process_is_an_error_in_time() -> None:
    """One real process a rank. Its control call never returns either, as when a node is lost."""

    class Doomed:
        def num_workers(self) -> int:
            return 1

        def open_transport(self, rendezvous, world_size) -> None:
            command = [sys.executable, "-c", RECEIVER_THAT_DIES, str(REPOSITORY), str(rendezvous.rpc_port)]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE)

        def stage(self, ref: BucketRef) -> None:
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
            assert self.process.wait(PATIENT_S) == 1
            threading.Event().wait(STUCK_S)

    transport = NcclTransport(Doomed(), "127.0.0.1", CPU, PATIENT_S, join=join_over_gloo)
    transport.open()
    transport._timeout_s = TIMEOUT_S  # of the bucket; the process needed longer to import torch
    began = time.monotonic()
    with pytest.raises(Exception, match=r"within sync\.timeout_s|[Cc]onnection|gloo"):
        transport.send(1, 0, [("first", torch.zeros(1)), ("second", torch.zeros(LARGE))])
    assert time.monotonic() - began < TIMEOUT_S + SLACK_S
    with pytest.raises(SyncRefused, match="not open"):
        transport.send(1, 1, [("first", torch.zeros(1))])


def test_a_worker_keeps_its_own_experts_and_checks_all(fleet: Fleet) -> None:
    for engine in fleet.engines:
        engine._local = {engine.rank}
    publish(fleet, transport_to(fleet), 1, weights(1))
    kept = [{n for n in engine.model.loaded if "experts" in n} for engine in fleet.engines]
    assert kept == [{"layers.0.mlp.experts.0.up_proj"}, {"layers.0.mlp.experts.1.up_proj"}]


def test_a_bucket_goes_the_way_its_record_says(fleet: Fleet) -> None:
    engine = fleet.engines[0]
    broadcast = BucketRef(
        version=1,
        index=0,
        segment=None,
        tensors=(TensorSpec(name="a", shape=(2,), dtype="float32"),),
        offsets=(),
        digests=(digest(torch.zeros(2)),),
    )
    assert BucketRef.from_json(broadcast.to_json()) == broadcast
    assert engine.stage(broadcast) == (True, "weight transport: nobody has opened it")
    written = write_bucket(1, 0, [("a", torch.ones(2))])
    try:
        assert engine.stage(written) == (True, None) and engine.stage_outcome(1) == (True, None)
    finally:
        unlink(written)
    unlink(broadcast)
    config = SimpleNamespace(parallel_config=None, model_config=None)
    is_done, fault = StagedWeightEngine(None, config, CPU, Model()).stage(broadcast)
    assert is_done and "expected one in shared memory" in fault


def test_the_configuration_chooses_and_cpu_excludes_nccl(fleet: Fleet) -> None:
    assert isinstance(make_transport(SyncConfig(), fleet, "127.0.0.1", CPU), SharedMemoryTransport)
    with pytest.raises(InvalidRequest, match="shared_memory"):
        make_transport(SyncConfig(transport="nccl"), fleet, "127.0.0.1", CPU)
    cuda = torch.device("cuda", 0)
    assert isinstance(make_transport(SyncConfig(transport="nccl"), fleet, "127.0.0.1", cuda), NcclTransport)


def test_a_late_answer_of_an_abandoned_publication_does_not_touch_the_next() -> None:
    class Slow:
        def __init__(self) -> None:
            self.release = asyncio.Event()

        async def stage(self, ref) -> None:
            await self.release.wait()
            raise SyncRefused("too late")

        async def drop_stage(self, version) -> None: ...

    async def run() -> None:
        slow = Slow()
        publisher = Publisher([slow], SPECS, SyncConfig(timeout_s=PATIENT_S))
        ref = BucketRef(version=1, index=0, segment=None, tensors=(SPECS["scale"],), offsets=(), digests=("",))
        await publisher.begin(1, tuple(SPECS.values()))
        late = asyncio.ensure_future(publisher.stage(ref))
        await asyncio.sleep(0)
        await publisher.abandon(1)
        await publisher.begin(1, tuple(SPECS.values()))
        slow.release.set()
        with pytest.raises(SyncRefused):
            await late
        assert publisher.state is State.STAGING

    asyncio.run(run())
