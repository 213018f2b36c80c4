"""The discrete events: chunks that end, failures, training steps; the service's own dispatcher decides.

Owns simulated time and the training steps' books. Decides nothing about who runs where. Between two events nothing is
computed. The same arguments give the same outcome, to the last bit; only wall times differ.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np

from rollout.config import DispatchConfig
from rollout.scheduler.dispatcher import Dispatcher
from rollout.scheduler.jobs import Job, ShardCapacity
from rollout.simulate.costs import StepCosts
from rollout.simulate.lengths import GroupWork
from rollout.simulate.outcome import Outcome, Record, Run, tail_ratio
from rollout.simulate.rank import Rank, Sequence
from rollout.simulate.rank_group import ChunkEnd, Message, RankGroup
from rollout.simulate.scenario import Scenario
from rollout.simulate.speculation import Speculation
from rollout.simulate.timeline import Timeline

DAY_S = 86_400.0
CPU_TICK_S = 1e-6  # a dispatcher that took less of a core took this
T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Member:
    """A trajectory under way. Owned by the simulation."""

    job_id: str
    group: GroupUnderWay
    order: int
    length: int
    submitted_at: float
    num_tokens: int = 0
    last_shard: int | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class GroupUnderWay:
    """A group that has begun. `oldest_version` is that of its first token."""

    work: GroupWork
    num_left: int
    members: list[Member] = field(default_factory=list)
    oldest_version: int | None = None


class Simulation:
    """One policy in one scenario; `run` it once.

    Args:
        scenario: What to simulate.
        policy: "static", "partial" or "divided".
        costs: Prices engine steps.
        kv_tokens: KV of a shard.
        work: Groups in the order in which they are submitted; as many as the run consumes must come.
        on_step: Told (step, simulated seconds) as each training step is complete.
    """

    def __init__(
        self,
        scenario: Scenario,
        policy: str,
        costs: StepCosts,
        kv_tokens: int,
        work: Iterable[GroupWork],
        on_step: Callable[[int, float], None] | None = None,
    ) -> None:
        self._scenario, self._policy, self._kv_tokens = scenario, policy, kv_tokens
        self._work: Iterator[GroupWork] = iter(work)
        self._on_step = on_step
        # Static and synchronous is one thing; a trainer that only places better is partial with max_staleness=0.
        self._is_synchronous = policy == "static" or scenario.max_staleness == 0
        # A synchronous trainer hands its engines everything at once; they hold the queue.
        num_all = scenario.prompts * scenario.n_samples_per_prompt
        slots = num_all if policy == "static" else scenario.max_running + scenario.ahead
        self._capacity = {
            rank: ShardCapacity(
                max_running=slots,
                kv_tokens=kv_for_contexts(scenario, kv_tokens),
                block_tokens=scenario.block_tokens,
                group=rank // scenario.shards_per_group,
            )
            for rank in range(scenario.gpus)
        }
        self._groups = [self._engines(g, costs) for g in range(scenario.num_groups)]
        config = DispatchConfig(policy=policy, chunk_tokens=scenario.chunk_tokens)
        self._dispatcher = Dispatcher(config, self._capacity)
        self._members: dict[str, Member] = {}
        self._under_way: dict[str, GroupUnderWay] = {}
        self._events: list[tuple[float, int, int]] = []  # (time, group, the group's plan it belongs to)
        self._plans = [0] * scenario.num_groups
        self._failures: list[tuple[float, int, bool]] = []  # (time, group, whether it comes back)
        self._rng = np.random.default_rng([scenario.seed, 1])
        self._now = 0.0
        self._version = 0
        self._num_ready = self._num_submitted = self._num_prompt_tokens = 0
        self.record = Record()
        self.timeline = Timeline(scenario.gpus)
        self.lengths_seen: dict[str, int] = {}

    def run(self) -> Run:
        """Simulate all training steps."""
        began, cpu_began = time.perf_counter(), time.process_time()
        self._draw_failure()
        for step in range(self._scenario.rl_steps):
            self._version = step
            self._submit()
            self._dispatch()
            while not self._is_step_complete():
                self._next_event()
            self._end_step()
            if self._on_step is not None:
                self._on_step(step, self._now)
            self._now += self._scenario.sync_stall_s
        return self._result(time.perf_counter() - began, time.process_time() - cpu_began)

    def _submit(self) -> None:
        """Begin as many groups as the step lacks."""
        factor = 1.0 if self._is_synchronous else self._scenario.over_sampling
        wanted = round(self._scenario.prompts * factor) - self._num_ready - len(self._under_way)
        for _ in range(wanted):
            work = next(self._work, None)
            if work is None:
                break
            group = GroupUnderWay(work=work, num_left=len(work.output_tokens))
            self._under_way[work.group_id] = group
            self._num_prompt_tokens += work.prompt_tokens
            for index, length in enumerate(work.output_tokens):
                self._add(group, f"{work.group_id}/{index}", min(length, self._scenario.output_tokens))

    def _add(self, group: GroupUnderWay, job_id: str, length: int) -> None:
        member = Member(job_id=job_id, group=group, order=self._num_submitted, length=length, submitted_at=self._now)
        self._num_submitted += 1
        self._members[job_id] = member
        group.members.append(member)
        job = Job(
            job_id=job_id,
            group_id=group.work.group_id,
            order=member.order,
            num_prompt_tokens=group.work.prompt_tokens,
            max_tokens=self._scenario.output_tokens,
        )
        self._timed(lambda: self._dispatcher.add(job, self._now))

    def _is_step_complete(self) -> bool:
        if self._is_synchronous:
            return not self._under_way
        if self._num_ready < self._scenario.prompts and self._under_way:
            return False
        bound = self._version - self._scenario.max_staleness
        return not any(
            group.oldest_version is not None and group.oldest_version <= bound for group in self._under_way.values()
        )

    def _end_step(self) -> None:
        """Cut what still runs; the tokens are kept, the KV is not, for the weights change."""
        stopped = [chunk for group in self._groups if group.is_live for chunk in group.stop(self._now)]
        self._now = max([self._now, *(group.clock for group in self._groups if group.is_live)])
        for chunk in stopped:
            self._on_chunk(chunk)
        for index, group in enumerate(self._groups):
            for rank in group.ranks.values():
                rank.forget_cache()
            self._observe(index)
            self._plans[index] += 1
        self._num_ready = max(0, self._num_ready - self._scenario.prompts)
        self.record.step_ends_s.append(self._now)

    def _next_event(self) -> None:
        """Go to whatever happens next."""
        while self._events and self._events[0][2] != self._plans[self._events[0][1]]:
            heapq.heappop(self._events)
        if not self._events and all(group.is_live for group in self._groups):
            raise AssertionError(
                f"{len(self._members)} trajectories are under way, and neither engine nor dispatcher does anything"
            )
        if self._failures and (not self._events or self._failures[0][0] <= self._events[0][0]):
            self._now, index, is_return = heapq.heappop(self._failures)
            self._revive(index) if is_return else self._fail(index)
            self._dispatch()
            return
        self._now, index, _ = heapq.heappop(self._events)
        group = self._groups[index]
        ended = group.run(self._now)
        for chunk in ended:
            self._on_chunk(chunk)
        self._observe(index)
        if ended:
            self._cut()
            self._dispatch()
        self._plan(index)

    def _on_chunk(self, chunk: ChunkEnd) -> None:
        member = self._members[chunk.job_id]
        if chunk.num_tokens and member.group.oldest_version is None:
            member.group.oldest_version = self._version
        member.num_tokens += chunk.num_tokens
        is_ended = member.num_tokens == member.length
        duration = self._now - chunk.submitted_at
        self._timed(
            lambda: self._dispatcher.on_chunk(chunk.job_id, chunk.num_tokens, is_ended, self._now, duration_s=duration)
        )
        if is_ended:
            self._finish(member)

    def _finish(self, member: Member) -> None:
        del self._members[member.job_id]
        self.lengths_seen[member.job_id] = member.num_tokens
        self.record.finished_s.append(self._now)
        self.record.latencies_s.append(self._now - member.submitted_at)
        self.record.num_tokens += member.num_tokens
        member.group.num_left -= 1
        if not member.group.num_left:
            del self._under_way[member.group.work.group_id]
            self._num_ready += 1

    def _cut(self) -> None:
        for shard, job_id in self._timed(lambda: self._dispatcher.take_cuts(self._now)):
            self._send(Message(at=self._now + self._scenario.turnaround_s, rank=shard, cut=job_id))
            self.record.num_cuts += 1

    def _dispatch(self) -> None:
        assignments = self._timed(lambda: self._dispatcher.next_assignments(self._now))
        self.record.num_assignments += len(assignments)
        for assignment in assignments:
            member = self._members[assignment.job_id]
            if member.last_shard is not None and member.last_shard != assignment.shard:
                self.record.num_migrations += 1
            member.last_shard = assignment.shard
            sequence = Sequence(
                job_id=member.job_id,
                group_id=member.group.work.group_id,
                prompt_tokens=member.group.work.prompt_tokens,
                base_tokens=member.num_tokens,
                target=min(assignment.budget_tokens, member.length - member.num_tokens),
                submitted_at=self._now,
            )
            at = self._now + self._scenario.turnaround_s
            self._groups[self._index(assignment.shard)].send(Message(at=at, rank=assignment.shard, start=sequence))
        for index in {self._index(a.shard) for a in assignments}:
            self._plan(index)

    def _send(self, message: Message) -> None:
        index = self._index(message.rank)
        self._groups[index].send(message)
        self._plan(index)

    def _plan(self, index: int) -> None:
        self._plans[index] += 1
        at = self._groups[index].plan()
        if at is not None:
            heapq.heappush(self._events, (at, index, self._plans[index]))

    def _observe(self, index: int) -> None:
        for rank, engine in self._groups[index].ranks.items():
            self.timeline.record(rank, self._now, len(engine.running))

    def _draw_failure(self) -> None:
        rate = self._scenario.failures_per_shard_day * self._scenario.gpus / DAY_S
        if rate > 0:
            at = self._now + self._rng.exponential(1 / rate)
            heapq.heappush(self._failures, (at, int(self._rng.integers(len(self._groups))), False))

    def _fail(self, index: int) -> None:
        """A whole group dies, and schedules its return; the fleet's next death is drawn."""
        self._draw_failure()
        group = self._groups[index]
        if not group.is_live:
            return
        heapq.heappush(self._failures, (self._now + self._scenario.restart_s, index, True))
        self.record.num_failures += 1
        self.record.num_tokens_lost += group.die(self._now)
        self._plans[index] += 1
        self._observe(index)
        for rank in group.ranks:
            self._timed(partial(self._dispatcher.on_shard_down, rank))

    def _revive(self, index: int) -> None:
        self._groups[index].revive(self._now)
        for rank in self._groups[index].ranks:
            self._timed(partial(self._dispatcher.on_shard_up, rank, self._capacity[rank]))

    def _engines(self, index: int, costs: StepCosts) -> RankGroup:
        scenario = self._scenario
        first = index * scenario.shards_per_group
        ranks = {
            rank: Rank(scenario.max_running, self._kv_tokens, scenario.max_batched_tokens)
            for rank in range(first, first + scenario.shards_per_group)
        }
        if not scenario.spec_draft_tokens:
            return RankGroup(ranks, costs)
        speculation = Speculation.chain(scenario.spec_accept_length, scenario.spec_draft_tokens, scenario.spec_draft_s)
        # The other half of a step is left for prefills.
        max_rows = max(scenario.max_running, scenario.max_batched_tokens // 2)
        return RankGroup(ranks, costs, speculation, max_rows)

    def _index(self, rank: int) -> int:
        return rank // self._scenario.shards_per_group

    def _timed(self, call: Callable[[], T]) -> T:
        began, cpu_began = time.perf_counter(), time.thread_time()
        result = call()
        self.record.dispatch_cpu_s += time.thread_time() - cpu_began
        self.record.dispatch_s += time.perf_counter() - began
        return result

    def _result(self, wall_s: float, cpu_s: float) -> Run:
        record, scenario = self.record, self._scenario
        ranks = [rank for group in self._groups for rank in group.ranks.values()]
        makespan = record.step_ends_s[-1]
        num_decisions = record.num_assignments + record.num_cuts
        prefilled = sum(rank.counts.num_prefilled for rank in ranks)
        latencies = np.asarray(record.latencies_s)
        outcome = Outcome(
            policy=self._policy,
            seed=scenario.seed,
            makespan_s=makespan,
            num_trajectories=len(record.finished_s),
            num_tokens=record.num_tokens,
            tokens_per_s_per_gpu=record.num_tokens / makespan / scenario.gpus,
            tail_ratio=tail_ratio(
                record.step_ends_s, record.finished_s, scenario.prompts * scenario.n_samples_per_prompt
            ),
            mean_batch=self.timeline.mean_running(makespan),
            idle_share=self.timeline.idle_share(makespan),
            num_prefilled_tokens=prefilled,
            num_reprefilled_tokens=max(0, prefilled - self._num_prompt_tokens),
            num_preemptions=sum(rank.counts.num_preemptions for rank in ranks),
            num_migrations=record.num_migrations,
            num_failures=record.num_failures,
            num_tokens_lost=record.num_tokens_lost,
            num_decisions=num_decisions,
            latency_p50_s=float(np.percentile(latencies, 50)),
            latency_p99_s=float(np.percentile(latencies, 99)),
            max_kv_share=max(rank.counts.max_used_tokens for rank in ranks) / self._kv_tokens,
            max_running=max(rank.counts.max_running for rank in ranks),
            decisions_per_s=num_decisions / record.dispatch_s,
            decisions_per_cpu_s=num_decisions / max(record.dispatch_cpu_s, CPU_TICK_S),
            wall_s=wall_s,
            cpu_s=cpu_s,
        )
        return Run(outcome=outcome, timeline=self.timeline, finished_s=np.asarray(record.finished_s))


def kv_for_contexts(scenario: Scenario, kv_tokens: int) -> int:
    """KV of a shard less what drafts need beyond the end of a full batch's chunks."""
    rows = 1 + scenario.spec_draft_tokens if scenario.spec_draft_tokens else 0
    return max(scenario.longest, kv_tokens - rows * scenario.max_running)
