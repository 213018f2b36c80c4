"""Everything that can go wrong with a message of a publication, one by one, in pairs, and many at once.

The world (tests/rollout/sync_world.py) checks after every forward that all ranks of the group computed
it under one version, byte by byte, and at rest that nothing but a committed version was served, that
everybody serves the live one, and that shadows hold its bytes. Broken participants show that the
checks find what they are there for.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Iterator, Mapping

import pytest

from rollout.config import InFlight
from rollout.errors import EngineDead
from rollout.sync.participant import Participant, Phase
from tests.rollout.sync_network import KILLING, KINDS, KINDS_IN_ORDER, OUTAGES, Violation, VirtualLoop
from tests.rollout.sync_ranks import GROUPS
from tests.rollout.sync_world import World

Faults = Mapping[int, str]
FEWER_KINDS = ("lost", "reply_lost", "doubled", "late_30", "cut_12", "mute_25", "slow_12", *KILLING)
EVERY_NTH_PAIR = 251  # of 78,000, each of which takes some 20 ms; with 1 all are tried
NUM_MANY = 200


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The publisher warns of every fault, of which there are thousands."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def run(faults: Faults, is_delta: bool = True, **options) -> list[str]:
    """Publish again and again, restarting what died, until a publication without a fault of its own has succeeded.

    Messages that were delivered late come during the following publications, and must not harm them.

    Returns:
        The messages of the first publication, restarts included.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        try:
            return runner.run(_run(faults, is_delta, options))
        except (Violation, EngineDead) as fault:
            raise Violation(f"{dict(faults)}, {is_delta=}, {options}: {fault}") from fault


async def _run(faults: Faults, is_delta: bool, options: dict) -> list[str]:
    world = World(faults, **options)
    num_messages = None
    for _ in range(10):
        before = world.network.num_disturbances
        succeeded = await world.publish(world.publisher.live_version + 1, is_delta)
        await world.check_at_rest()
        await world.restart_lost()
        num_messages = num_messages or len(world.network.log)
        if before == world.network.num_disturbances:
            if not succeeded:
                raise Violation("a publication without a fault failed")
            if not world.network.release():
                break
    if world.publisher.serving != set(GROUPS) or min(world.num_forwards.values()) == 0:
        raise Violation(f"only ranks {set(world.publisher.serving)} serve, forwards {world.num_forwards}")
    return world.network.log[:num_messages]


def test_without_faults_every_message_is_sent_once() -> None:
    log = run({})
    per_rank = ["begin", "stage", "stage", "verify", "arm", "flip"]
    expected = ["begin@publisher", "stage@publisher", "stage@publisher", "commit@publisher"]
    assert sorted(log) == sorted(expected + [f"{method}@{rank}" for method in per_rank for rank in GROUPS])


MILD = ("lost", "reply_lost", "doubled", "late_3")


def test_a_single_message_lost_or_doubled_never_costs_a_rank_and_after_the_decision_no_publication() -> None:
    async def publish_once(faults: Faults) -> tuple[bool, World]:
        world = World(faults)
        succeeded = await world.publish(1, is_delta=True)
        await world.check_at_rest()
        return succeeded, world

    for index, label in enumerate(run({})):
        for kind in MILD:
            with asyncio.Runner(loop_factory=VirtualLoop) as runner:
                succeeded, world = runner.run(publish_once({index: kind}))
            assert world.given_up == {} and world.publisher.serving == set(GROUPS), (label, kind)
            assert succeeded == (world.publisher.live_version == 1), (label, kind)
            # Each begin opens an attempt of its own, so that of the first one is from the past.
            is_superseded = label == "begin@publisher" and kind in ("doubled", "late_3")
            if kind == "doubled" or label.startswith(("arm", "flip")) or label.endswith("@publisher"):
                assert succeeded or is_superseded, (label, kind)


@pytest.mark.parametrize(
    "options",
    [{}, {"is_delta": False}, {"is_busy": False}, {"in_flight": InFlight.WAIT}],
    ids=["busy", "full", "idle", "pausing"],
)
def test_any_single_fault_at_any_message(options: dict) -> None:
    kinds = FEWER_KINDS if options else KINDS
    for index, label in enumerate(run({}, **options)):
        for kind in KINDS_IN_ORDER if label.startswith(("pause", "resume")) else kinds:
            run({index: kind}, **options)


def pairs() -> Iterator[dict[int, str]]:
    """Pairs of faults of the first publication; its second half is what it does about the first fault."""
    for first, kind in itertools.product(range(len(run({}))), KINDS):
        for second, other in itertools.product(range(first + 1, len(run({first: kind}))), KINDS):
            yield {first: kind, second: other}


@pytest.mark.slow
def test_pairs_of_faults() -> None:
    for faults in itertools.islice(pairs(), 0, None, EVERY_NTH_PAIR):
        run(faults)


def many(seed: int) -> tuple[dict[int, str], dict]:
    """Three to six faults over two publications, and how the fleet runs."""
    choice = random.Random(seed)
    faults = {choice.randrange(60): choice.choice(KINDS) for _ in range(choice.randint(3, 6))}
    return faults, {"is_delta": choice.random() < 0.7, "is_busy": choice.random() < 0.8}


@pytest.mark.slow
def test_many_faults_at_once() -> None:
    for seed in range(NUM_MANY):
        faults, options = many(seed)
        run(faults, **options)


class SettlesAlone(Participant):
    """Does not care what the others voted."""

    def settle(self, agreed: int) -> bool:
        return super().settle(self.armed_version or self.live_version)


class FlipsOnArming(Participant):
    """Does not wait for the others."""

    def arm(self, attempt: int) -> None:
        super().arm(attempt)
        super().flip(attempt)


class VotesUnarmed(Participant):
    """Votes for what nobody has decided."""

    def vote(self) -> int:
        if self._phase is Phase.VERIFIED:
            self._phase = Phase.ARMED
        return super().vote()


class KeepsItsArm(Participant):
    """Confirms that it dropped, and did not."""

    def drop(self, attempt: int) -> int:
        return self.live_version


class TakesOldMessages(Participant):
    """Takes every message for one of the open attempt."""

    def drop(self, attempt: int) -> int:
        self._over = min(self._over, self._attempt - 1)
        return super().drop(self._attempt)

    def arm(self, attempt: int) -> None:
        super().arm(self._attempt)


class HidesItsFlip(Participant):
    """Says that it dropped what it serves."""

    def drop(self, attempt: int) -> int:
        return super().drop(attempt) - (attempt == self._flipped_attempt)


class LeavesRowsBehind(Participant):
    """Undoes nothing in its shadow."""

    def _end_open_attempt(self) -> None:
        self._store.shadow._undo.clear()
        super()._end_open_attempt()


def around_the_decision() -> list[dict[int, str]]:
    """Both groups cannot be armed in time, so that the publication is refused after its decision."""
    log = run({})
    return [{log.index("arm@0"): kind, log.index("arm@2"): other} for kind in OUTAGES for other in OUTAGES]


def test_arming_fails_in_both_groups() -> None:
    for faults in around_the_decision():
        run(faults)


@pytest.mark.parametrize(
    "broken",
    [SettlesAlone, FlipsOnArming, VotesUnarmed, KeepsItsArm, TakesOldMessages, HidesItsFlip, LeavesRowsBehind],
)
def test_a_broken_participant_is_found(broken: type[Participant]) -> None:
    scenarios = itertools.chain(((faults, {}) for faults in around_the_decision()), map(many, range(NUM_MANY)))
    for faults, options in scenarios:
        try:
            run(faults, participant_class=broken, **options)
        except Violation:
            return
    pytest.fail("none of the runs found it out")
