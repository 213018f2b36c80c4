"""What the controller tells a dashboard: chunks as they come and go, syncs, failures, and shards that are slow."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from actors.feed_calls import FeedCalls, FeedState
from actors.service import connect
from rollout.config import SchedulerConfig
from rollout.errors import SyncRefused
from rollout.feed import FeedQuery, LaneOrder
from rollout.fleet import ShardStats, Supervision
from rollout.governor.statistics import SpeculationRecord
from rollout.mismatch import MismatchReport
from rollout.rate import RateWindow
from rollout.scheduler.jobs import ShardCapacity
from rollout.scheduler.ledger import Ledger
from rollout.scheduler.scheduler import Scheduler
from rollout.types import ModelLimits, Prompt, RolloutRequest, SamplingParams
from tests.actors import fakes
from tests.actors.test_controller import SAMPLING, WEIGHTS, start, wait_until


class Call:
    """What a method of an actor's handle looks like."""

    def __init__(self, action):
        self.remote = action


class SlowShard:
    """Says what it has sampled; rank 1 never answers."""

    def __init__(self, rank):
        self.rank, self.num_tokens = rank, 0
        self.stats, self.take_speculation = Call(self._stats), Call(self._drafts)

    async def _stats(self):
        if self.rank == 1:
            await asyncio.sleep(3600)
        self.num_tokens += 100
        return ShardStats(
            rank=self.rank,
            version=0,
            num_running=1,
            num_waiting=0,
            kv_usage=0.25,
            num_tokens_generated=0,
            num_preemptions=0,
            num_tokens_sampled=self.num_tokens,
        )

    async def _drafts(self):
        return SpeculationRecord(max_depth=2, num_steps=10) if self.rank == 0 else None


class Controller(FeedCalls):
    """As much of one as a feed needs, without Ray."""

    def __init__(self):
        self._shards = {rank: SlowShard(rank) for rank in range(2)}
        self._groups = {0: 0, 1: 0}
        capacities = {rank: ShardCapacity(max_running=4, kv_tokens=1000) for rank in range(2)}
        limits = ModelLimits(vocab_size=50, max_model_len=64)
        self._scheduler = Scheduler(SchedulerConfig(chunk_tokens=4), limits, capacities)
        self._publications = SimpleNamespace(live_version=0)
        self._ledger, self._rate = Ledger(60.0), RateWindow(10.0)
        self._deaths, self._supervision = Counter(), Supervision()
        self._num_groups_wanted, self._num_internal_errors = 1, 0
        self._feed = FeedState(time.monotonic())
        self.tasks = []

    def _spawn(self, work, name, on_error):
        self.tasks.append(asyncio.ensure_future(work))


def test_a_feed_never_waits_for_an_engine(monkeypatch):
    monkeypatch.setattr("actors.shard_figures.ANSWER_TIMEOUT_S", 0.1)
    monkeypatch.setattr("actors.shard_figures.ASK_EVERY_S", 0.0)

    async def look():
        controller = Controller()
        request = RolloutRequest(
            prompts=(Prompt(token_ids=(1,), prompt_id="p"),),
            n_samples_per_prompt=2,
            sampling=SamplingParams(max_tokens=8),
            run_seed=0,
            group_ids=("g",),
        )
        controller._scheduler.submit("h", request, time.monotonic())
        for dispatch in controller._scheduler.next_dispatches(time.monotonic()):
            controller._note_start(dispatch)
        began = time.monotonic()
        feeds = [await controller.feed()]
        assert time.monotonic() - began < 0.05, "the shard that hangs is not waited for"
        for _ in range(2):
            await controller.tasks[-1]
            feeds.append(await controller.feed(FeedQuery(order=LaneOrder.LONGEST)))
        await controller.tasks[-1]
        return feeds

    first, second, third = asyncio.run(look())
    assert (first.fleet.age_s, first.fleet.cells[0].kv_used) == (None, None)
    assert second.fleet.age_s is not None and second.fleet.cells[0].kv_used == 0.25
    assert second.fleet.cells[1].kv_used is None, "it has not said"
    assert third.fleet.cells[0].tokens_per_s > 0
    assert third.speculation is not None and third.speculation.off_share == 0.0
    assert [lane.state for lane in third.lanes.shown] == ["running", "running"]
    assert third.groups.shown[0].num_running == 2
    assert third.fleet.cells[0].kv_reserved > 0


@pytest.mark.ray
def test_the_controller_tells_of_chunks_syncs_and_failures(ray_cluster, tmp_path):
    with start(tmp_path, "watched", chunk_tokens=2) as service:
        client = connect("watched")
        client.rollout([[fakes.ANSWER, 7], [fakes.RAISE]], 2, SAMPLING, group_ids=["good", "cursed"])
        handle = client.submit([[fakes.HOLD]], 2, SAMPLING, group_ids=["held"])
        client.publish(1, WEIGHTS)
        with pytest.raises(SyncRefused):
            client.publish(2, {"a": torch.ones(4)})  # a tensor is missing
        client.note_mismatch(
            1,
            2e-4,
            MismatchReport(
                all=2e-4,
                weights=1e-4,
                kv=5e-5,
                routing=None,
                staleness=0.0,
                routing_without_replay=None,
                routing_flip_rate=None,
                num_tokens=9,
            ),
        )
        feeds = []

        def is_told() -> bool:
            feeds.append(client.feed(FeedQuery(order=LaneOrder.NEWEST)))
            return len(feeds[-1].lanes.shown) == 6 and feeds[-1].fleet.kv_used is not None

        wait_until(is_told)
        feed = feeds[-1]
        client.abort(handle)
        list(client.groups(handle))
        for shard in service.shards:
            shard.release.remote()
    lanes = {lane.trajectory_id: lane for lane in feed.lanes.shown}
    good = lanes["good/0"]
    assert (good.state, good.num_tokens, good.num_chunks, len(good.bars)) == ("truncated", 4, 2, 2)
    assert [bar.spans[0].num_tokens for bar in good.bars] == [2, 2]
    assert (lanes["cursed/1"].state, lanes["cursed/1"].bars[0].end) == ("failed", "failed")
    assert lanes["held/0"].state == "running" and lanes["held/0"].bars[-1].ended_s is None
    assert {point.trajectory_id for point in feed.failures.newest} == {"cursed/0", "cursed/1"}
    assert "this request is cursed" in feed.failures.newest[0].reason
    assert [(one.kind, one.count) for one in feed.failures.trajectories] == [("engine_error", 2)]
    published, refused = feed.syncs
    assert (published.version, published.reason, published.in_flight) == (1, None, "keep") and published.num_bytes > 0
    assert refused.version == 2 and "gave it up" in refused.reason
    assert (feed.mismatches[0].weights, feed.mismatches[0].routing) == (1e-4, None)
    assert feed.totals.live_version == 1 and feed.groups.num_waiting == 1
    assert (feed.fleet.num_shards, feed.fleet.num_live) == (2, 2)
    assert feed.failures.num_internal_errors == 0
