"""Publications by broadcast: our ends of it, with gloo where NCCL would be.

Real here: the trainer ranks' WeightSource and NcclTransport, the workers' BroadcastReceiver, protocol and
shadows, and a group of communicating ranks. Stood in for: NCCL and vLLM's engine, and the trainer's processes are
threads. So these tests say nothing about NCCL, streams or GPUs.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from actors.ports import free_port
from actors.transport import NcclTransport, Outgoing, StagingTransport, make_transport
from actors.vllm_plugin.nccl import BroadcastReceiver
from actors.weight_source import WeightSource
from rollout.config import SyncConfig
from rollout.errors import InvalidRequest, SyncRefused
from rollout.fleet import Rendezvous
from rollout.sync.delta import compare, pack_bucket
from rollout.sync.manifest import BucketRef, Piece
from rollout.sync.participant import Participant
from rollout.sync.shadow import Shadow
from tests.actors.gloo_link import GlooCommunicator
from tests.actors.shadow_controller import DirectReceiver, ShadowController, empty_shadow
from tests.actors.test_weight_source import bare_model, encoded, join, plans_of

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TIMEOUT_S = 1.0  # where it must strike
PATIENT_S = 20.0  # where it must not, also on busy cores
SLACK_S = 3.0  # of busy cores
STUCK_S = 60.0
LARGE = 16 * 2**20  # bytes; more than socket buffers take from a sender whose peer does not read
NUM_RANKS, NUM_WORKERS = 2, 2


class ShadowStore:
    """A participant's store that serves its shadow."""

    def __init__(self, plans) -> None:
        self.shadow: Shadow = empty_shadow(plans)
        self.stage, self.missing = self.shadow.stage, self.shadow.missing
        self.undo, self.flip = self.shadow.drop, self.shadow.commit

    def begin(self, base: int | None) -> None: ...

    def digest(self) -> str:
        return self.shadow.common_digest(self.shadow.names)

    def prepare(self) -> None: ...


class Worker:
    """A worker's receiving end and shadow; `mishap` is called with (number of the broadcast, payload)."""

    def __init__(self, plans) -> None:
        store = ShadowStore(plans)
        self.shadow, self.participant = store.shadow, Participant(store, 0)
        self.num_joins = 0
        self.mishap = lambda number, payload: None
        self.before_join = lambda: None
        self.receiver = BroadcastReceiver(self.stage, CPU, PATIENT_S, self._connect)
        self._lock = threading.Lock()

    def stage(self, ref: BucketRef, payload: torch.Tensor) -> None:
        with self._lock:
            self.participant.stage(ref, payload)

    def _connect(self, rendezvous: Rendezvous, rank: int, world_size: int) -> GlooCommunicator:
        self.num_joins += 1
        self.before_join()
        worker = self

        class Mishappy(GlooCommunicator):
            def broadcast(self, tensor, src, stream=None) -> None:
                super().broadcast(tensor, src, stream)
                worker.mishap(self.num_broadcasts, tensor)

        return Mishappy(rendezvous.host, rendezvous.rpc_port, rank, world_size)


class Fleet(ShadowController):
    """The controller's shadow checks the protocol; what the workers received is checked by theirs."""

    def __init__(self, plans, workers: list[Worker]) -> None:
        super().__init__(plans)
        self.workers = workers
        self.threads = ThreadPoolExecutor(4 * len(workers))

    def num_workers(self) -> int:
        return len(self.workers)

    def open_transport(self, rendezvous: Rendezvous, world_size: int) -> None:
        first = world_size - len(self.workers)
        self.on_all(lambda i, w: w.receiver.join(rendezvous, first + i, world_size))

    def begin_publish(self, version: int, base: int | None, pieces) -> int:
        attempt = super().begin_publish(version, base, pieces)
        self.on_all(lambda i, w: w.participant.begin(attempt, version, base))
        return attempt

    def publish_bucket(self, ref: BucketRef, payload=()) -> None:
        self.on_all(lambda i, w: w.receiver.receive(ref))
        self.buckets.append(ref)

    def on_all(self, action) -> None:
        futures = [self.threads.submit(action, i, worker) for i, worker in enumerate(self.workers)]
        for future in futures:
            future.result(STUCK_S)

    def commit_publish(self, version: int):
        for worker in self.workers:
            worker.participant.verify(self._attempt)
            worker.participant.arm(self._attempt)
            worker.participant.flip(self._attempt)
        self.flip(version)

    def abandon_publish(self, version: int) -> None:
        self.on_all(lambda i, w: w.participant.drop(self._attempt))


class Run:
    """Two trainer ranks in threads, two workers."""

    def __init__(self) -> None:
        self.model = bare_model(1)
        self.plans = plans_of(self.model)
        self.workers = [Worker(self.plans) for _ in range(NUM_WORKERS)]
        self.fleet = Fleet(self.plans, self.workers)
        self.threads = ThreadPoolExecutor(NUM_RANKS)
        port = free_port()
        self.ranks = list(self.threads.map(lambda r: join(port, r, NUM_RANKS), range(NUM_RANKS)))
        receiver = DirectReceiver(self.fleet)
        self.transports = [
            NcclTransport(receiver, ranks, "127.0.0.1", CPU, PATIENT_S, join_over_gloo) for ranks in self.ranks
        ]
        config = SyncConfig(bucket_bytes=1000)
        self.sources = [
            WeightSource(self.model, self.plans, config, receiver, transport, ranks)
            for transport, ranks in zip(self.transports, self.ranks, strict=True)
        ]

    def publish(self, version: int) -> None:
        """Every rank must end alike."""
        futures = [self.threads.submit(source.publish, version) for source in self.sources]
        faults = [future.exception(STUCK_S) for future in futures]
        if any(faults):
            assert len({str(fault) for fault in faults}) == 1, faults
            raise faults[0]

    def assert_serving(self, version: int) -> None:
        want = encoded(self.model, self.plans)
        for worker in self.workers:
            assert worker.shadow.version == version
            assert all(torch.equal(worker.shadow.rows(name), rows) for name, rows in want.items())

    def change_everything(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.5)


def join_over_gloo(rendezvous: Rendezvous, world_size: int, rank: int) -> GlooCommunicator:
    return GlooCommunicator(rendezvous.host, rendezvous.rpc_port, rank, world_size)


@pytest.fixture
def run() -> Iterator[Run]:
    run = Run()
    yield run
    for transport in run.transports:
        transport.close()
    for worker in run.workers:
        worker.receiver.close()


def test_every_worker_gets_what_every_rank_sends_over_one_group(run: Run) -> None:
    run.publish(1)
    run.assert_serving(1)
    assert {ref.sender for ref in run.fleet.buckets} == {0, 1}
    assert all(ref.segment is None for ref in run.fleet.buckets)
    num_bytes = sum(ref.num_bytes for ref in run.fleet.buckets)
    with torch.no_grad():
        run.model.get_parameter("layers.0.q_proj.weight")[3] *= 3
    run.publish(2)
    run.assert_serving(2)
    assert 0 < sum(ref.num_bytes for ref in run.fleet.buckets) < num_bytes / 20
    assert [worker.num_joins for worker in run.workers] == [1, 1]


def test_a_corrupted_bucket_is_refused_on_every_rank_and_the_next_publication_reopens(run: Run) -> None:
    run.publish(1)
    num_first = len(run.fleet.buckets)

    def flip_a_bit(number: int, payload: torch.Tensor) -> None:
        if number == num_first + 3:
            payload[0] ^= 1

    run.workers[1].mishap = flip_a_bit
    run.change_everything()
    with pytest.raises(SyncRefused, match=r"bucket \d of sender \d, version 2, .*: got digest"):
        run.publish(2)
    assert [worker.shadow.version for worker in run.workers] == [1, 1]
    run.publish(3)
    run.assert_serving(3)
    assert [worker.num_joins for worker in run.workers] == [2, 2]


def test_a_silent_worker_ends_in_time_on_every_rank(run: Run) -> None:
    stuck = threading.Event()
    run.publish(1)
    run.change_everything()
    run.workers[1].mishap = lambda number, payload: stuck.wait(STUCK_S)
    assert_refused_in_time(run, 2)
    run.workers[1].mishap = lambda number, payload: None
    stuck.set()  # what arrives late belongs to nobody
    run.publish(3)
    run.assert_serving(3)


def test_a_worker_that_never_joins_ends_in_time_and_may_join_later(run: Run) -> None:
    never = threading.Event()
    run.workers[0].before_join = lambda: never.wait(STUCK_S)
    assert_refused_in_time(run, 1)
    run.workers[0].before_join = lambda: None
    never.set()
    run.publish(2)
    run.assert_serving(2)


def assert_refused_in_time(run: Run, version: int) -> None:
    for transport in run.transports:
        transport._timeout_s = TIMEOUT_S
    began = time.monotonic()
    with pytest.raises(SyncRefused, match=r"within sync\.timeout_s"):
        run.publish(version)
    assert time.monotonic() - began < 2 * TIMEOUT_S + SLACK_S
    for transport in run.transports:
        transport._timeout_s = PATIENT_S


def test_a_worker_without_a_group_or_with_a_sender_that_died_says_so() -> None:
    plans = plans_of(bare_model(1))
    worker = Worker(plans)
    ref, _ = bucket(LARGE)
    with pytest.raises(SyncRefused, match="nobody has opened it"):
        worker.receiver.receive(ref)
    rendezvous = Rendezvous(host="127.0.0.1", rpc_port=free_port())
    sender = ThreadPoolExecutor(1).submit(join_over_gloo, rendezvous, 2, 0)
    worker.receiver.join(rendezvous, 1, 2)
    assert sender.result(PATIENT_S) is not None  # it joined, and never broadcasts
    worker.receiver._timeout_s = TIMEOUT_S
    began = time.monotonic()
    with pytest.raises(SyncRefused, match=r"no end within 1 s"):
        worker.receiver.receive(ref)
    assert time.monotonic() - began < TIMEOUT_S + SLACK_S


def bucket(num_bytes: int) -> tuple[BucketRef, torch.Tensor]:
    rows = torch.zeros(num_bytes // 128, 128, dtype=torch.uint8)
    change = compare(Piece(name="a.weight", first_row=0, num_rows=len(rows)), rows, None)
    return pack_bucket([change], version=1, attempt=1, base=None, sender=0, index=0)


RECEIVER_THAT_DIES = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from tests.actors.gloo_link import GlooCommunicator
communicator = GlooCommunicator("127.0.0.1", int(sys.argv[2]), 1, 2)
sys.stdin.readline()
communicator.broadcast(torch.empty(128, dtype=torch.uint8), src=0)
sys.stdin.readline()
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
            if ref.num_bytes == LARGE:
                assert self.process.wait(PATIENT_S) == 1
                threading.Event().wait(STUCK_S)

    ranks = join(free_port(), 0, 1)
    transport = NcclTransport(Doomed(), ranks, "127.0.0.1", CPU, PATIENT_S, join=join_over_gloo)
    transport.open()
    transport._timeout_s = TIMEOUT_S  # of the bucket; the process needed longer to import torch
    began = time.monotonic()
    small, large = (Outgoing(ref=ref, payload=payload, is_kept=False) for ref, payload in (bucket(128), bucket(LARGE)))
    fault = transport.send(iter([small, large]))
    assert fault is not None and any(part in str(fault.error) for part in ("sync.timeout_s", "onnection", "gloo"))
    assert time.monotonic() - began < TIMEOUT_S + SLACK_S
    again = transport.send(iter([small]))
    assert again is not None and "not open" in str(again.error)


def test_the_configuration_chooses_and_cpu_excludes_nccl() -> None:
    ranks, receiver = join(free_port(), 0, 1), DirectReceiver(ShadowController({}))
    for name in ("shared_memory", "object_store"):
        transport = make_transport(SyncConfig(transport=name), receiver, ranks, "127.0.0.1", CPU)
        assert isinstance(transport, StagingTransport)
    with pytest.raises(InvalidRequest, match="shared_memory or object_store"):
        make_transport(SyncConfig(transport="nccl"), receiver, ranks, "127.0.0.1", CPU)
    cuda = torch.device("cuda", 0)
    transport = make_transport(SyncConfig(transport="nccl"), receiver, ranks, "127.0.0.1", cuda)
    assert isinstance(transport, NcclTransport)
