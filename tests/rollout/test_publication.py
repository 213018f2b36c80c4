"""The publication state machine against scripted receivers: order of events and every single fault."""

import asyncio
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from rollout.config import InFlight, SyncConfig
from rollout.errors import EngineDead, SyncRefused
from rollout.sync.manifest import BucketRef, TensorSpec, check_against, digest, plan_buckets
from rollout.sync.publication import Publisher, State
from rollout.sync.segments import SHARED_MEMORY, read_bucket, read_verified, sweep, unlink, write_bucket

SPECS = {f"w{i}": TensorSpec(name=f"w{i}", shape=(4, 2), dtype="float32") for i in range(3)}
STEPS = ("stage", "drop_stage", "pause", "apply", "resume")


class ScriptedReceiver:
    """Records calls; fails at one step, by raising or by never answering."""

    def __init__(self, fail_at: str | None = None, hang: bool = False) -> None:
        self.calls: list[str] = []
        self.version, self.staged, self.paused = 0, set(), False
        self.fail_at, self.hang = fail_at, hang

    async def _step(self, name: str) -> None:
        self.calls.append(name)
        await asyncio.sleep(0)
        if name == self.fail_at:
            if self.hang:
                await asyncio.sleep(3600)
            raise RuntimeError(f"{name} broke")

    async def stage(self, ref: BucketRef) -> None:
        await self._step("stage")
        self.staged |= {s.name for s in ref.tensors}

    async def drop_stage(self, version: int) -> None:
        await self._step("drop_stage")
        self.staged = set()

    async def pause(self, mode: InFlight) -> None:
        await self._step("pause")
        self.paused = True

    async def apply(self, version: int) -> None:
        await self._step("apply")
        assert self.paused and self.staged == set(SPECS)
        self.version, self.staged = version, set()

    async def resume(self) -> None:
        await self._step("resume")
        self.paused = False


def bucket(version: int, *names: str, index: int = 0) -> BucketRef:
    return BucketRef(
        version=version,
        index=index,
        segment="unused",
        tensors=tuple(SPECS[n] for n in names),
        offsets=tuple(range(len(names))),
        digests=("",) * len(names),
    )


async def publish(publisher: Publisher, version: int) -> None:
    await publisher.begin(version, tuple(SPECS.values()))
    await publisher.stage(bucket(version, "w0", "w1"))
    await publisher.stage(bucket(version, "w2", index=1))
    await publisher.commit(version)


def test_a_publication_goes_through_every_step_on_all_receivers_together() -> None:
    receivers = [ScriptedReceiver(), ScriptedReceiver()]
    publisher = Publisher(receivers, SPECS, SyncConfig())
    asyncio.run(publish(publisher, 5))
    assert publisher.live_version == 5
    assert all(r.calls == ["stage", "stage", "pause", "apply", "resume"] for r in receivers)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("hang", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_of_any_receiver_at_any_step_never_mixes_versions(step: str, hang: bool, rank: int) -> None:
    receivers = [ScriptedReceiver(), ScriptedReceiver()]
    receivers[rank] = ScriptedReceiver(fail_at=step, hang=hang)
    publisher = Publisher(receivers, SPECS, SyncConfig(timeout_s=0.05))
    if step == "drop_stage":  # reached only when something is dropped
        asyncio.run(_begin_twice(publisher))
        assert publisher.live_version == 2
        return
    with pytest.raises((SyncRefused, EngineDead)):
        asyncio.run(publish(publisher, 1))
    if publisher.state is State.BROKEN:
        assert step in ("pause", "apply", "resume")
        serving = {r.version for r in receivers if not r.paused}
        assert len(serving) <= 1, "two versions are being served"
    else:
        assert publisher.live_version == 0
        assert {r.version for r in receivers} == {0} and not any(r.paused for r in receivers)
        asyncio.run(_recovers(publisher, receivers))


async def _begin_twice(publisher: Publisher) -> None:
    await publisher.begin(1, tuple(SPECS.values()))
    await publish(publisher, 2)


async def _recovers(publisher: Publisher, receivers: list[ScriptedReceiver]) -> None:
    for receiver in receivers:
        receiver.fail_at = None
    await publish(publisher, 2)
    assert {r.version for r in receivers} == {2}


def test_a_broken_fleet_refuses_everything() -> None:
    receivers = [ScriptedReceiver(), ScriptedReceiver(fail_at="apply")]
    publisher = Publisher(receivers, SPECS, SyncConfig())
    with pytest.raises(EngineDead):
        asyncio.run(publish(publisher, 1))
    assert all(r.paused for r in receivers), "generation goes on with mixed weights"
    with pytest.raises(EngineDead):
        asyncio.run(publish(publisher, 2))


def test_messages_out_of_order_are_refused_and_change_nothing() -> None:
    async def run() -> None:
        publisher = Publisher([ScriptedReceiver()], SPECS, SyncConfig(), live_version=3)
        with pytest.raises(SyncRefused, match="above the live version 3"):
            await publisher.begin(3, tuple(SPECS.values()))
        with pytest.raises(SyncRefused, match=r"expected begin\(\) first"):
            await publisher.stage(bucket(4, "w0"))
        with pytest.raises(SyncRefused, match=r"expected begin\(\) first"):
            await publisher.commit(4)
        await publisher.begin(4, tuple(SPECS.values()))
        with pytest.raises(SyncRefused):
            await publisher.stage(bucket(5, "w0"))  # another version's bucket does not end this one
        await publisher.stage(bucket(4, "w0"))
        with pytest.raises(SyncRefused, match="staged before"):
            await publisher.stage(bucket(4, "w0"))  # a doubled bucket ends it
        assert publisher.state is State.IDLE and publisher.live_version == 3
        await publisher.begin(4, tuple(SPECS.values()))
        await publisher.stage(bucket(4, "w0"))
        with pytest.raises(SyncRefused, match="2 tensors were never staged"):
            await publisher.commit(4)
        await publisher.begin(4, tuple(SPECS.values()))
        await publisher.abandon(4)
        assert publisher.state is State.IDLE and publisher.live_version == 3

    asyncio.run(run())


@pytest.mark.parametrize(
    ("offered", "message"),
    [
        ({**SPECS, "w0": replace(SPECS["w0"], shape=(2, 4))}, "shape"),
        ({**SPECS, "w0": replace(SPECS["w0"], dtype="bfloat16")}, "dtype"),
        ({k: v for k, v in SPECS.items() if k != "w1"}, "w1: missing"),
        ({**SPECS, "x": replace(SPECS["w0"], name="x")}, "x: not a tensor of the model"),
    ],
)
def test_wrong_names_shapes_and_dtypes_are_refused_at_once(offered: dict, message: str) -> None:
    with pytest.raises(SyncRefused, match=message):
        check_against(SPECS, tuple(offered.values()))


def test_buckets_keep_order_and_respect_the_limit() -> None:
    specs = [TensorSpec(name=str(i), shape=(n,), dtype="float32") for i, n in enumerate([1, 4, 100, 2, 2, 2])]
    buckets = plan_buckets(specs, bucket_bytes=48)
    assert [s.name for b in buckets for s in b] == [s.name for s in specs]
    assert [[s.name for s in b] for b in buckets] == [["0", "1"], ["2"], ["3", "4", "5"]]


def test_segments_round_trip_and_refuse_corruption() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        ("a", torch.randn(3, 5, generator=generator)),
        ("b", torch.randn(7, generator=generator).bfloat16()),
        ("c", torch.randn(4, 4, generator=generator).t()),
    ]
    ref = write_bucket(1, 0, tensors)
    try:
        assert BucketRef.from_json(ref.to_json()) == ref
        for (name, got), (want_name, want) in zip(read_verified(ref), tensors, strict=True):
            assert name == want_name and torch.equal(got, want) and digest(got) == digest(want)
        read_bucket(ref)[1][1][0] += 1
        with pytest.raises(SyncRefused, match="b: got digest"):
            read_verified(ref)
        with (SHARED_MEMORY / ref.segment).open("r+b") as file:
            file.truncate(8)
        with pytest.raises(SyncRefused, match="bytes"):
            read_verified(ref)
    finally:
        unlink(ref)
    with pytest.raises(SyncRefused, match="missing"):
        read_verified(ref)
    unlink(ref)  # twice is fine


def test_segments_of_dead_writers_are_swept_and_those_of_the_living_kept() -> None:
    mine = write_bucket(1, 0, [("a", torch.ones(3))])
    writer = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    stale = SHARED_MEMORY / f"longroll-{writer.stdout.strip()}-0"
    stale.write_bytes(b"x")
    try:
        assert sweep() >= 1
        assert not stale.exists() and torch.equal(read_verified(mine)[0][1], torch.ones(3))
    finally:
        unlink(mine)
        stale.unlink(missing_ok=True)
