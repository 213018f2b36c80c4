"""What a dashboard is told: bounded whatever the fleet, complete where it is small, and right."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.config import SchedulerConfig
from rollout.feed import (
    MAX_BARS,
    MAX_FAILURES,
    MAX_GROUPS,
    MAX_ID,
    MAX_LANES,
    MAX_MISMATCHES,
    MAX_RATES,
    MAX_SYNCS,
    MAX_TEXT,
    Failures,
    Feed,
    FeedQuery,
    Groups,
    LaneOrder,
    MismatchPoint,
    SyncPoint,
    Totals,
    shortened,
)
from rollout.feed_fleet import MAX_CELLS, MAX_OUTLIERS, MAX_TILES, ShardTile, fleet_of, histogram
from rollout.feed_groups import waiting_groups
from rollout.feed_history import MAX_FOLLOWED, FeedHistory
from rollout.feed_speculation import WINDOW_S, SpeculationWindow
from rollout.governor.statistics import SpeculationRecord
from rollout.governor.tally import Tally
from rollout.scheduler.jobs import ShardCapacity
from rollout.scheduler.scheduler import Scheduler
from rollout.types import (
    ChunkResult,
    FinishReason,
    ModelLimits,
    Prompt,
    RolloutRequest,
    SamplingParams,
    VersionSpan,
)

MOST_BYTES = 256 * 1024  # of a message; a page that polls every second then takes 2 Mbit/s at the very most


def tiles(num_shards: int, group_size: int = 1) -> list[ShardTile]:
    return [
        ShardTile(
            rank=rank, group=rank // group_size, num_running=1, kv_used=rank / num_shards, tokens_per_s=float(rank)
        )
        for rank in range(num_shards)
    ]


def run_chunk(
    history: FeedHistory, name: str, shard: int, at: float, had: int, tokens: int = 10, version: int = 0
) -> None:
    history.chunk_started(name, shard, at, num_prompt_tokens=5, num_tokens=had, max_tokens=100)
    spans = [VersionSpan(version=version, start=0, stop=tokens)]
    history.chunk_ended(name, shard, at + 1.0, "length", num_tokens=tokens, spans=spans)


def lanes(history: FeedHistory, order: LaneOrder = LaneOrder.NEWEST, find: str = ""):
    return history.lanes(FeedQuery(order=order, find=find), lambda flight_id: None)


@given(st.integers(1, 3000), st.integers(1, 16))
def test_cells_hold_every_shard_once_and_are_bounded(num_shards: int, group_size: int) -> None:
    fleet = fleet_of(tiles(num_shards, group_size))
    assert sum(cell.num_shards for cell in fleet.cells) == num_shards
    assert [cell.first_rank for cell in fleet.cells[1:]] == [cell.last_rank + 1 for cell in fleet.cells[:-1]]
    assert len(fleet.cells) <= max(MAX_TILES, MAX_CELLS)
    assert fleet.is_aggregated == (num_shards > MAX_TILES)
    if not fleet.is_aggregated:
        assert len(fleet.cells) == num_shards
    assert fleet.kv_histogram is not None and sum(fleet.kv_histogram.counts) == num_shards


def test_a_cell_of_a_large_fleet_is_an_expert_parallel_group() -> None:
    fleet = fleet_of(tiles(1000, 8), cell=2)
    assert len(fleet.cells) == 125
    assert (fleet.cells[2].first_rank, fleet.cells[2].last_rank, fleet.cells[2].first_group) == (16, 23, 2)
    assert [tile.rank for tile in fleet.focus] == list(range(16, 24))
    assert fleet.cells[2].tokens_per_s == sum(range(16, 24))
    assert fleet.cells[2].kv_used == pytest.approx(np.mean([rank / 1000 for rank in range(16, 24)]))
    assert fleet.cells[2].kv_used_max == pytest.approx(0.023)
    assert fleet_of(tiles(1000, 8), cell=125).focus == ()


def test_outliers_are_the_worst_of_those_that_serve() -> None:
    shards = [*tiles(100), ShardTile(rank=100, group=100, is_live=False, kv_used=1.0, tokens_per_s=0.0)]
    shards.append(ShardTile(rank=101, group=101, num_running=0, kv_used=0.0, tokens_per_s=0.0))
    fleet = fleet_of(shards)
    assert [tile.rank for tile in fleet.fullest] == [99, 98, 97][:MAX_OUTLIERS]
    assert [tile.rank for tile in fleet.slowest] == [0, 1, 2][:MAX_OUTLIERS], "an idle shard is not slow"
    assert (fleet.num_shards, fleet.num_live) == (102, 101)


def test_shards_that_have_not_spoken_are_unknown_and_not_zero() -> None:
    fleet = fleet_of([ShardTile(rank=0, group=0), ShardTile(rank=1, group=1, kv_used=0.5)])
    assert (fleet.cells[0].kv_used, fleet.cells[0].tokens_per_s, fleet.cells[0].version_min) == (None, None, None)
    assert fleet.kv_used == 0.5
    assert fleet.rate_histogram is None
    assert fleet_of([]).cells == ()


def test_a_histogram_counts_its_upper_end_in_the_last_bin() -> None:
    assert histogram([0.0, 0.05, 0.1, 1.0], high=1.0).counts == (2, 1, 0, 0, 0, 0, 0, 0, 0, 1)
    assert histogram([0.0, 0.0]).counts[0] == 2


def test_a_lane_shows_chunks_moves_and_versions() -> None:
    history = FeedHistory()
    run_chunk(history, "h:g/0", 0, 0.0, 0, version=3)
    run_chunk(history, "h:g/0", 2, 2.0, 10, version=4)
    history.chunk_started("h:g/0", 2, 4.0, num_prompt_tokens=5, num_tokens=20, max_tokens=100)
    (lane,) = lanes(history).shown
    assert (lane.trajectory_id, lane.state, lane.num_tokens, lane.num_chunks, lane.num_moves) == (
        "g/0",
        "running",
        20,
        3,
        1,
    )
    assert [(bar.shard, bar.is_moved, bar.end) for bar in lane.bars] == [
        (0, False, "length"),
        (2, True, "length"),
        (2, False, None),
    ]
    assert [span.version for bar in lane.bars for span in bar.spans] == [3, 4]
    assert lane.bars[-1].ended_s is None
    history.chunk_ended("h:g/0", 0, 4.5, "lost")  # a shard that it has left long ago
    assert lanes(history).shown[0].bars[-1].end is None
    history.chunk_ended("h:g/0", 2, 5.0, "lost")
    history.trajectory_ended("h:g/0", "failed", 6.0, "its engine died")
    (lane,) = lanes(history, LaneOrder.FAILED).shown
    assert (lane.state, lane.num_lost, lane.ended_s, lane.error) == ("failed", 1, 6.0, "its engine died")
    assert lanes(history, LaneOrder.LONGEST).shown == ()


def test_a_chunk_whose_end_nobody_told_was_lost() -> None:
    history = FeedHistory()
    for at in (0.0, 5.0):
        history.chunk_started("h:g/0", 0, at, num_prompt_tokens=1, num_tokens=0, max_tokens=9)
    (lane,) = lanes(history).shown
    assert [(bar.ended_s, bar.end) for bar in lane.bars] == [(5.0, "lost"), (None, None)]


def test_lanes_are_ordered_and_found() -> None:
    history = FeedHistory()
    for index in range(MAX_LANES + 10):
        run_chunk(history, f"h:Group-{index}/0", 0, float(index), index)
    longest = lanes(history, LaneOrder.LONGEST)
    assert len(longest.shown) == MAX_LANES and longest.num_matching == MAX_LANES + 10
    tokens = [lane.num_tokens for lane in longest.shown]
    assert tokens == sorted(tokens, reverse=True)
    assert lanes(history).shown[0].trajectory_id == f"Group-{MAX_LANES + 9}/0"
    assert [lane.trajectory_id for lane in lanes(history, find="group-7/").shown] == ["Group-7/0"]
    assert lanes(history, find="h:").shown == (), "the client's handle is not part of the id"
    assert lanes(history, LaneOrder.MOVED).shown == ()
    run_chunk(history, "h:Group-3/0", 1, 99.0, 13)
    assert [lane.trajectory_id for lane in lanes(history, LaneOrder.MOVED).shown] == ["Group-3/0"]


def test_whole_histories_are_kept_and_ended_ones_make_room() -> None:
    history = FeedHistory()
    for index in range(MAX_FOLLOWED):
        run_chunk(history, f"h:{index}/0", 0, 0.0, 0)
    assert not history.chunk_started("h:late/0", 0, 1.0, num_prompt_tokens=1, num_tokens=0, max_tokens=9)
    assert not history.has("h:late/0"), "all places are taken by trajectories under way"
    history.trajectory_ended("h:7/0", "completed", 2.0)
    assert history.has("h:7/0"), "it stays until its place is needed"
    assert history.chunk_started("h:late/0", 0, 3.0, num_prompt_tokens=1, num_tokens=0, max_tokens=9)
    assert not history.has("h:7/0") and history.has("h:late/0")
    assert lanes(history).num_followed == MAX_FOLLOWED


def test_every_ring_is_bounded() -> None:
    history = FeedHistory()
    for index in range(1000):
        at = float(index)
        history.syncs.append(SyncPoint(version=index, at_s=at))
        history.mismatches.append(MismatchPoint(version=index, at_s=at, all=1e-4))
        history.failed(f"h:{index}/0", "stale", "x" * 10_000, at)
        history.rate(1.0, 3.0 * index)
        run_chunk(history, "h:g/0", 0, at, 0)
    assert (len(history.syncs), len(history.mismatches)) == (MAX_SYNCS, MAX_MISMATCHES)
    assert (len(history.failures), len(history.rates)) == (MAX_FAILURES, MAX_RATES)
    assert len(history.failures[0].reason) == MAX_TEXT
    assert len(lanes(history).shown[0].bars) == MAX_BARS


def test_a_message_of_the_largest_fleet_is_bounded_and_is_json() -> None:
    history = FeedHistory()
    name = "\ud800<script>" + "ä" * 10_000  # a lone surrogate has no UTF-8
    for index in range(2 * MAX_LANES):
        for chunk in range(2 * MAX_BARS):
            run_chunk(history, f"h:{index}{name}/0", chunk, 100.0 * chunk, 10 * chunk, version=chunk)
        history.failed(f"h:{index}{name}", "stale", name, 1.0)
    for index in range(1000):
        history.rate(1e6 / 3, 3.0 * index)
        history.syncs.append(SyncPoint(version=index, at_s=1 / 3, reason=shortened(name, MAX_TEXT)))
        history.mismatches.append(MismatchPoint(version=index, at_s=0.1, all=float("nan"), kv=float("inf")))
    feed = Feed(
        now_s=1 / 3,
        wall_s=1.7e9,
        started_s=0.0,
        totals=Totals(live_version=1, num_running=1, num_queued=0, num_under_way=1),
        fleet=fleet_of(tiles(100_000, 8), cell=1),
        lanes=lanes(history),
        groups=Groups(),
        failures=Failures(newest=tuple(history.failures)),
        rates=tuple(history.rates),
        syncs=tuple(history.syncs),
        mismatches=tuple(history.mismatches),
    )
    message = feed.to_json()
    assert len(message) < MOST_BYTES
    told = json.loads(message)
    assert told["mismatches"][0]["all"] is None and told["mismatches"][0]["kv"] is None, "JSON has no NaN"
    assert all(len(lane["trajectory_id"]) <= MAX_ID for lane in told["lanes"]["shown"])
    assert told["totals"]["num_running"] == 1


def test_small_numbers_survive() -> None:
    point = MismatchPoint(version=1, at_s=1234.5678901, all=3.2e-7)
    feed = Feed(
        now_s=0.0,
        wall_s=0.0,
        started_s=0.0,
        totals=Totals(live_version=0, num_running=0, num_queued=0, num_under_way=0),
        fleet=fleet_of([]),
        lanes=lanes(FeedHistory()),
        groups=Groups(),
        failures=Failures(),
        mismatches=(point,),
    )
    assert json.loads(feed.to_json())["mismatches"][0]["all"] == pytest.approx(3.2e-7, rel=1e-3)


def scheduler_with(num_groups: int, members: int) -> Scheduler:
    scheduler = Scheduler(
        SchedulerConfig(chunk_tokens=4),
        ModelLimits(vocab_size=50, max_model_len=64),
        {0: ShardCapacity(max_running=4, kv_tokens=1000)},
    )
    request = RolloutRequest(
        prompts=tuple(Prompt(token_ids=(1,), prompt_id=str(i)) for i in range(num_groups)),
        n_samples_per_prompt=members,
        sampling=SamplingParams(max_tokens=8),
        run_seed=0,
        group_ids=tuple(f"g{i}" for i in range(num_groups)),
    )
    scheduler.submit("h", request, 10.0)
    return scheduler


def test_groups_that_wait_are_counted_and_the_nearest_come_first() -> None:
    scheduler = scheduler_with(3, 2)
    first = scheduler.next_dispatches(11.0)
    assert len(first) == 4
    ended = next(d for d in first if d.chunk.trajectory_id == "h:g1/0")
    scheduler.on_chunk(
        ChunkResult(
            trajectory_id=ended.chunk.trajectory_id,
            token_ids=(1, 2),
            logprobs=(-0.5, -0.5),
            spans=(VersionSpan(version=0, start=0, stop=2),),
            finish_reason=FinishReason.STOP,
            shard=0,
        ),
        12.0,
    )
    groups = waiting_groups(scheduler.book, 15.0)
    assert (groups.num_waiting, groups.num_whole, groups.num_last, groups.oldest_s) == (3, 2, 1, 5.0)
    nearest = groups.shown[0]
    assert (nearest.group_id, nearest.num_done, nearest.num_members, nearest.waited_s) == ("g1", 1, 2, 5.0)
    assert sum(group.num_running for group in groups.shown) == 3
    assert sum(group.num_queued for group in groups.shown) == 2
    assert len(waiting_groups(scheduler_with(3 * MAX_GROUPS, 1).book, 11.0).shown) == MAX_GROUPS
    assert waiting_groups(scheduler_with(1, 1).book, 11.0).num_last == 0, "a group of one has no last member"


def speculation(tokens: int, hits: int) -> SpeculationRecord:
    tally = Tally.empty(3)
    tally.trials[0, 0], tally.hits[0, 0] = 10, hits
    tally.asked, tally.offered, tally.nodes, tally.accepted = 10, 8, 10, hits
    return SpeculationRecord(
        max_depth=3, num_steps=4, num_off_steps=1, drafting_sequences=10, drafting_tokens=tokens, by_source={"b": tally}
    )


def test_acceptance_is_that_of_the_last_minutes() -> None:
    window = SpeculationWindow()
    assert window.told(0.0) is None
    window.add(speculation(20, 9), 0.0)
    window.add(speculation(30, 5), 100.0)
    told = window.told(100.0)
    assert told is not None and told.tokens_per_step == 2.5 and told.off_share == 0.25
    (source,) = told.sources
    assert (source.num_asked, source.num_drafted, source.num_accepted) == (20, 20, 14)
    assert source.by_depth == (0.7, None, None)
    later = window.told(WINDOW_S + 50.0)
    assert later is not None and later.sources[0].num_accepted == 5
