"""The dispatcher under arbitrary orders of events, for every policy, and its single rules."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.config import DispatchConfig
from rollout.scheduler.dispatcher import MAX_PASSED, Dispatcher
from rollout.scheduler.jobs import Job, JobState, ShardCapacity
from rollout.scheduler.shard_book import whole_blocks

BLOCK = 4


def a_job(name, *, group="g", order=0, prompt=4, most=40, tokens=0, priority=0):
    return Job(
        job_id=name,
        group_id=group,
        order=order,
        num_prompt_tokens=prompt,
        max_tokens=most,
        num_tokens=tokens,
        priority=priority,
    )


def a_dispatcher(policy="divided", num_shards=2, chunk=8, slots=2, kv=1000):
    capacity = ShardCapacity(max_running=slots, kv_tokens=kv, block_tokens=BLOCK)
    config = DispatchConfig(policy=policy, chunk_tokens=chunk)
    return Dispatcher(config, dict.fromkeys(range(num_shards), capacity))


def names(assignments):
    return [one.job_id for one in assignments]


class World:
    """Shards that run what they are given, and events in any order; checks the dispatcher after each of them.

    The true length of a job is hidden from the dispatcher until it ends.
    """

    def __init__(self, seed, policy, num_shards, chunk, slots, kv):
        self.rng, self.policy, self.slots, self.kv = random.Random(seed), policy, slots, kv
        self.capacity = ShardCapacity(max_running=slots, kv_tokens=kv, block_tokens=BLOCK)
        self.dispatcher = a_dispatcher(policy, num_shards, chunk, slots, kv)
        self.length, self.tokens, self.running, self.held = {}, {}, {}, set()
        self.added, self.ended, self.removed = [], [], []
        self.up, self.draining = set(range(num_shards)), set()
        self.shard_of_group = {}

    def add_group(self):
        number, priority = len(self.added), self.rng.choice([0, 0, 0, -1])
        for i in range(number, number + 3):
            begun = self.rng.choice([0, 0, 5])
            job = a_job(f"j{i}", group=f"g{number}", order=i, tokens=begun, priority=priority)
            self.length[job.job_id], self.tokens[job.job_id] = self.rng.randint(begun + 1, job.max_tokens), begun
            self.added.append(job.job_id)
            self.dispatcher.add(job, 0.0)

    def start(self):
        for one in self.dispatcher.next_assignments(0.0):
            assert one.job_id not in self.running and one.job_id not in self.held
            assert one.shard in self.up - self.draining
            assert 0 < one.budget_tokens <= 40 - self.tokens[one.job_id]
            self.running[one.job_id] = one
            group = self.dispatcher.job(one.job_id).group_id
            if self.policy == "static":
                assert self.shard_of_group.setdefault(group, one.shard) == one.shard

    def check(self):
        book = self.dispatcher.book
        for rank in self.up:
            here = [one for one in self.running.values() if one.shard == rank]
            assert sorted(self.dispatcher.running_on(rank)) == sorted(one.job_id for one in here)
            kept = book[rank].kept
            assert len(here) + min(1, len(kept)) <= self.slots and kept <= self.held
            for name, tokens in book[rank].waiting.items():
                job = self.dispatcher.job(name)
                assert (job.state, job.home, job.context_tokens) == (JobState.QUEUED, rank, tokens)
            assert book[rank].waiting_tokens == sum(book[rank].waiting.values())
            needed = sum(whole_blocks(4 + self.tokens[one.job_id] + one.budget_tokens, BLOCK) for one in here)
            assert book[rank].reserved_tokens == needed
            assert self.policy != "divided" or needed <= self.kv
        over = {*self.ended, *self.removed}
        assert self.dispatcher.num_running == len(self.running)
        assert self.dispatcher.num_queued == len(self.added) - len(over) - len(self.running) - len(self.held)
        assert all((self.dispatcher.job(name) is None) == (name in over) for name in self.added)

    def finish(self, name, *, is_whole):
        """A chunk comes back: at its budget or the job's end, or earlier, as after a cut."""
        one = self.running.pop(name)
        left = self.length[name] - self.tokens[name]
        num = min(one.budget_tokens, left)
        num = num if is_whole else self.rng.randint(0, num)
        self.tokens[name] += num
        self.dispatcher.hold(name, num, 0.0, duration_s=0.01 * num)
        self.held.add(name)
        if self.rng.random() < 0.7:
            self.go_on(name)

    def go_on(self, name):
        self.held.discard(name)
        if self.tokens[name] == self.length[name]:
            self.dispatcher.end(name)
            self.ended.append(name)
        else:
            self.dispatcher.resume(name)

    def remove(self):
        under_way = [name for name in self.added if name not in self.ended and name not in self.removed]
        if under_way:
            name = self.rng.choice(under_way)
            self.dispatcher.remove(name)
            self.running.pop(name, None)
            self.held.discard(name)
            self.removed.append(name)

    def down(self, rank):
        lost = self.dispatcher.on_shard_down(rank)
        assert sorted(lost) == sorted(name for name, one in self.running.items() if one.shard == rank)
        for name in lost:
            del self.running[name]
        self.up.discard(rank)
        self.deal_again(rank)

    def bring_up(self, rank):
        self.dispatcher.on_shard_up(rank, self.capacity)
        self.up.add(rank)
        self.draining.discard(rank)

    def drain(self, rank):
        self.dispatcher.drain(rank)
        self.draining.add(rank)
        self.deal_again(rank)

    def deal_again(self, rank):
        """Groups of a shard that takes nothing more are dealt to others under static."""
        self.shard_of_group = {group: shard for group, shard in self.shard_of_group.items() if shard != rank}

    def cut(self):
        cuts = self.dispatcher.take_cuts(0.0)
        assert len({name for _, name in cuts}) == len(cuts)
        for rank, name in cuts:
            assert self.running[name].shard == rank
            self.finish(name, is_whole=False)

    def step(self):
        draw, down = self.rng.random(), set(self.dispatcher.book.ranks) - self.up
        if draw < 0.08:
            self.add_group()
        elif draw < 0.12:
            self.remove()
        elif draw < 0.2 and self.up:
            self.rng.choice([self.down, self.down, self.drain])(self.rng.choice(sorted(self.up)))
        elif draw < 0.28 and down:
            self.bring_up(self.rng.choice(sorted(down)))
        elif draw < 0.38:
            self.cut()
        elif draw < 0.5 and self.held:
            self.go_on(self.rng.choice(sorted(self.held)))
        elif self.running:
            self.finish(self.rng.choice(sorted(self.running)), is_whole=self.rng.random() < 0.8)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    policy=st.sampled_from(["static", "partial", "divided"]),
    num_shards=st.integers(1, 3),
    chunk=st.sampled_from([None, 1, 8]),
    slots=st.integers(1, 3),
    kv=st.sampled_from([44, 60, 400]),  # 44: one job at its longest, and nothing beside it
)
def test_nothing_is_lost_or_doubled_and_nothing_is_over_reserved(seed, policy, num_shards, chunk, slots, kv):
    world = World(seed, policy, num_shards, chunk, slots, kv)
    for _ in range(120):
        world.step()
        world.start()
        world.check()
    for rank in range(num_shards):  # everything serves again: all that is left must end
        if rank in world.draining & world.up:
            world.down(rank)
        if rank not in world.up:
            world.bring_up(rank)
    for name in sorted(world.held):
        world.go_on(name)
    most_chunks = sum(world.length.values()) + len(world.added)  # each brings a token at least
    for _ in range(most_chunks):
        world.start()
        world.check()
        if not world.running:
            break
        world.finish(next(iter(world.running)), is_whole=True)
        for name in sorted(world.held):
            world.go_on(name)
    assert sorted(world.ended + world.removed) == sorted(world.added)
    assert (world.dispatcher.num_queued, world.dispatcher.num_running) == (0, 0)


@pytest.mark.parametrize("policy", ["static", "partial", "divided"])
def test_max_running_is_kept_and_the_load_is_spread(policy):
    dispatcher = a_dispatcher(policy)
    for i in range(12):
        dispatcher.add(a_job(f"j{i}", group=f"g{i}", order=i), 0.0)
    started = dispatcher.next_assignments(0.0)
    assert sorted(one.shard for one in started) == [0, 0, 1, 1]
    assert dispatcher.num_queued == 8 and dispatcher.next_assignments(0.0) == []


def test_static_keeps_a_group_on_its_shard_and_runs_it_whole():
    dispatcher = a_dispatcher("static", slots=4)
    for i in range(8):
        dispatcher.add(a_job(f"j{i}", group=f"g{i // 4}", order=i), 0.0)
    started = dispatcher.next_assignments(0.0)
    assert {one.job_id: one.shard for one in started} == {f"j{i}": i // 4 for i in range(8)}
    assert {one.budget_tokens for one in started} == {40}


def test_static_waits_without_any_shard_and_goes_on_with_the_first_that_serves():
    dispatcher = a_dispatcher("static", num_shards=1, slots=1)
    for i in range(2):
        dispatcher.add(a_job(f"j{i}", order=i), 0.0)
    assert names(dispatcher.next_assignments(0.0)) == ["j0"]
    assert dispatcher.on_shard_down(0) == ["j0"] and dispatcher.next_assignments(0.0) == []
    dispatcher.on_shard_up(0, ShardCapacity(max_running=2, kv_tokens=1000, block_tokens=BLOCK))
    assert sorted(names(dispatcher.next_assignments(0.0))) == ["j0", "j1"]


def test_what_waits_for_a_drained_shard_under_static_starts_when_another_has_room():
    dispatcher = a_dispatcher("static", slots=1)
    for i in range(4):
        dispatcher.add(a_job(f"j{i}", group=f"g{i // 2}", order=i), 0.0)
    assert names(dispatcher.next_assignments(0.0)) == ["j0", "j2"]
    dispatcher.drain(0)
    [(shard, cut)] = dispatcher.take_cuts(0.0)
    assert (shard, cut) == (0, "j0")
    dispatcher.hold("j0", 3, 0.0)
    dispatcher.resume("j0")
    ran = ["j2"]
    for _ in range(3):
        dispatcher.on_chunk(ran[-1], 1, True, 0.0)
        [one] = dispatcher.next_assignments(0.0)
        assert one.shard == 1
        ran.append(one.job_id)
    assert sorted(ran) == ["j0", "j1", "j2", "j3"]


def test_divided_probes_every_group_first_and_then_takes_the_longest_expected():
    dispatcher = a_dispatcher(num_shards=1, chunk=None, slots=1)
    for group in ("short", "long"):
        for i in range(3):
            dispatcher.add(a_job(f"{group}{i}", group=group, order=len(group) * 10 + i), 0.0)
    order, lengths = [], {"short": 5, "long": 15}  # of at most 40: neither is long
    while started := names(dispatcher.next_assignments(0.0)):
        order += started
        dispatcher.on_chunk(started[0], lengths[started[0][:-1]], True, 0.0)
    assert sorted(order[:2]) == ["long0", "short0"]
    assert order[2:] == ["long1", "long2", "short1", "short2"]


def test_a_continuation_returns_home_and_comes_before_what_has_not_begun():
    dispatcher = a_dispatcher(slots=1)
    for i in range(4):
        dispatcher.add(a_job(f"j{i}", group=f"g{i}", order=i), 0.0)
    home = {one.job_id: one.shard for one in dispatcher.next_assignments(0.0)}
    for _ in range(4):
        for name in home:
            dispatcher.on_chunk(name, 8, False, 0.0)
        assert {one.job_id: one.shard for one in dispatcher.next_assignments(0.0)} == home
    assert dispatcher.counts.num_migrations == 0


@given(prompt=st.integers(1, 40), chunk=st.integers(1, 40))
def test_a_chunk_ends_one_token_into_a_block(prompt, chunk):
    """What a continuation computes again is then its last token alone: the others' KV lies in whole blocks."""
    dispatcher = a_dispatcher(num_shards=1, chunk=chunk, slots=1)
    dispatcher.add(a_job("j", prompt=prompt, most=200), 0.0)
    tokens = 0
    while tokens < 200:
        [one] = dispatcher.next_assignments(0.0)
        tokens += one.budget_tokens
        if chunk < 2 * BLOCK or tokens == 200:
            assert one.budget_tokens <= chunk + BLOCK
        else:
            assert chunk <= one.budget_tokens < chunk + BLOCK and (prompt + tokens) % BLOCK == 1
        dispatcher.on_chunk("j", one.budget_tokens, tokens == 200, 0.0)
    assert dispatcher.counts.num_trimmed == 0


def visited(dispatcher, group, length, most):
    """The prompt of a group has been seen, and this long."""
    dispatcher.remember(f"prompt of {group}", length)
    return lambda i: replace(a_job(f"{group}/{i}", group=group, order=i, most=most), prompt_key=f"prompt of {group}")


def ends_in_rounds(dispatcher, lengths, chunk):
    """Chunks of one shard that take equally long: after how many rounds each job ended."""
    ends, tokens, rounds = {}, dict.fromkeys(lengths, 0), 0
    while len(ends) < len(lengths):
        rounds += 1
        for name in names(dispatcher.next_assignments(0.0)):
            num = min(chunk, lengths[name] - tokens[name])
            tokens[name] += num
            if tokens[name] == lengths[name]:
                ends[name] = rounds
            dispatcher.on_chunk(name, num, name in ends, 0.0)
    return ends


@pytest.mark.parametrize("chunk", [4, 8])
def test_one_more_long_job_than_slots_ends_with_the_others(chunk):
    dispatcher = a_dispatcher(num_shards=1, chunk=chunk, slots=8, kv=10_000)
    a_member = visited(dispatcher, "long", 160, 160)
    for i in range(9):
        dispatcher.add(a_member(i), 0.0)
    ends = ends_in_rounds(dispatcher, {f"long/{i}": 160 for i in range(9)}, chunk)
    assert max(ends.values()) - min(ends.values()) <= 1
    assert max(ends.values()) == -(-9 * 160 // (8 * chunk))  # no schedule is shorter


def test_what_has_begun_gives_way_only_to_what_is_sure_to_need_longer():
    dispatcher = a_dispatcher(num_shards=1, chunk=8, slots=1, kv=10_000)
    dispatcher.add(a_job("begun", group="other", most=100), 0.0)
    assert names(dispatcher.next_assignments(0.0)) == ["begun"]
    dispatcher.add(visited(dispatcher, "long", 60, 100)(0), 0.0)
    dispatcher.add(visited(dispatcher, "short", 30, 100)(0), 0.0)
    started = []
    for _ in range(7):
        dispatcher.on_chunk((started or ["begun"])[-1], 8, False, 0.0)
        started += names(dispatcher.next_assignments(0.0))
    assert started[:5] == ["begun"] * 4 + ["long/0"]  # 40 tokens: 60 left at most; equal ones go on
    assert "short/0" not in started


def test_what_has_begun_gives_way_to_nobody_where_kv_is_short():
    dispatcher = a_dispatcher(num_shards=1, chunk=8, slots=1, kv=180)
    dispatcher.add(a_job("begun", group="other", prompt=80, most=100), 0.0)
    assert names(dispatcher.next_assignments(0.0)) == ["begun"]
    dispatcher.add(visited(dispatcher, "long", 90, 100)(0), 0.0)
    for _ in range(12):
        dispatcher.on_chunk("begun", 8, False, 0.0)
        assert names(dispatcher.next_assignments(0.0)) == ["begun"]


def test_a_slot_is_kept_while_its_chunk_is_made_durable():
    dispatcher = a_dispatcher(num_shards=1, slots=1)
    for i in range(2):
        dispatcher.add(a_job(f"j{i}", group=f"g{i}", order=i), 0.0)
    assert names(dispatcher.next_assignments(0.0)) == ["j0"]
    dispatcher.hold("j0", 8, 0.0)
    assert dispatcher.next_assignments(0.0) == []
    dispatcher.resume("j0")
    assert names(dispatcher.next_assignments(0.0)) == ["j0"]
    dispatcher.hold("j0", 8, 0.0, goes_on=False)  # it has ended: nothing to keep a slot for
    assert names(dispatcher.next_assignments(0.0)) == ["j1"]
    dispatcher.hold("j1", 8, 0.0)
    dispatcher.add(a_job("j2", group="g2", order=2), 0.0)
    dispatcher.remove("j1")
    assert names(dispatcher.next_assignments(0.0)) == ["j2"]


def test_chunks_that_come_back_together_leave_no_engine_without_work():
    dispatcher = a_dispatcher(num_shards=1, slots=5)
    for i in range(10):
        dispatcher.add(a_job(f"j{i}", group=f"g{i}", order=i), 0.0)
    first = names(dispatcher.next_assignments(0.0))
    for name in first:
        dispatcher.hold(name, 8, 0.0)
    assert len(dispatcher.next_assignments(0.0)) == 4  # one of five is kept
    for name in first:
        dispatcher.resume(name)
    assert names(dispatcher.next_assignments(0.0)) == first[:1]


def test_one_urgent_job_cuts_one_chunk_once():
    dispatcher = a_dispatcher()
    for i in range(6):
        dispatcher.add(a_job(f"j{i}", group=f"g{i}", order=i), 0.0)
    running = names(dispatcher.next_assignments(0.0))
    assert dispatcher.take_cuts(0.0) == []
    dispatcher.add(a_job("urgent", group="u", order=9, priority=-1), 0.0)
    assert dispatcher.next_assignments(0.0) == []
    [(shard, cut)] = dispatcher.take_cuts(0.0)
    assert cut == running[-1] and dispatcher.take_cuts(0.0) == []
    dispatcher.on_chunk(cut, 3, False, 0.0)
    [started] = dispatcher.next_assignments(0.0)
    assert (started.job_id, started.shard) == ("urgent", shard)
    assert dispatcher.take_cuts(0.0) == [] and dispatcher.counts.num_cuts == 1
    assert dispatcher.job(cut).num_tokens == 3


def test_a_chunk_is_trimmed_to_the_kv_that_is_free():
    dispatcher = a_dispatcher(num_shards=1, chunk=400, slots=2, kv=320)
    dispatcher.add(a_job("j", prompt=6, most=400), 0.0)
    [one] = dispatcher.next_assignments(0.0)
    assert one.budget_tokens == 320 - 6 and dispatcher.counts.num_trimmed == 1


def test_a_job_for_which_there_is_no_kv_is_not_passed_for_ever():
    dispatcher = a_dispatcher(num_shards=1, chunk=None, slots=4, kv=100)
    dispatcher.add(a_job("first", group="first", order=0, most=20), 0.0)
    [first] = names(dispatcher.next_assignments(0.0))
    dispatcher.add(a_job("large", group="large", order=1, prompt=60, most=40), 0.0)
    assert dispatcher.next_assignments(0.0) == []  # needs the whole cache
    running = [first]
    for number in range(3 * MAX_PASSED):  # a stream of small ones, for which there would always be room
        dispatcher.add(a_job(f"small{number}", group=f"s{number}", order=2 + number, most=20), 0.0)
        started = names(dispatcher.next_assignments(0.0))
        running += started
        if "large" in started:
            break
        dispatcher.on_chunk(running.pop(0), 20, True, 0.0)
        running += names(dispatcher.next_assignments(0.0))
        if "large" in running:
            break
    assert "large" in running and number <= MAX_PASSED
