"""The worker's state machine: what it takes, what it refuses, and what a doubled message does."""

from __future__ import annotations

import pytest
import torch

from rollout.errors import EngineDead, SyncRefused
from rollout.sync.manifest import BucketRef
from rollout.sync.participant import Participant, Phase

PAYLOAD = torch.zeros(0, dtype=torch.uint8)


class RecordingStore:
    """Keeps what it was told; fails where it was told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.left = ["w rows 0…3 missing"]
        self.faults: dict[str, Exception] = {}

    def _did(self, call: str) -> None:
        self.calls.append(call)
        fault = self.faults.pop(call.split()[0], None)
        if fault is not None:
            raise fault

    def begin(self, base: int | None) -> None:
        self._did(f"begin {base}")

    def stage(self, ref: BucketRef, payload: torch.Tensor) -> None:
        self._did(f"stage {ref.index}")
        self.left = []

    def missing(self) -> list[str]:
        return self.left

    def digest(self) -> str:
        return "digest"

    def prepare(self) -> None:
        self._did("prepare")

    def flip(self, version: int) -> None:
        self._did(f"flip {version}")

    def undo(self) -> None:
        self._did("undo")


def ref(attempt: int, version: int = 6, base: int | None = 5, index: int = 0, num_bytes: int = 0) -> BucketRef:
    return BucketRef(
        version=version,
        attempt=attempt,
        base=base,
        sender=0,
        index=index,
        segment=None,
        num_bytes=num_bytes,
        entries=(),
    )


def participant(live_version: int = 5) -> tuple[Participant, RecordingStore]:
    store = RecordingStore()
    return Participant(store, live_version), store


def armed(attempt: int = 1, version: int = 6) -> tuple[Participant, RecordingStore]:
    worker, store = participant()
    worker.begin(attempt, version, 5)
    worker.stage(ref(attempt, version), PAYLOAD)
    worker.verify(attempt)
    worker.arm(attempt)
    store.calls.clear()
    return worker, store


def test_a_version_is_served_once_the_group_agrees() -> None:
    worker, store = participant()
    worker.begin(1, 6, 5)
    assert (worker.state, worker.vote(), worker.settle(5)) == (Phase.STAGING, 5, False)
    worker.stage(ref(1), PAYLOAD)
    assert worker.verify(1) == "digest"
    assert (worker.state, worker.vote(), worker.settle(5), worker.armed_version) == (Phase.VERIFIED, 5, False, None)
    worker.arm(1)
    assert (worker.armed_version, worker.vote(), worker.settle(5), worker.live_version) == (6, 6, False, 5)
    assert (worker.vote(), worker.settle(6), worker.live_version, worker.armed_version) == (6, True, 6, None)
    assert (worker.vote(), worker.settle(6), worker.state) == (6, False, Phase.IDLE)
    assert store.calls == ["begin 5", "stage 0", "prepare", "flip 6"]


def test_a_rank_that_flipped_first_pulls_the_others_along() -> None:
    first, _ = armed()
    second, _ = armed()
    assert first.flip(1) == 6
    votes = [first.vote(), second.vote()]
    assert [first.settle(min(votes)), second.settle(min(votes))] == [False, True]
    assert first.live_version == second.live_version == 6


def test_doubled_messages_are_answered_again_and_do_nothing() -> None:
    worker, store = participant()
    for _ in range(2):
        worker.begin(1, 6, 5)
    worker.stage(ref(1), PAYLOAD)
    worker.begin(1, 6, 5)
    assert worker.has_staged(ref(1)) and not worker.has_staged(ref(1, num_bytes=16))
    worker.stage(ref(1), PAYLOAD)
    assert worker.verify(1) == worker.verify(1) == "digest"
    worker.stage(ref(1), PAYLOAD)
    for _ in range(2):
        worker.arm(1)
    worker.begin(1, 6, 5)
    assert worker.verify(1) == "digest" and worker.state is Phase.ARMED
    assert worker.flip(1) == worker.flip(1) == 6
    worker.arm(1)
    assert worker.verify(1) == "digest"
    assert worker.drop(1) == worker.drop(1) == 6, "what has flipped stands"
    assert (worker.live_version, worker.state) == (6, Phase.IDLE)
    assert store.calls == ["begin 5", "stage 0", "prepare", "flip 6"]


@pytest.mark.parametrize("phase", [Phase.STAGING, Phase.VERIFIED, Phase.ARMED])
def test_drop_undoes_and_late_messages_of_the_attempt_are_refused(phase: Phase) -> None:
    worker, store = participant()
    worker.begin(3, 6, 5)
    worker.stage(ref(3), PAYLOAD)
    if phase is not Phase.STAGING:
        worker.verify(3)
    if phase is Phase.ARMED:
        worker.arm(3)
    assert worker.drop(3) == 5 and worker.drop(3) == 5 and worker.state is Phase.IDLE
    assert store.calls.count("undo") == 1 and worker.vote() == 5 and not worker.settle(5)
    calls = list(store.calls)
    for late in (
        lambda: worker.begin(3, 6, 5),
        lambda: worker.stage(ref(3), PAYLOAD),
        lambda: worker.verify(3),
        lambda: worker.arm(3),
        lambda: worker.flip(3),
    ):
        with pytest.raises(SyncRefused, match="message from the past: got attempt 3"):
            late()
    assert store.calls == calls and not worker.has_staged(ref(3))


def test_an_attempt_that_was_dropped_before_it_began_never_begins() -> None:
    worker, store = participant()
    assert worker.drop(4) == 5
    with pytest.raises(SyncRefused, match="got attempt 4, expected one above 4"):
        worker.begin(4, 6, 5)
    worker.begin(5, 6, 5)
    assert worker.drop(4) == 5 and worker.drop(2) == 5 and worker.state is Phase.STAGING, "a late drop"
    assert store.calls == ["begin 5"]


def test_a_later_attempt_supersedes_an_open_one_armed_or_not() -> None:
    worker, store = armed()
    worker.begin(2, 6, None)
    assert worker.state is Phase.STAGING and worker.vote() == 5 and not worker.settle(5)
    assert store.calls == ["undo", "begin None"]
    with pytest.raises(SyncRefused, match="message from the past"):
        worker.flip(1)
    worker, store = armed()
    assert worker.drop(2) == 5 and store.calls == ["undo"], "the drop of a later attempt ends an older one, too"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((1, 5, None), "expected one above the live version 5"),
        ((1, 4, None), "got 4"),
        ((1, 6, 4), "base: got 4, expected the live version 5; send everything"),
        ((0, 6, 5), "message from the past"),
    ],
)
def test_begin_refuses_what_does_not_follow(arguments: tuple, match: str) -> None:
    worker, store = participant()
    with pytest.raises(SyncRefused, match=match):
        worker.begin(*arguments)
    assert worker.state is Phase.IDLE and store.calls == []


def test_messages_out_of_order_are_refused_and_end_nothing() -> None:
    worker, _store = participant()
    for early in (lambda: worker.verify(1), lambda: worker.arm(1), lambda: worker.flip(1)):
        with pytest.raises(SyncRefused, match=r"expected begin\(\) first"):
            early()
    worker.begin(1, 6, 5)
    with pytest.raises(SyncRefused, match="got version 7 on 5, expected version 6 on 5"):
        worker.begin(1, 7, 5)
    for wrong in (ref(1, version=7), ref(1, base=None)):
        with pytest.raises(SyncRefused, match="expected version 6 on 5"):
            worker.stage(wrong, PAYLOAD)
    with pytest.raises(SyncRefused, match="never staged: w rows 0…3 missing"):
        worker.verify(1)
    with pytest.raises(SyncRefused, match="got it while staging, expected verified or armed"):
        worker.arm(1)
    worker.stage(ref(1), PAYLOAD)
    with pytest.raises(SyncRefused, match="another bucket of that number"):
        worker.stage(ref(1, num_bytes=16), PAYLOAD)
    worker.verify(1)
    with pytest.raises(SyncRefused, match="got it while verified, expected armed"):
        worker.flip(1)
    with pytest.raises(SyncRefused, match="a version that is verified"):
        worker.stage(ref(1, index=1), PAYLOAD)
    worker.arm(1)
    assert worker.flip(1) == 6


@pytest.mark.parametrize(
    ("step", "fault"),
    [("stage", SyncRefused("digest")), ("stage", MemoryError()), ("prepare", RuntimeError("no memory"))],
)
def test_a_fault_of_the_store_before_the_decision_ends_the_attempt(step: str, fault: Exception) -> None:
    worker, store = participant()
    store.faults[step] = fault
    worker.begin(1, 6, 5)
    with pytest.raises(SyncRefused):
        worker.stage(ref(1), PAYLOAD)
        worker.verify(1)
    assert store.calls[-1] == "undo" and worker.state is Phase.IDLE
    with pytest.raises(SyncRefused, match="message from the past"):
        worker.verify(1)
    worker.begin(2, 6, 5)
    assert worker.state is Phase.STAGING


def test_a_fault_inside_a_flip_ends_the_engine() -> None:
    worker, store = armed()
    store.faults["flip"] = RuntimeError("device lost")
    worker.vote()
    with pytest.raises(EngineDead, match="failed inside the flip"):
        worker.settle(6)
    for anything in (worker.vote, lambda: worker.drop(1), lambda: worker.flip(1), lambda: worker.begin(2, 7, None)):
        with pytest.raises(EngineDead, match="must be restarted"):
            anything()


@pytest.mark.parametrize("agreed", [4, 7])
def test_a_group_that_cannot_serve_one_version_stops(agreed: int) -> None:
    """4: a rank that was restarted and has not caught up votes; 7: a minimum above what this rank voted."""
    worker, store = armed()
    worker.vote()
    with pytest.raises(EngineDead, match=f"agreed on version {agreed}, expected the live version 5 or the armed one"):
        worker.settle(agreed)
    assert store.calls == []


def test_nothing_that_moves_the_vote_is_taken_between_vote_and_settle() -> None:
    worker, _ = armed()
    worker.vote()
    for message in (lambda: worker.drop(1), lambda: worker.flip(1), lambda: worker.begin(2, 7, None)):
        with pytest.raises(SyncRefused, match="between the vote and the flip"):
            message()
    assert worker.settle(6) and worker.drop(1) == 6
