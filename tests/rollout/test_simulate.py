from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import InvalidRequest
from rollout.simulate.lengths import GroupWork
from rollout.simulate.outcome import Outcome, tail_ratio
from rollout.simulate.rank import Rank, Sequence
from rollout.simulate.rank_group import Message, RankGroup
from rollout.simulate.scenario import POLICIES, Scenario
from rollout.simulate.simulation import Simulation
from rollout.simulate.speculation import Load, Speculation
from rollout.simulate.timeline import Timeline

WALL = {"wall_s", "cpu_s", "decisions_per_s", "decisions_per_cpu_s"}  # of the machine, not of the simulated fleet


@dataclass(frozen=True)
class LinearCosts:
    """Seconds by count, so that a test can do the sum itself."""

    step_s: float = 0.01
    row_s: float = 1e-4
    context_token_s: float = 1e-5
    prefill_token_s: float = 1e-4
    shared_row_s: float = 2e-5

    def local_s(self, decode_rows: int, prefill_tokens: int, prefill_reads: float) -> float:
        return self.step_s + self.row_s * decode_rows + self.prefill_token_s * prefill_tokens

    def shared_s(self, rows: int) -> float:
        return self.shared_row_s * rows


SMALL = Scenario(
    gpus=4,
    shards_per_group=2,
    prompts=6,
    n_samples_per_prompt=4,
    prompt_tokens=20,
    output_tokens=400,
    chunk_tokens=64,
    max_running=5,
    kv_tokens=1500,
    max_batched_tokens=32,
    turnaround_s=0.003,
)


def groups(scenario: Scenario, seed: int = 0) -> list[GroupWork]:
    """More than any run of the scenario can consume."""
    rng = np.random.default_rng(seed)
    num = scenario.prompts * (scenario.rl_steps + 1) * 2
    lengths = np.minimum(rng.pareto(1.0, (num, scenario.n_samples_per_prompt)) * 60 + 1, scenario.output_tokens)
    return [
        GroupWork(group_id=f"g{i}", prompt_tokens=scenario.prompt_tokens, output_tokens=tuple(int(n) for n in row))
        for i, row in enumerate(lengths)
    ]


def simulation(scenario: Scenario, policy: str, work: list[GroupWork] | None = None) -> Simulation:
    assert scenario.kv_tokens is not None
    return Simulation(scenario, policy, LinearCosts(), scenario.kv_tokens, work or groups(scenario, scenario.seed))


def timeless(outcome: Outcome) -> dict[str, object]:
    return {name: value for name, value in asdict(outcome).items() if name not in WALL}


# A second engine that knows no closed form: it takes every step by itself.


@dataclass
class Stepped:
    prefill_left: int
    context: int
    target: int
    tokens: int = 0
    is_started: bool = False


@dataclass
class SteppedGroup:
    costs: LinearCosts
    max_batched_tokens: int
    ranks: list[list[Stepped]]
    clock: float = 0.0
    ends: dict[tuple[int, int], float] = field(default_factory=dict)

    def run(self) -> dict[tuple[int, int], float]:
        order = [[(i, s) for i, s in enumerate(rank)] for rank in self.ranks]
        while any(order):
            rows, slowest = 0, 0.0
            taken: list[list[tuple[Stepped, int]]] = []
            for rank in order:
                decoding = [s for _, s in rank if s.is_started]
                left, prefill = self.max_batched_tokens - len(decoding), 0
                taken.append([])
                for _, s in rank:
                    if not s.is_started and left:
                        take = min(left, s.prefill_left)
                        taken[-1].append((s, take))
                        left, prefill = left - take, prefill + take
                seconds = self.costs.local_s(len(decoding), prefill, 0.0)
                slowest = max(slowest, seconds + self.costs.context_token_s * sum(s.context for s in decoding))
                rows += len(decoding) + prefill
            self.clock += slowest + self.costs.shared_s(rows)
            for number, rank in enumerate(order):
                for _, s in rank:
                    if s.is_started:
                        s.tokens, s.context = s.tokens + 1, s.context + 1
                for s, take in taken[number]:
                    s.prefill_left -= take
                    if not s.prefill_left:
                        s.is_started, s.tokens, s.context = True, 1, s.context + 1
                for i, s in rank:
                    if s.tokens == s.target:
                        self.ends[number, i] = self.clock
                order[number] = [(i, s) for i, s in rank if s.tokens < s.target]
        return self.ends


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(2, 90), st.integers(1, 300)), max_size=5), min_size=1, max_size=3).filter(
        any
    )
)
def test_closed_form_equals_every_step_taken_by_itself(work: list[list[tuple[int, int]]]) -> None:
    costs = LinearCosts(context_token_s=1e-4)  # large, so that the slowest rank changes on the way
    ranks = {r: Rank(8, 10**6, 16) for r in range(len(work))}
    group = RankGroup(ranks, costs)
    for r, jobs in enumerate(work):
        for i, (prompt, target) in enumerate(jobs):
            sequence = Sequence(f"{r}/{i}", f"{r}/{i}", prompt, 0, target, 0.0)
            group.send(Message(at=0.0, rank=r, start=sequence))
    ends: dict[tuple[int, int], float] = {}
    while (at := group.plan()) is not None:
        for chunk in group.run(at):
            r, i = chunk.job_id.split("/")
            ends[int(r), int(i)] = at
            assert chunk.num_tokens == work[int(r)][int(i)][1]
    stepped = SteppedGroup(costs, 16, [[Stepped(p, p, t) for p, t in jobs] for jobs in work]).run()
    assert ends.keys() == stepped.keys()
    # Both add up to a few thousand steps in float64; 1e-9 is a million roundings.
    assert all(math.isclose(ends[key], stepped[key], rel_tol=1e-9) for key in ends)


def test_messages_wait_for_the_end_of_a_step() -> None:
    costs = LinearCosts(step_s=1.0, row_s=0.0, context_token_s=0.0, prefill_token_s=0.0, shared_row_s=0.0)
    group = RankGroup({0: Rank(4, 1000, 100)}, costs)
    group.send(Message(at=0.0, rank=0, start=Sequence("a", "a", 10, 0, 20, 0.0)))
    group.send(Message(at=4.5, rank=0, cut="a"))
    ended = []
    while (at := group.plan()) is not None:
        ended += [(at, chunk.num_tokens) for chunk in group.run(at)]
    assert ended == [(5.0, 5)]


def test_makespan_of_one_trajectory_is_the_sum_done_by_hand() -> None:
    scenario = replace(
        SMALL, gpus=1, shards_per_group=1, prompts=1, n_samples_per_prompt=1, prompt_tokens=30, max_batched_tokens=20
    )
    work = [GroupWork(group_id="g", prompt_tokens=30, output_tokens=(5,))]
    run = simulation(scenario, "static", work).run()
    c = LinearCosts()
    prefill = 2 * c.step_s + 30 * (c.prefill_token_s + c.shared_row_s)  # 20 tokens, then 10 and the first new one
    decode = sum(c.step_s + c.row_s + c.shared_row_s + c.context_token_s * context for context in (31, 32, 33, 34))
    assert run.outcome.makespan_s == pytest.approx(scenario.turnaround_s + prefill + decode, rel=1e-12)
    assert run.outcome.num_prefilled_tokens == 30 and run.outcome.num_reprefilled_tokens == 0
    assert run.outcome.latency_p50_s == run.outcome.makespan_s


def test_a_full_cache_preempts_the_newest_which_ends_all_the_same() -> None:
    group = RankGroup({0: Rank(4, 100, 100)}, LinearCosts())
    rank = group.ranks[0]
    for name in ("a", "b"):
        group.send(Message(at=0.0, rank=0, start=Sequence(name, name, 20, 0, 60, 0.0)))
    order = []
    while (at := group.plan()) is not None:
        order += [(chunk.job_id, chunk.num_tokens) for chunk in group.run(at)]
        assert rank.used_tokens <= 100
    assert order == [("a", 60), ("b", 60)]
    assert rank.counts.num_preemptions == 1
    # Both had 30 tokens when the cache was full; a's growth by 30 pushed b's out of it, but not b's prompt.
    assert rank.counts.num_prefilled == 20 + 20 + 30


def test_siblings_share_their_prompt_and_a_continuation_finds_its_kv() -> None:
    group = RankGroup({0: Rank(4, 1000, 100)}, LinearCosts())
    rank = group.ranks[0]
    for name in ("a", "b"):
        group.send(Message(at=0.0, rank=0, start=Sequence(name, "g", 50, 0, 10, 0.0)))
    while (at := group.plan()) is not None:
        group.run(at)
    assert rank.counts.num_prefilled == 50 and rank.counts.num_cached == 50
    group.send(Message(at=group.clock, rank=0, start=Sequence("a", "g", 50, 10, 10, group.clock)))
    while (at := group.plan()) is not None:
        group.run(at)
    assert rank.counts.num_prefilled == 50
    assert rank.used_tokens == pytest.approx(0) and rank.context_tokens == pytest.approx(0)


SCENARIOS = st.builds(
    lambda spec, **kw: replace(SMALL, spec_accept_length=spec[0], spec_draft_tokens=spec[1], **kw),
    spec=st.sampled_from([(1.0, 0), (1.7, 2)]),
    seed=st.integers(0, 5),
    prompts=st.integers(1, 6),
    kv_tokens=st.sampled_from([464, 900, 5000]),
    chunk_tokens=st.sampled_from([16, 64, 1000]),
    rl_steps=st.integers(1, 3),
    failures_per_shard_day=st.sampled_from([0.0, 4000.0]),
    restart_s=st.just(2.0),
    sync_stall_s=st.sampled_from([0.0, 0.5]),
)


@settings(max_examples=60, deadline=None)
@given(SCENARIOS, st.sampled_from(POLICIES), st.sampled_from([(0, 1.0), (1, 1.5), (2, 2.0)]))
def test_every_trajectory_ends_with_exactly_its_length(
    scenario: Scenario, policy: str, stale: tuple[int, float]
) -> None:
    scenario = replace(scenario, max_staleness=stale[0], over_sampling=stale[1])
    work = groups(scenario, scenario.seed)
    lengths = {f"{g.group_id}/{i}": n for g in work for i, n in enumerate(g.output_tokens)}
    simulated = simulation(scenario, policy, work)
    outcome = simulated.run().outcome
    assert simulated.lengths_seen == {job: lengths[job] for job in simulated.lengths_seen}
    assert outcome.num_tokens == sum(simulated.lengths_seen.values())
    assert outcome.num_trajectories >= scenario.rl_steps * scenario.prompts * scenario.n_samples_per_prompt
    assert outcome.max_running <= scenario.max_running
    if policy == "divided":
        assert outcome.max_kv_share <= 1
        assert outcome.num_preemptions == 0
    if policy == "static" or not stale[0]:
        assert outcome.num_trajectories == scenario.rl_steps * scenario.prompts * scenario.n_samples_per_prompt


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_arguments_give_the_same_outcome(policy: str) -> None:
    scenario = replace(SMALL, rl_steps=2, max_staleness=1, over_sampling=1.5, failures_per_shard_day=2000.0, seed=3)
    first, second = (simulation(scenario, policy).run() for _ in range(2))
    assert timeless(first.outcome) == timeless(second.outcome)
    assert (first.finished_s == second.finished_s).all()


def test_failures_cost_tokens_and_time() -> None:
    scenario = replace(SMALL, rl_steps=6, restart_s=5.0)
    calm = simulation(scenario, "divided").run().outcome
    # Some 30 s of four shards: six deaths on average, of which none at all comes once in 400 seeds.
    rough = simulation(replace(scenario, failures_per_shard_day=4000.0), "divided").run().outcome
    assert calm.num_failures == 0 and rough.num_failures > 0
    assert rough.num_tokens == calm.num_tokens
    assert rough.makespan_s > calm.makespan_s


def test_speculation_divides_the_steps() -> None:
    scenario = replace(SMALL, kv_tokens=10**5)
    plain = simulation(scenario, "static").run().outcome
    costs = {"spec_accept_length": 2.0, "spec_draft_tokens": 1}
    fast = simulation(replace(scenario, **costs), "static").run().outcome
    assert fast.num_tokens == plain.num_tokens
    # At most half of the steps, each with one more row for every sequence.
    assert plain.makespan_s / 2 < fast.makespan_s < 0.75 * plain.makespan_s


def test_a_chain_of_drafts_brings_what_was_measured_of_the_longest() -> None:
    chain = Speculation.chain(3.77, 7, 0.0)
    assert chain.tokens[0] == 1 and chain.tokens[-1] == 3.77
    growth = np.diff(chain.tokens)
    # Each draft is reached with the chance of the first times that of the one before: a geometric series.
    assert growth[1:] / growth[:-1] == pytest.approx([growth[0]] * 6, rel=1e-9)
    with pytest.raises(InvalidRequest, match="accept_length"):
        Speculation.chain(3.0, 1, 0.0)


def test_drafts_are_as_many_as_bring_the_most_tokens_a_second() -> None:
    costs = LinearCosts(step_s=0.01, row_s=1e-4, context_token_s=0.0, shared_row_s=0.0)
    chain = Speculation(tokens=(1.0, 1.8, 2.4, 2.8), draft_s=1e-3)

    def tokens_per_s(num_drafts: int, batch: int) -> float:
        return chain.tokens[num_drafts] / (0.01 + 1e-4 * batch * (1 + num_drafts) + 1e-3 * num_drafts)

    for batch in (1, 20, 80, 400, 2000):
        best = chain.best([Load(num_decoding=batch, context_tokens=0.0)], costs, 10**6)
        assert tokens_per_s(best, batch) == max(tokens_per_s(n, batch) for n in range(4))
    assert chain.best([Load(num_decoding=1, context_tokens=0.0)], costs, 10**6) == 3
    assert chain.best([Load(num_decoding=100, context_tokens=0.0)], costs, 250) <= 1, "three rows each are too many"
    # Where only the context costs anything, a draft is free.
    reading = LinearCosts(step_s=0.0, row_s=0.0, context_token_s=1e-6, shared_row_s=0.0)
    free = Speculation(tokens=chain.tokens)
    assert free.best([Load(num_decoding=500, context_tokens=1e6)], reading, 10**6) == 3


def test_speculation_that_does_not_pay_is_off() -> None:
    scenario = replace(SMALL, kv_tokens=10**5)
    plain = simulation(scenario, "static").run().outcome
    dear = replace(scenario, spec_accept_length=1.2, spec_draft_tokens=3, spec_draft_s=1.0)
    assert simulation(dear, "static").run().outcome.makespan_s == plain.makespan_s


def test_an_over_sampled_step_carries_its_excess_over() -> None:
    scenario = replace(SMALL, rl_steps=3, max_staleness=1, over_sampling=2.0)
    synchronous = simulation(replace(scenario, max_staleness=0, over_sampling=1.0), "partial").run().outcome
    carried = simulation(scenario, "partial").run().outcome
    assert carried.mean_batch > synchronous.mean_batch


def test_timeline_integrates_what_was_recorded() -> None:
    timeline = Timeline(2)
    timeline.record(0, 1.0, 4)
    timeline.record(0, 3.0, 0)
    assert timeline.mean_running(4.0) == pytest.approx(4 * 2 / 4 / 2)
    assert timeline.idle_share(4.0) == pytest.approx((1 + 1 + 4) / 8)
    assert timeline.raster(4.0, 2, 4).tolist() == [[0, 4, 4, 0], [0, 0, 0, 0]]
    assert timeline.raster(4.0, 1, 2).tolist() == [[1, 1]]


def test_tail_ratio_is_the_time_of_the_last_tenth() -> None:
    ends = [float(i) for i in range(1, 12)]  # nine tenths of eleven have ended at 10
    assert tail_ratio([20.0], ends, 11) == pytest.approx((20 - 10) / 20)
    assert tail_ratio([11.0, 22.0], [*ends, *(11 + e for e in ends)], 11) == pytest.approx(1 / 11)
