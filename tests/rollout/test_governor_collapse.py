"""The alarm after a weight sync: how soon, how often for nothing, and what ends it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rollout.governor.collapse import RECOVERY_TRIALS, SourceWatch
from rollout.governor.config import GovernorConfig
from rollout.governor.tally import Tally


def tally_of(trials: int, hits: int) -> Tally:
    tally = Tally.empty(2)
    tally.trials[0, 0], tally.hits[0, 0] = trials, hits
    return tally


def watched(rate: float, config: GovernorConfig, rng, trials=4096, batch=8) -> SourceWatch:
    watch = SourceWatch("s", config)
    for _ in range(trials // batch):
        assert watch.learn(tally_of(batch, int(rng.binomial(batch, rate))), 0) is None
    return watch


def test_false_alarms_stay_below_the_promised_rate_over_100_000_steps():
    """At the worst acceptance that is tolerated, where the bound is tightest."""
    config, rng = GovernorConfig(alarm_probability=0.01), np.random.default_rng(0)
    num_alarms, syncs, steps = 0, 500, 200
    for sync in range(syncs):
        if sync % 10 == 0:
            watch = watched(0.7, config, rng, trials=2048)
        watch.begin_version()
        hits = rng.binomial(4, 0.7 * config.tolerated_drop, steps)
        for step in range(steps):
            if watch.learn(tally_of(4, int(hits[step])), sync) is not None:
                num_alarms += 1
                break
        watch._trials[:], watch._hits[:] = (1024, 0, 0, 0), (0.7 * 1024, 0, 0, 0)  # what was before, for the next sync
        watch.is_suspended = False
    # Ville: each of 500 tests gives an alarm with a probability of at most 0.01. P(Poisson(5) > 14) = 2e-4.
    assert num_alarms <= 14


def test_an_unchanged_source_gives_no_alarm_in_100_000_steps():
    config, rng = GovernorConfig(), np.random.default_rng(1)
    watch = watched(0.5, config, rng)
    hits = rng.binomial(8, 0.5, 100_000)
    for step, hit in enumerate(hits):
        if step % 500 == 0:
            watch.begin_version()
        assert (
            watch.learn(tally_of(8, int(hit)), step // 500) is None
        )  # 200 syncs at 1e-4: fails once in 50 seeds at most


@pytest.mark.parametrize("before", [0.9, 0.7, 0.4])
@pytest.mark.parametrize("after", [0.0, 0.1])
def test_a_collapse_is_seen_within_a_few_dozen_drafts(before, after):
    config, rng = GovernorConfig(), np.random.default_rng(2)
    lasted = []
    for _ in range(20):
        watch = watched(before, config, rng)
        watch.begin_version()
        rate, alarm, trials = before * after, None, 0
        while alarm is None:
            alarm = watch.learn(tally_of(1, int(rng.random() < rate)), 7)
            trials += 1
        lasted.append(trials)
        assert alarm.source == "s" and alarm.version == 7 and alarm.num_trials == trials
        assert alarm.before == pytest.approx(before, abs=4 * math.sqrt(before * (1 - before) / 512))
        assert alarm.after <= 0.5 * before
    # Wald: threshold over the mean step of the log-likelihood ratio, plus one step; the null is at the lower bound of
    # what was before (two standard errors of 1,024 trials), the dispersion at most 1.5 (of 32 blocks), and the mean of
    # 20 runs within three of their standard errors, each run's spread being at most its mean.
    lowered = before - 2 * math.sqrt(before * (1 - before) / 1024)
    tolerated, collapsed = lowered * config.tolerated_drop, lowered * config.collapsed_drop
    miss, hit = math.log((1 - collapsed) / (1 - tolerated)), math.log(collapsed / tolerated)
    drift = (1 - rate) * miss + rate * hit
    expected = 1.5 * -math.log(config.alarm_probability) / drift + 1
    assert np.mean(lasted) <= expected * (1 + 3 / math.sqrt(20))
    # Nor sooner than misses alone add up to the threshold, if what was before was seen four standard errors too high.
    highest = min(before + 4 * math.sqrt(before * (1 - before) / 512), 0.999)
    step = math.log((1 - highest * config.collapsed_drop) / (1 - highest * config.tolerated_drop))
    assert min(lasted) >= -math.log(config.alarm_probability) / step
    if before >= 0.7:
        assert max(lasted) < 128  # within a chunk of 128 tokens of a single request, or of 16 tokens of eight


def test_dependent_trials_are_discounted():
    """Requests that stand or fall together, 16 steps long: no more alarms than promised for independent ones."""
    config, rng = GovernorConfig(alarm_probability=0.01), np.random.default_rng(3)
    num_alarms = 0
    for _ in range(60):
        watch = SourceWatch("s", config)
        for step in range(1800):
            if step == 1200:
                watch.begin_version()
            if step % 16 == 0:
                rate = rng.choice([0.3, 0.9])
            num_alarms += watch.learn(tally_of(4, int(rng.binomial(4, rate))), 0) is not None
    # P(Poisson(60 · 0.01) > 4) = 4e-4.
    assert num_alarms <= 4


def fallen(config, rng) -> SourceWatch:
    watch = watched(0.8, config, rng)
    watch.begin_version()
    while watch.learn(tally_of(8, 0), 1) is None:
        pass
    assert watch.is_suspended
    return watch


def test_it_stays_off_until_it_recovers():
    watch = fallen(GovernorConfig(), np.random.default_rng(4))
    for _ in range(200):
        assert watch.learn(tally_of(2, 0), 1) is None and watch.is_suspended
    trials = 0
    while watch.is_suspended:
        watch.learn(tally_of(2, 2), 1)
        trials += 2
    # As good as tolerated over the latest trials: 0.8 · 0.8 of them at most have to be hits.
    assert 0.5 * RECOVERY_TRIALS < trials <= RECOVERY_TRIALS + 2


def test_a_new_version_gives_it_another_chance_judged_by_what_it_was_before_it_fell():
    watch = fallen(GovernorConfig(), np.random.default_rng(5))
    watch.begin_version()
    assert not watch.is_suspended
    alarm = None
    for _ in range(16):
        alarm = alarm or watch.learn(tally_of(8, 0), 2)
    assert alarm is not None and alarm.version == 2 and alarm.before == pytest.approx(0.8, abs=0.08)
    watch.begin_version()
    for _ in range(2000):
        assert watch.learn(tally_of(8, 6), 3) is None


def test_little_before_a_sync_is_no_yardstick():
    config, rng = GovernorConfig(), np.random.default_rng(6)
    watch = watched(0.9, config, rng, trials=32)
    watch.begin_version()
    for _ in range(500):
        assert watch.learn(tally_of(8, 0), 1) is None
