"""Feeds for the tests of the page: a small service in which everything has happened, and one in which nothing has."""

from __future__ import annotations

import numpy as np

from rollout.feed import (
    FailureCount,
    Failures,
    Feed,
    FeedQuery,
    Groups,
    MismatchPoint,
    SourceAcceptance,
    Speculation,
    SyncPoint,
    Totals,
    WaitingGroup,
)
from rollout.feed_fleet import ShardTile, fleet_of
from rollout.feed_history import FeedHistory
from rollout.types import VersionSpan

HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
NOW_S, WALL_S = 5000.0, 1_790_000_000.0
NUM_SHARDS, MAX_TOKENS = 6, 32_768


def busy_history(seed: int = 0) -> FeedHistory:
    """Twenty trajectories over ten minutes, with moves, three weight versions, a lost chunk and a failure."""
    rng, history = np.random.default_rng(seed), FeedHistory()
    for index in range(20):
        flight_id = f"h:math/{index // 4}/{index % 4}" if index else f"h:{HOSTILE}/0"
        now, tokens, shard = NOW_S - 600 + rng.uniform(0, 250), 0, int(rng.integers(NUM_SHARDS - 1))
        num_chunks = 0
        while now < NOW_S:
            if rng.random() < 0.2:
                shard = int(rng.integers(NUM_SHARDS - 1))
            history.chunk_started(
                flight_id, shard, now, num_prompt_tokens=2048, num_tokens=tokens, max_tokens=MAX_TOKENS
            )
            duration = rng.uniform(35, 110)
            if now + duration >= NOW_S:
                break
            version = 5 + int((now - (NOW_S - 600)) // 200)
            is_across = (now + duration - (NOW_S - 600)) // 200 > version - 5
            first = 1200 if is_across else 2048
            spans = [VersionSpan(version=version, start=0, stop=first)]
            spans += [VersionSpan(version=version + 1, start=first, stop=2048)] if is_across else []
            num_chunks += 1
            is_lost = index == 5 and num_chunks == 2
            history.chunk_ended(
                flight_id,
                shard,
                now + duration,
                "lost" if is_lost else "length",
                num_tokens=0 if is_lost else 2048,
                spans=[] if is_lost else spans,
                num_cached_tokens=0 if is_lost else tokens,
            )
            tokens, now = tokens + (0 if is_lost else 2048), now + duration + rng.uniform(0.1, 2)
        if index == 7:
            history.trajectory_ended(flight_id, "failed", NOW_S - 40, f"shard 2: RuntimeError: {HOSTILE}")
            history.failed(flight_id, "engine_error", f"shard 2: RuntimeError: {HOSTILE}", NOW_S - 40)
    for at in np.arange(NOW_S - 600, NOW_S, 2.0):
        is_flip = any(abs(at - NOW_S + 600 - flip) < 4 for flip in (200, 400))
        history.rate(float((4200 if is_flip else 9000) + 350 * rng.standard_normal()), float(at))
    for place, version in enumerate((6, 7)):
        history.syncs.append(
            SyncPoint(
                version=version,
                at_s=NOW_S - 400 + 200 * place,
                in_flight="keep",
                num_bytes=3_400_000_000,
                num_bytes_full=118_000_000_000,
                stage_s=5.1 + place,
                flip_s=0.08,
                stall_s=0.031 * (place + 1),
            )
        )
    history.syncs.append(
        SyncPoint(version=8, at_s=NOW_S - 12, reason="version 8: shard 3 has another digest than its sender")
    )
    for version in range(1, 8):
        drawn = {name: float(10**-power * rng.lognormal(0, 0.25)) for name, power in (("weights", 3.4), ("kv", 3.9))}
        history.mismatches.append(
            MismatchPoint(
                version=version,
                at_s=NOW_S - 100 * (8 - version),
                all=float(8e-4 * rng.lognormal(0, 0.2)),
                staleness=None if version % 2 else 2.1e-5,
                routing=0.0,
                **drawn,
            )
        )
    return history


def tiles() -> list[ShardTile]:
    """Five that serve, of them one that drains and one with older weights; one that is down."""
    rng = np.random.default_rng(1)
    shards = [
        ShardTile(
            rank=rank,
            group=rank // 2,
            num_running=int(rng.integers(20, 64)),
            num_waiting=0,
            kv_used=float(rng.uniform(0.3, 0.97)),
            kv_reserved=0.98,
            tokens_per_s=float(rng.uniform(1200, 2400)),
            version=6 if rank == 3 else 7,
            is_draining=rank == 4,
        )
        for rank in range(NUM_SHARDS - 1)
    ]
    return [*shards, ShardTile(rank=NUM_SHARDS - 1, group=2, is_live=False)]


def busy_feed(query: FeedQuery, *, moment: int = 0, history: FeedHistory | None = None) -> Feed:
    """Everything has happened; `moment` moves its clock on by seconds."""
    waiting = tuple(
        WaitingGroup(
            group_id=HOSTILE if place == 0 else f"math/{place}",
            num_members=8,
            num_done=max(0, 7 - place),
            num_running=min(8, 1 + place),
            num_queued=max(0, place - 7),
            most_tokens=30_000 - 1900 * place,
            max_tokens=MAX_TOKENS,
            waited_s=620.0 + 11 * place,
        )
        for place in range(12)
    )
    drafts = Speculation(
        span_s=120.0,
        sources=(
            SourceAcceptance(
                source="clover2",
                num_asked=9000,
                num_offered=9000,
                num_drafted=36_000,
                num_accepted=15_400,
                by_depth=(0.81, 0.66, 0.52, 0.41),
            ),
            SourceAcceptance(
                source="sibling",
                num_asked=9000,
                num_offered=4100,
                num_drafted=20_000,
                num_accepted=6100,
                by_depth=(0.55, 0.5, 0.47, None),
            ),
        ),
        tokens_per_step=3.18,
        off_share=0.07,
        alarms=("sibling",),
    )
    kept = history or busy_history()
    return Feed(
        now_s=NOW_S + moment,
        wall_s=WALL_S + moment,
        started_s=NOW_S - 90_000,
        totals=Totals(
            live_version=7,
            num_running=214,
            num_queued=1480,
            num_under_way=1702,
            num_finished=48_211,
            num_aborted=12,
            num_failed=37,
            num_tokens=412_300_000 + 9000 * moment,
            num_tokens_discarded=120_000,
            num_chunks=201_000,
            num_migrations=1200,
            num_cuts=40,
            num_clients=2,
        ),
        fleet=fleet_of(tiles(), num_groups_wanted=3, age_s=0.4, cell=query.cell),
        lanes=kept.lanes(query, lambda flight_id: None),
        groups=Groups(num_waiting=214, num_whole=120, num_last=31, oldest_s=741.0, shown=waiting),
        failures=Failures(
            trajectories=(
                FailureCount(kind="reward_timeout", count=22),
                FailureCount(kind="engine_error", count=11),
                FailureCount(kind="stale", count=4),
            ),
            groups=(FailureCount(kind="died", count=1),),
            newest=tuple(kept.failures),
            num_retries=9,
            num_restarts=1,
        ),
        rates=tuple(kept.rates),
        syncs=tuple(kept.syncs),
        mismatches=tuple(kept.mismatches),
        speculation=drafts,
    )


def empty_feed(query: FeedQuery) -> Feed:
    """A service that has just begun: no shard has started, nobody has asked for anything."""
    return Feed(
        now_s=NOW_S,
        wall_s=WALL_S,
        started_s=NOW_S - 3,
        totals=Totals(live_version=0, num_running=0, num_queued=0, num_under_way=0),
        fleet=fleet_of([]),
        lanes=FeedHistory().lanes(query, lambda flight_id: None),
        groups=Groups(),
        failures=Failures(),
    )
