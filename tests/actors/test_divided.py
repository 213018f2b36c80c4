"""Divided rollouts on real engines: cut anywhere, moved anywhere, and with the controller dead in between."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from actors.service import Service
from launch.near_ties import compare, near_tie
from rollout.client import RolloutClient
from rollout.config import JournalConfig, SchedulerConfig
from rollout.journal.opening import open_reader
from rollout.scheduler.jobs import ShardCapacity
from rollout.scheduler.scheduler import Scheduler
from rollout.types import Group, ModelLimits, Prompt, RolloutRequest, SamplingParams, Status, Trajectory, VersionSpan

pytestmark = pytest.mark.engine

CHUNK_TOKENS = 7
NUM_TOKENS = 90  # not a multiple of a chunk
N = 4
SAMPLING = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
DURABLE_BEFORE_DEATH = 3 * CHUNK_TOKENS  # of each trajectory, on average
WITHIN = near_tie("float32", SAMPLING.temperature)


def request(*group_ids: str, run_id: str | None = None) -> RolloutRequest:
    draw = random.Random(4)
    prompts = tuple(
        Prompt(token_ids=tuple(draw.randrange(3, 500) for _ in range(draw.randrange(20, 60))), prompt_id=group_id)
        for group_id in group_ids
    )
    return RolloutRequest(
        prompts=prompts, n_samples_per_prompt=N, sampling=SAMPLING, run_seed=3, group_ids=group_ids, run_id=run_id
    )


def submitted(client: RolloutClient, asked: RolloutRequest) -> Iterator[Group]:
    handle = client.submit(
        asked.prompts,
        N,
        SAMPLING,
        run_seed=asked.run_seed,
        group_ids=asked.group_ids,
        run_id=asked.run_id,
    )
    return client.groups(handle)


def by_id(groups: list[Group]) -> dict[str, Trajectory]:
    return {t.trajectory_id: t for group in groups for t in group.trajectories}


def check_same(groups: list[Group], others: list[Group], vocab_size: int) -> None:
    """All tokens are the same; one trajectory in eight may part at a near tie."""
    ours, theirs = by_id(groups), by_id(others)
    assert ours.keys() == theirs.keys()
    found = []
    for name, a in ours.items():
        b = theirs[name]
        assert len(a.token_ids) == len(b.token_ids) == NUM_TOKENS and a.status is b.status is Status.TRUNCATED
        difference = compare(
            (a.token_ids, a.logprobs),
            (b.token_ids, b.logprobs),
            seed=a.seed,
            num_prompt_tokens=len(a.prompt_token_ids),
            temperature=SAMPLING.temperature,
            vocab_size=vocab_size,
            within=WITHIN,
        )
        assert difference is None or difference.is_near_tie, f"{name}: {difference}"
        found += [difference] if difference is not None else []
    assert len(found) <= len(ours) // 8, [str(one) for one in found]


class Drains:
    """Drains one shard after the other, each for a random number of chunks."""

    def __init__(self, scheduler: Scheduler, capacities: dict[int, ShardCapacity]) -> None:
        self._scheduler, self._capacities = scheduler, capacities
        self._draw = random.Random(7)
        self._draining: int | None = None
        self._num_left = CHUNK_TOKENS

    def after_chunk(self) -> None:
        self._num_left -= 1
        if self._num_left > 0 or (self._draining is not None and self._scheduler.running_on(self._draining)):
            return
        if self._draining is not None:
            self._scheduler.on_shard_up(self._draining, self._capacities[self._draining])
        others = [rank for rank in self._capacities if rank != self._draining]
        self._draining = self._draw.choice(others)
        self._num_left = self._draw.randint(3, 12)
        self._scheduler.drain(self._draining)


def drive(
    service: Service, scheduler: Scheduler, asked: RolloutRequest, after_chunk: Callable[[], None]
) -> list[Group]:
    """What a controller does, without one: so that a test can drain shards between any two chunks."""
    scheduler.submit("divided", asked, time.monotonic())
    waiting: set[ray.ObjectRef] = set()
    groups: list[Group] = []
    while len(groups) < len(asked.prompts):
        for dispatch in scheduler.next_dispatches(time.monotonic()):
            waiting.add(service.shards[dispatch.shard].generate.remote(dispatch.chunk))
        for rank, flight_ids in scheduler.take_cuts(time.monotonic()).items():
            service.shards[rank].abort.remote(flight_ids)
        done, rest = ray.wait(list(waiting), num_returns=1)
        waiting = set(rest)
        for result in ray.get(done):
            scheduler.on_chunk(result, time.monotonic())
            after_chunk()
        groups += [finished.group for finished in scheduler.book.take_finished()]
    return groups


def test_a_group_that_is_cut_and_moved_has_the_tokens_of_one_that_runs_whole(service: Service) -> None:
    asked = request("cut/0", "cut/1")
    whole = list(submitted(service.client, asked))
    info, live = service.infos[0], service.client.stats().live_version
    capacities = {
        one.rank: ShardCapacity(max_running=3, kv_tokens=one.kv_tokens, block_tokens=one.block_tokens, group=one.group)
        for one in service.infos
    }
    scheduler = Scheduler(
        SchedulerConfig(policy="divided", chunk_tokens=CHUNK_TOKENS),
        ModelLimits(vocab_size=info.vocab_size, max_model_len=info.max_model_len),
        capacities,
        version=live,
    )
    divided = drive(service, scheduler, asked, Drains(scheduler, capacities).after_chunk)
    check_same(divided, whole, info.vocab_size)
    counts = scheduler.dispatch_counts
    assert counts.num_chunks >= 2 * N * -(-NUM_TOKENS // CHUNK_TOKENS)
    assert counts.num_cuts > 0, "no shard was drained while it ran something"
    assert counts.num_migrations >= 2 * N, "trajectories hardly moved"
    for trajectory in by_id(divided).values():
        assert trajectory.weight_versions == [VersionSpan(version=live, start=0, stop=NUM_TOKENS)]
        assert len(trajectory.metadata["shards"]) >= -(-NUM_TOKENS // CHUNK_TOKENS)
    assert {rank for t in by_id(divided).values() for rank in t.metadata["shards"]} == {0, 1}


@contextmanager
def journaled(service: Service, dsn: str) -> Iterator[Service]:
    """The same shards behind a further controller, which cuts and has a journal."""
    assert service.parts is not None
    other = replace(
        service,
        namespace="tests-divided",
        controller=None,
        parts=replace(
            service.parts,
            scheduler=SchedulerConfig(policy="divided", chunk_tokens=CHUNK_TOKENS),
            journal=JournalConfig(dsn=dsn),
        ),
    )
    other.start_controller(service.client.stats().live_version)
    try:
        yield other
    finally:
        ray.get(other.controller.shutdown.remote())
        ray.kill(other.controller)


def num_durable(dsn: str, run_id: str) -> int:
    """Tokens in the journal; the reader checks that the chunks of each trajectory follow one another."""
    with open_reader(JournalConfig(dsn=dsn)) as reader:
        groups = reader.load(reader.run_keys(run_id))
    return sum(one.num_tokens for group in groups for one in group.trajectories)


def test_a_second_controller_goes_on_where_the_first_was_killed(service: Service, tmp_path: Path) -> None:
    dsn = f"sqlite:///{tmp_path / 'journal.sqlite'}"
    asked = request("killed/0", "killed/1", run_id="killed")
    num_trajectories = N * len(asked.prompts)
    undisturbed = list(submitted(service.client, replace(asked, run_id=None)))
    with journaled(service, dsn) as other:
        client = other.client
        handle = client.submit(asked.prompts, N, SAMPLING, run_seed=3, group_ids=asked.group_ids, run_id=asked.run_id)
        while client.progress(handle).num_tokens < num_trajectories * DURABLE_BEFORE_DEATH:
            time.sleep(0.005)
        ray.kill(other.controller)
        other.replace_controller()
        durable = num_durable(dsn, "killed")
        groups = list(submitted(other.client, asked))
        num_generated = other.client.stats().num_tokens_generated
    check_same(groups, undisturbed, service.infos[0].vocab_size)
    total = num_trajectories * NUM_TOKENS
    assert 0 < durable < total, "it died before anything was durable, or after everything was"
    assert num_generated == total - durable, "what was durable was generated again, or something was lost"
    assert num_durable(dsn, "killed") == total
