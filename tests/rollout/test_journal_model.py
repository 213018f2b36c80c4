"""Any interleaving of calls and restarts against a model in dictionaries: nothing lost, nothing given out twice."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from rollout.journal.encoding import encode_chunk
from rollout.journal.errors import JournalConflict
from rollout.journal.opening import open_store
from rollout.journal.outcome import encode_outcome
from rollout.journal.store import Store
from rollout.scheduler.intake import make_group
from rollout.types import ChunkResult, Trajectory
from tests.rollout.journal_cases import chunk_of, config_of, ended, key_of, request_of

GROUPS = ("a", "b", "c")
SAMPLES = 2
LEASE_S = 10.0
RETENTION_S = 30.0
_NUMBERS = itertools.count()

groups = st.sampled_from(GROUPS)
samples = st.integers(0, SAMPLES - 1)
consumers = st.sampled_from(("t", "u"))


class Rolled:
    """The model of one trajectory."""

    def __init__(self, group_id: str, sample: int) -> None:
        self.place = GROUPS.index(group_id), sample
        self.epoch = 0
        self.chunks: list[ChunkResult] = []
        self.is_final = False

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    def expected(self) -> Trajectory:
        group, sample = self.place
        trajectory = make_group(request_of(*GROUPS, n=SAMPLES), group).trajectories[sample]
        for chunk in self.chunks:
            trajectory.append(chunk)
        return ended(trajectory, reward=float(sample)) if self.is_final else trajectory


class JournalMachine(RuleBasedStateMachine):
    """Calls on the store, each in a transaction of its own; a transaction may also be given up half-way."""

    make_dsn: Callable[[], str]

    def __init__(self) -> None:
        super().__init__()
        self.config = config_of(type(self).make_dsn(), check_on_open=False, owner_wait_s=20.0)
        self.store: Store = open_store(self.config)
        self.model: dict[tuple[str, int], Rolled] = {}
        self.finished: list[str] = []
        self.leases: dict[str, tuple[str, float]] = {}
        self.acknowledged: dict[str, float] = {}
        self.compacted: set[str] = set()
        self.now = 0.0

    def teardown(self) -> None:
        self.store.close()

    @rule(group_id=groups)
    def submit(self, group_id: str) -> None:
        place = GROUPS.index(group_id)
        request = request_of(*GROUPS, n=SAMPLES)
        request = request_of(group_id, n=SAMPLES, prompts=request.prompts[place : place + 1])
        with self.store.transaction():
            known = self.store.submit("run", request, "h")
        assert bool(known) == ((group_id, 0) in self.model)
        if known:
            assert known[0].is_acknowledged == (group_id in self.acknowledged)
        for sample in range(SAMPLES):
            self.model.setdefault((group_id, sample), Rolled(group_id, sample))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), size=st.integers(1, 9), seed=st.integers(0, 3), is_given_up=st.booleans())
    def append(self, data: st.DataObject, size: int, seed: int, is_given_up: bool) -> None:
        place = data.draw(st.sampled_from(sorted(self.model)))
        rolled, key, chunk = self.model[place], key_of(*place), chunk_of(size, seed)
        encoded = encode_chunk((key, rolled.epoch, rolled.num_tokens), chunk)
        if rolled.is_final:
            with pytest.raises(JournalConflict), self.store.transaction():
                self.store.append_chunk(key, rolled.epoch, rolled.num_tokens, encoded)
            return
        with contextlib.suppress(InterruptedError), self.store.transaction():
            assert self.store.append_chunk(key, rolled.epoch, rolled.num_tokens, encoded)
            if is_given_up:
                raise InterruptedError
        if not is_given_up:
            rolled.chunks.append(chunk)

    @precondition(lambda self: any(rolled.chunks for rolled in self.model.values()))
    @rule(data=st.data(), is_same=st.booleans())
    def repeat(self, data: st.DataObject, is_same: bool) -> None:
        place = data.draw(st.sampled_from(sorted(p for p, r in self.model.items() if r.chunks)))
        if place[0] in self.compacted:
            return
        rolled, key = self.model[place], key_of(*place)
        nth = data.draw(st.integers(0, len(rolled.chunks) - 1))
        start = sum(len(chunk.token_ids) for chunk in rolled.chunks[:nth])
        chunk = rolled.chunks[nth] if is_same else chunk_of(len(rolled.chunks[nth].token_ids), 99)
        encoded = encode_chunk((key, rolled.epoch, start), chunk)
        with contextlib.nullcontext() if is_same else pytest.raises(JournalConflict), self.store.transaction():
            assert not self.store.append_chunk(key, rolled.epoch, start, encoded)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(sorted(self.model)))
        rolled = self.model[place]
        if rolled.is_final:
            return
        with self.store.transaction():
            assert self.store.restart(key_of(*place), rolled.epoch + 1)
        rolled.epoch, rolled.chunks = rolled.epoch + 1, []

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(sorted(self.model)))
        rolled, key = self.model[place], key_of(*place)
        if rolled.is_final:
            return
        rolled.is_final = True
        with self.store.transaction():
            assert self.store.finish(key, rolled.epoch, encode_outcome(key, rolled.epoch, rolled.expected()))
        if all(self.model[place[0], sample].is_final for sample in range(SAMPLES)):
            self.finished.append(place[0])

    @rule(consumer=consumers, most=st.integers(1, 3))
    def lease(self, consumer: str, most: int) -> None:
        free = [g for g in self.finished if g not in self.acknowledged and self._is_free(g)]
        with self.store.transaction():
            leased = self.store.lease("run", consumer, most, LEASE_S, self.now)
        assert [group_id for _, group_id in leased] == free[:most]
        for group in self.store.reader.load([key for key, _ in leased]):
            assert group.to_group().trajectories == [
                self.model[group.group_id, sample].expected() for sample in range(SAMPLES)
            ]
            self.leases[group.group_id] = consumer, self.now + LEASE_S

    def _is_free(self, group_id: str) -> bool:
        return group_id not in self.leases or self.leases[group_id][1] <= self.now

    @rule(consumer=consumers)
    def release(self, consumer: str) -> None:
        own = [g for g, (owner, _) in self.leases.items() if owner == consumer]
        with self.store.transaction():
            assert self.store.release("run", consumer) == len(own)
        for group_id in own:
            del self.leases[group_id]

    @precondition(lambda self: self.finished)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        group_id = data.draw(st.sampled_from(self.finished))
        with self.store.transaction():
            count = self.store.acknowledge("run", [group_id], "step", self.now)
        assert count == (group_id not in self.acknowledged)
        self.acknowledged.setdefault(group_id, self.now)
        self.leases.pop(group_id, None)

    @rule(seconds=st.sampled_from((1.0, LEASE_S, RETENTION_S)))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def compact(self) -> None:
        due = {g for g, at in self.acknowledged.items() if at <= self.now - RETENTION_S} - self.compacted
        with self.store.transaction():
            assert self.store.compact_some(self.now - RETENTION_S) == len(due)
        self.store.tidy()
        self.compacted |= due

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = open_store(self.config)

    @invariant()
    def unfinished_groups_are_what_the_model_says(self) -> None:
        found = self.store.reader.load(self.store.reader.unfinished_keys())
        expected = {g for g, _ in self.model} - set(self.finished)
        assert {one.group_id for one in found} == expected
        for one in found:
            assert [t.epoch for t in one.trajectories] == [self.model[one.group_id, i].epoch for i in range(SAMPLES)]
            assert one.to_group().trajectories == [self.model[one.group_id, i].expected() for i in range(SAMPLES)]


def check(make_dsn: Callable[[], str], max_examples: int) -> None:
    machine = type("Machine", (JournalMachine,), {"make_dsn": staticmethod(make_dsn)})
    chosen = settings(
        max_examples=max_examples, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(machine, settings=chosen)


def test_any_interleaving_on_sqlite(tmp_path: Path) -> None:
    check(lambda: f"sqlite:///{tmp_path / f'{next(_NUMBERS)}.db'}", 40)


def test_any_interleaving_on_postgres(fresh_schema_dsn: Callable[[], str]) -> None:
    check(fresh_schema_dsn, 15)
