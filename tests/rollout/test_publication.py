"""The publisher against scripted receivers: order of events, refusals, groups, catching up.

What lost, late and doubled messages do to real participants is in test_sync_faults.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from rollout.config import InFlight, SyncConfig
from rollout.errors import EngineDead, SyncRefused
from rollout.fleet import Rendezvous
from rollout.sync.encoding import Encoding, TensorPlan
from rollout.sync.manifest import BucketRef, Entry, Piece
from rollout.sync.publication import Publisher, State

PLANS = {
    name: TensorPlan(name=name, shape=(n * 64,), encoding=Encoding.PLAIN, row_elements=64, dtype="float32")
    for name, n in (("a", 4), ("b", 2))
}
ROW_BYTES = 256
PIECES = (
    (0, Piece(name="a", first_row=0, num_rows=3)),
    (1, Piece(name="a", first_row=3, num_rows=1)),
    (1, Piece(name="b", first_row=0, num_rows=2)),
)
FAST = {"timeout_s": 0.06, "drain_timeout_s": 0.06}


class ScriptedReceiver:
    """Records calls and keeps the state that they imply; one step may raise, or never answer."""

    def __init__(self, version: int = 0, fail_at: str | None = None, fault: Exception | None = None) -> None:
        self.calls: list[str] = []
        self.version, self.attempt, self.next_version, self.is_paused = version, 0, version, False
        self.fail_at, self.fault = fail_at, fault  # fault None: hangs
        self.digest = "same"
        self.gate: asyncio.Event | None = None  # stage waits for it

    async def _step(self, name: str) -> None:
        self.calls.append(name)
        await asyncio.sleep(0)
        if name.split()[0] == self.fail_at:
            if self.fault is None:
                await asyncio.get_running_loop().create_future()
            raise self.fault

    async def open_transport(self, rendezvous: Rendezvous, world_size: int) -> None:
        await self._step("open_transport")

    async def begin(self, attempt: int, version: int, base: int | None) -> None:
        await self._step(f"begin {version} on {base}")
        self.attempt, self.next_version = attempt, version

    async def stage(self, ref: BucketRef) -> None:
        await self._step(f"stage {ref.sender}")
        assert ref.attempt == self.attempt
        if self.gate is not None:
            await self.gate.wait()

    async def verify(self, attempt: int) -> str:
        await self._step("verify")
        assert attempt == self.attempt
        return self.digest

    async def arm(self, attempt: int) -> None:
        await self._step("arm")

    async def flip(self, attempt: int) -> int:
        await self._step("flip")
        self.version = self.next_version
        return self.version

    async def drop(self, attempt: int) -> int:
        await self._step("drop")
        return self.version

    async def live_version(self) -> int:
        await self._step("live_version")
        return self.version

    async def pause(self, mode: InFlight) -> None:
        await self._step(f"pause {mode.value}")
        self.is_paused = True

    async def resume(self) -> None:
        await self._step("resume")
        self.is_paused = False


def fleet(num: int = 2, config: SyncConfig | None = None, groups: dict[int, int] | None = None, **options):
    receivers = {rank: ScriptedReceiver(version=options.get("live_version", 0)) for rank in range(num)}
    publisher = Publisher(receivers, groups or dict.fromkeys(receivers, 0), PLANS, config or SyncConfig(), **options)
    return publisher, receivers


def bucket(attempt: int, sender: int, version: int, base: int | None = None, index: int = 0) -> BucketRef:
    """Both pieces of sender 1, the only one of sender 0; of a delta half of the rows travel."""
    entries = tuple(
        Entry(
            name=piece.name,
            first_row=piece.first_row,
            num_rows=piece.num_rows,
            num_changed=piece.num_rows if base is None else 1,
            digest="",
            mask_offset=None if base is None else 0,
            rows_offset=0,
        )
        for owner, piece in PIECES
        if owner == sender
    )
    num_bytes = ROW_BYTES * sum(entry.num_changed for entry in entries)
    return BucketRef(
        version=version,
        attempt=attempt,
        base=base,
        sender=sender,
        index=index,
        segment=f"{sender}-{version}",
        num_bytes=num_bytes,
        entries=entries,
    )


async def publish(publisher: Publisher, version: int, base: int | None = None):
    attempt = await publisher.begin(version, base, PIECES)
    await asyncio.gather(*(publisher.stage(bucket(attempt, sender, version, base)) for sender in (1, 0)))
    return await publisher.commit(version)


def test_a_publication_goes_through_every_step_without_a_pause() -> None:
    times = iter(range(100))
    publisher, receivers = fleet(clock=lambda: float(next(times)))
    report = asyncio.run(publish(publisher, 5))
    assert publisher.live_version == 5 and publisher.state is State.IDLE
    for receiver in receivers.values():
        assert receiver.calls == ["begin 5 on None", "stage 1", "stage 0", "verify", "arm", "flip"]
    assert (report.version, report.num_tensors, report.num_rows_changed) == (5, 2, 6)
    assert report.num_bytes == report.num_bytes_full == 6 * ROW_BYTES
    assert report.stage_s > 0 and report.flip_s > 0 and report.stall_s == 0.0 and report.ranks_lost == ()


def test_a_delta_reports_what_travelled() -> None:
    publisher, receivers = fleet(live_version=3)
    report = asyncio.run(publish(publisher, 4, base=3))
    assert receivers[0].calls[0] == "begin 4 on 3"
    assert (report.num_rows_changed, report.num_bytes, report.num_bytes_full) == (3, 3 * ROW_BYTES, 6 * ROW_BYTES)


@pytest.mark.parametrize("mode", [InFlight.WAIT, InFlight.ABORT])
def test_the_other_policies_pause_around_the_flip_only(mode: InFlight) -> None:
    publisher, receivers = fleet(config=SyncConfig(in_flight=mode))
    report = asyncio.run(publish(publisher, 1))
    assert receivers[0].calls[3:] == ["verify", f"pause {mode.value}", "arm", "flip", "resume"]
    assert report.stall_s > 0 and not receivers[0].is_paused


BEFORE = ("begin", "stage", "verify", "pause")


@pytest.mark.parametrize("fault", [RuntimeError("broke"), SyncRefused("no"), None], ids=["raises", "refuses", "hangs"])
@pytest.mark.parametrize("step", BEFORE)
def test_a_fault_before_the_decision_leaves_the_old_version_everywhere(step: str, fault: Exception | None) -> None:
    async def run() -> None:
        publisher, receivers = fleet(config=SyncConfig(in_flight=InFlight.WAIT, **FAST))
        receivers[1].fail_at, receivers[1].fault = step, fault
        with pytest.raises(SyncRefused, match=f"{step} of version 1 failed on 1 of 2 shards: shard 1"):
            await publish(publisher, 1)
        assert publisher.live_version == 0 and publisher.state is State.IDLE and publisher.serving == {0, 1}
        for receiver in receivers.values():
            assert "arm" not in receiver.calls and "drop" in receiver.calls and not receiver.is_paused
        receivers[1].fail_at = None
        assert (await publish(publisher, 1)).version == 1 and publisher.live_version == 1

    asyncio.run(run())


@pytest.mark.parametrize("step", BEFORE)
def test_a_death_before_the_decision_costs_its_group_and_no_other(step: str) -> None:
    async def run() -> None:
        lost: list[frozenset[int]] = []
        config = SyncConfig(in_flight=InFlight.WAIT)
        publisher, receivers = fleet(3, config, {0: 0, 1: 0, 2: 1}, on_dead=lambda ranks, reason: lost.append(ranks))
        receivers[0].fail_at, receivers[0].fault = step, EngineDead("gone")
        with pytest.raises(SyncRefused, match="shard 0: gone"):
            await publish(publisher, 1)
        assert lost == [{0, 1}] and publisher.serving == {2} and publisher.live_version == 0
        receivers[0].calls.clear()
        assert (await publish(publisher, 1)).ranks_lost == ()
        assert receivers[0].calls == [] and receivers[2].version == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("step", "others", "outcome"),
    [
        ("arm", "nobody flipped", SyncRefused),
        ("arm", "the other group flipped", None),
        ("flip", "the other group flipped", None),
        ("flip", "no other group", EngineDead),
    ],
)
def test_after_the_decision_each_group_ends_on_its_own(step: str, others: str, outcome: type | None) -> None:
    async def run() -> None:
        lost: dict[frozenset[int], str] = {}
        groups = {0: 0, 1: 0} if others == "no other group" else {0: 0, 1: 0, 2: 1}
        publisher, receivers = fleet(len(groups), SyncConfig(**FAST), groups, on_dead=lost.__setitem__)
        receivers[1].fail_at = step
        if others == "nobody flipped":
            receivers[2].fail_at = "arm"
        if outcome is not None:
            with pytest.raises(outcome):
                await publish(publisher, 1)
        if others == "nobody flipped":
            assert publisher.live_version == 0 and publisher.serving == {0, 1, 2} and lost == {}
        elif others == "the other group flipped":
            report = await publish(publisher, 1)
            assert report.ranks_lost == (0, 1) and publisher.serving == {2} and publisher.live_version == 1
            assert [set(ranks) for ranks in lost] == [{0, 1}] and "shard 1: no answer" in next(iter(lost.values()))
        else:
            assert publisher.state is State.BROKEN and publisher.serving == set()
            with pytest.raises(EngineDead, match="must be restarted"):
                await publisher.begin(2, None, PIECES)

    asyncio.run(run())


def test_a_lost_answer_to_a_flip_that_happened_is_a_success() -> None:
    class LosesFirstAnswer(ScriptedReceiver):
        async def flip(self, attempt: int) -> int:
            version = await super().flip(attempt)
            if self.calls.count("flip") == 1:
                await asyncio.get_running_loop().create_future()
            return version

    receivers = {0: LosesFirstAnswer(), 1: ScriptedReceiver()}
    publisher = Publisher(receivers, {0: 0, 1: 0}, PLANS, SyncConfig(**FAST))
    assert asyncio.run(publish(publisher, 1)).ranks_lost == ()
    assert receivers[0].calls.count("flip") == 2 and publisher.serving == {0, 1}


def test_a_group_that_flipped_by_vote_while_arming_timed_out_is_at_the_new_version() -> None:
    class FlippedMeanwhile(ScriptedReceiver):
        async def drop(self, attempt: int) -> int:
            self.version = self.next_version
            return await super().drop(attempt)

    receivers = {0: FlippedMeanwhile(), 1: FlippedMeanwhile(fail_at="arm")}
    publisher = Publisher(receivers, {0: 0, 1: 0}, PLANS, SyncConfig(**FAST))
    assert asyncio.run(publish(publisher, 1)).version == publisher.live_version == 1
    assert publisher.serving == {0, 1}


def test_shards_that_differ_are_refused() -> None:
    publisher, receivers = fleet()
    receivers[1].digest = "another"
    with pytest.raises(SyncRefused, match="shards differ"):
        asyncio.run(publish(publisher, 1))
    assert receivers[0].calls[-1] == "drop" and publisher.live_version == 0


def test_a_commit_whose_answer_was_lost_is_answered_again_and_outlives_its_caller() -> None:
    async def run() -> None:
        publisher, receivers = fleet()
        attempt = await publisher.begin(1, None, PIECES)
        await asyncio.gather(*(publisher.stage(bucket(attempt, sender, 1)) for sender in (0, 1)))
        first = asyncio.ensure_future(publisher.commit(1))
        second = asyncio.ensure_future(publisher.commit(1))
        await asyncio.sleep(0)
        assert publisher.state is State.FLIPPING
        with pytest.raises(SyncRefused, match="being flipped"):
            await publisher.begin(2, None, PIECES)
        await publisher.abandon(1)
        first.cancel()
        report = await second
        assert await publisher.commit(1) == report and publisher.live_version == 1
        assert receivers[0].calls.count("flip") == 1

    asyncio.run(run())


def test_messages_that_do_not_belong_are_refused() -> None:
    async def run() -> None:
        publisher, receivers = fleet(live_version=3)
        for version, base, match in ((3, None, "above the live version 3"), (4, 2, "send everything")):
            with pytest.raises(SyncRefused, match=match):
                await publisher.begin(version, base, PIECES)
        with pytest.raises(SyncRefused, match=r"expected begin\(\) first"):
            await publisher.stage(bucket(1, 0, 4))
        with pytest.raises(SyncRefused, match=r"expected begin\(\) first"):
            await publisher.commit(4)
        attempt = await publisher.begin(4, None, PIECES)
        for other in (bucket(attempt, 0, 5), bucket(attempt - 1, 0, 4), bucket(attempt + 1, 0, 4)):
            with pytest.raises(SyncRefused):
                await publisher.stage(other)  # another one's bucket does not end this one
        await publisher.stage(bucket(attempt, 0, 4))
        await publisher.stage(bucket(attempt, 0, 4))  # a doubled one is harmless
        assert receivers[0].calls.count("stage 0") == 1 and publisher.state is State.STAGING
        with pytest.raises(SyncRefused, match="2 pieces were never staged, for example a rows 3…3 of sender 1"):
            await publisher.commit(4)
        assert publisher.state is State.IDLE and publisher.live_version == 3 and receivers[0].calls[-1] == "drop"
        attempt = await publisher.begin(4, None, PIECES)
        await publisher.abandon(5)
        assert publisher.state is State.STAGING
        await publisher.abandon(4)
        assert publisher.state is State.IDLE and publisher.live_version == 3

    asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda ref: replace(ref, num_bytes=1), "another bucket of that number"),
        (lambda ref: replace(ref, index=1), "staged before, or not announced"),
        (lambda ref: replace(ref, sender=1), "not announced by this sender"),
        (lambda ref: replace(ref, index=1, base=2), "got base 2, expected None"),
        (lambda ref: replace(bucket(ref.attempt, 1, 4), entries=bucket(1, 1, 4).entries * 2), "twice"),
        (
            lambda ref: replace(ref, index=1, entries=(replace(ref.entries[0], first_row=3, num_rows=1),)),
            "not announced by this sender",
        ),
    ],
)
def test_a_sender_that_contradicts_itself_ends_its_publication(change: Callable, match: str) -> None:
    async def run() -> None:
        publisher, receivers = fleet(live_version=3)
        attempt = await publisher.begin(4, None, PIECES)
        await publisher.stage(bucket(attempt, 0, 4))
        with pytest.raises(SyncRefused, match=match):
            await publisher.stage(change(bucket(attempt, 0, 4)))
        assert publisher.state is State.IDLE and receivers[0].calls[-1] == "drop"

    asyncio.run(run())


def test_an_unfinished_publication_is_superseded_and_its_late_steps_are_refused() -> None:
    async def run() -> None:
        publisher, receivers = fleet()
        receivers[0].gate = asyncio.Event()
        first = await publisher.begin(1, None, PIECES)
        staging = asyncio.ensure_future(publisher.stage(bucket(first, 0, 1)))
        await asyncio.sleep(0.01)
        with pytest.raises(SyncRefused, match="never staged"):
            await publisher.commit(1)
        second = await publisher.begin(1, None, PIECES)
        assert second == first + 1
        receivers[0].gate.set()
        with pytest.raises(SyncRefused, match="it was over by then: version 1: 2 pieces were never staged"):
            await staging
        await asyncio.gather(*(publisher.stage(bucket(second, sender, 1)) for sender in (0, 1)))
        assert (await publisher.commit(1)).version == 1

    asyncio.run(run())


def test_a_commit_that_overtakes_a_bucket_is_refused() -> None:
    async def run() -> None:
        publisher, receivers = fleet()
        receivers[1].gate = asyncio.Event()
        attempt = await publisher.begin(1, None, PIECES)
        staging = [asyncio.ensure_future(publisher.stage(bucket(attempt, sender, 1))) for sender in (0, 1)]
        await asyncio.sleep(0.01)
        with pytest.raises(SyncRefused, match="got the commit while bucket 0 of sender 0, version 1 was being staged"):
            await publisher.commit(1)
        receivers[1].gate.set()
        results = await asyncio.gather(*staging, return_exceptions=True)
        assert all(isinstance(result, SyncRefused) for result in results) and publisher.live_version == 0

    asyncio.run(run())


def test_a_fleet_that_changes_while_staging_refuses_the_publication() -> None:
    async def run() -> None:
        publisher, _ = fleet(3, groups={0: 0, 1: 1, 2: 2})
        attempt = await publisher.begin(1, None, PIECES)
        assert publisher.lose([2]) == {2} and publisher.lose([2]) == set()
        with pytest.raises(SyncRefused, match="left or joined the fleet"):
            await publisher.stage(bucket(attempt, 0, 1))
        attempt = await publisher.begin(1, None, PIECES)
        publisher.restarted({2: ScriptedReceiver()})
        await publisher.catch_up(2, [])
        with pytest.raises(SyncRefused, match="left or joined the fleet"):
            await publisher.stage(bucket(attempt, 0, 1))
        assert (await publish(publisher, 1)).version == 1 and publisher.serving == {0, 1, 2}

    asyncio.run(run())


def test_a_restarted_group_serves_only_after_it_has_caught_up() -> None:
    async def run() -> None:
        publisher, _ = fleet(3, groups={0: 0, 1: 0, 2: 1})
        await publish(publisher, 7)
        anew = {rank: ScriptedReceiver() for rank in (0, 1)}
        publisher.restarted(anew)
        assert publisher.serving == {2}
        kept = [bucket(1, sender, 7) for sender in (0, 1)]
        for wrong, match in (
            ([], "got no buckets"),
            (kept[:1], "rows 3…3 missing"),
            ([kept[0], replace(kept[1], base=6)], "expected full buckets of version 7"),
            ([kept[0], replace(kept[1], segment=None)], "expected full buckets of version 7"),
            ([kept[0], replace(kept[1], version=6)], "expected full buckets of version 7"),
        ):
            with pytest.raises(SyncRefused, match=match):
                await publisher.catch_up(0, wrong)
        anew[1].digest = "another"
        with pytest.raises(SyncRefused, match="got digests"):
            await publisher.catch_up(0, kept)
        assert anew[1].calls[-1] == "drop" and publisher.serving == {2}
        anew[1].digest = "same"
        await asyncio.gather(publisher.catch_up(0, kept), publisher.catch_up(1, kept))
        assert publisher.serving == {0, 1, 2} and anew[0].version == anew[1].version == 7
        expected = ["begin 7 on None", "stage 0", "stage 1", "verify", "arm", "flip"]
        assert anew[0].calls[-6:] == anew[1].calls[-6:] == expected, "both ranks, once"
        await publisher.catch_up(2, [])
        assert (await publish(publisher, 8, base=7)).version == 8 and anew[0].version == 8

    asyncio.run(run())


def test_a_group_dying_or_ahead_while_it_catches_up_stays_out() -> None:
    async def run() -> None:
        publisher, _ = fleet(2, groups={0: 0, 1: 1})
        await publish(publisher, 2)
        kept = [bucket(1, sender, 2) for sender in (0, 1)]
        publisher.restarted({1: ScriptedReceiver(fail_at="stage", fault=EngineDead("gone"))})
        with pytest.raises(EngineDead, match="shard 1: gone"):
            await publisher.catch_up(1, kept)
        publisher.restarted({1: ScriptedReceiver(version=3)})
        with pytest.raises(SyncRefused, match="got version 3 on shard 1"):
            await publisher.catch_up(1, kept)
        assert publisher.serving == {0}

    asyncio.run(run())


def test_a_transport_that_cannot_be_opened_costs_nothing_but_the_open_publication() -> None:
    async def run() -> None:
        publisher, receivers = fleet(config=SyncConfig(**FAST))
        await publisher.begin(1, None, PIECES)
        receivers[1].fail_at = "open_transport"
        with pytest.raises(SyncRefused, match="open_transport failed on 1 of 2 shards: shard 1: no answer"):
            await publisher.open_transport(Rendezvous(host="h", rpc_port=1), 3)
        assert publisher.state is State.IDLE and receivers[0].calls[-2:] == ["drop", "open_transport"]

    asyncio.run(run())
