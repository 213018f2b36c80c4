"""The mismatch by cause: sums add, figures are what their definitions say, budgets lead to the configured action."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.cursor import Cursor
from rollout.errors import InvalidRequest, MismatchOverBudget
from rollout.mismatch import (
    NO_MISMATCH,
    CauseSums,
    Knobs,
    Mismatch,
    MismatchReport,
    measure,
    measure_by_version,
    report_of,
    respond,
)
from rollout.trainer_config import MismatchBudget, MismatchConfig, OverBudget


def sums(num_tokens: int, kl: float) -> Mismatch:
    return Mismatch(num_tokens=num_tokens, k3_sum=num_tokens * kl, abs_sum=0.0, abs_max=0.0)


def test_by_version_splits_what_measure_sums():
    generator = torch.Generator().manual_seed(0)
    train, sampled = torch.randn(2, 4, 30, generator=generator)
    is_trained = torch.rand(4, 30, generator=generator) < 0.7
    versions = torch.randint(3, 6, (4, 30), generator=generator)
    whole = measure(train, sampled, is_trained)
    parts = measure_by_version(train, sampled, is_trained, versions)
    assert [version for version, _ in parts] == [3, 4, 5]
    assert sum(part.num_tokens for _, part in parts) == whole.num_tokens
    # float64 sums of at most 120 terms in another order: a relative error below 120 × 2⁻⁵³
    assert sum(part.k3_sum for _, part in parts) == pytest.approx(whole.k3_sum, rel=1e-13)
    chosen = is_trained & (versions == 4)
    gap = (train - sampled)[chosen].double()
    assert dict(parts)[4].kl == pytest.approx(float((torch.exp(gap) - 1 - gap).mean()), rel=1e-9)


def test_staleness_is_the_part_of_all_that_older_tokens_contribute():
    part = CauseSums(all=sums(10, 0.5), by_version=((1, sums(2, 1.5)), (2, sums(3, 0.4)), (3, sums(5, 0.16))))
    report = report_of([part], version=3)
    assert report.all == pytest.approx(0.5) and report.num_tokens == 10
    assert report.staleness == pytest.approx(0.2 * 1.5 + 0.3 * 0.4)
    assert report_of([part], version=4).staleness == pytest.approx(report.all)  # now all of them are older
    assert report_of([part], version=1).staleness == 0.0


def test_figures_are_over_the_tokens_of_all_ranks():
    first = CauseSums(
        all=sums(30, 0.1),
        weights=sums(30, 0.02),
        routing=sums(20, 0.3),
        unreplayed=sums(20, 0.4),
        by_version=((7, sums(30, 0.1)),),
        num_choices=100,
        num_flips=8,
        is_captured=True,
    )
    second = CauseSums(all=sums(10, 0.5), weights=sums(10, 0.1), by_version=((6, sums(4, 0.2)), (7, sums(6, 0.7))))
    report = report_of([first, second, CauseSums()], version=7)
    assert report.all == pytest.approx((30 * 0.1 + 10 * 0.5) / 40)
    assert report.weights == pytest.approx((30 * 0.02 + 10 * 0.1) / 40)
    assert report.kv == 0.0
    assert report.routing == pytest.approx(0.3)  # over captured tokens only
    assert report.routing_without_replay == pytest.approx(0.4)
    assert report.routing_flip_rate == pytest.approx(0.08)
    assert report.staleness == pytest.approx(4 * 0.2 / 40)


def test_routing_is_not_reported_where_none_was_captured():
    report = report_of([CauseSums(all=sums(3, 0.1))], version=0)
    assert (report.routing, report.routing_without_replay, report.routing_flip_rate) == (None, None, None)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.floats(0, 2)), max_size=6))
def test_the_order_of_ranks_does_not_matter(parts):
    found = [CauseSums(all=sums(n, kl), by_version=((version, sums(n, kl)),)) for version, n, kl in parts]
    one, other = sum(found, CauseSums()), sum(found[::-1], CauseSums())
    assert [(v, s.num_tokens) for v, s in one.by_version] == [(v, s.num_tokens) for v, s in other.by_version]
    assert sum(s.num_tokens for _, s in one.by_version) == one.all.num_tokens == sum(n for _, n, _ in parts)


def report(**figures: float | None) -> MismatchReport:
    values = dict(all=0.0, weights=0.0, kv=0.0, routing=None, staleness=0.0) | figures
    return MismatchReport(**values, routing_without_replay=None, routing_flip_rate=None, num_tokens=5)


def config(action: OverBudget, **limits: float) -> MismatchConfig:
    return MismatchConfig(action=action, budget_kl=MismatchBudget(**limits))


KNOBS = Knobs(tis_cap=2.0, replay_routing=False)


@pytest.mark.parametrize("action", list(OverBudget))
def test_within_the_budget_nothing_happens(action: OverBudget):
    found = respond(report(all=0.1, weights=9.0), config(action, all=0.1, kv=0.5, routing=0.1), KNOBS)
    assert found.knobs == KNOBS and found.messages == ()


def test_warn_names_cause_figure_and_budget_and_changes_nothing():
    found = respond(report(weights=0.03), config(OverBudget.WARN, weights=0.02), KNOBS)
    assert found.knobs == KNOBS
    (message,) = found.messages
    assert "mismatch_kl/weights" in message and "0.03" in message and "0.02" in message


def test_stop_names_every_cause():
    with pytest.raises(MismatchOverBudget, match=r"mismatch_kl/all: got 0.5 .*; mismatch_kl/staleness: got 0.25 .*0.2"):
        respond(report(all=0.5, staleness=0.25), config(OverBudget.STOP, all=0.1, staleness=0.2), KNOBS)


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_is_over_every_budget(figure: float):
    with pytest.raises(MismatchOverBudget):
        respond(report(kv=figure), config(OverBudget.STOP, kv=1e9), KNOBS)


def test_tighten_replays_routing_where_that_may_help():
    for over, limits in (({"routing": 0.2}, {"routing": 0.1}), ({"all": 0.2, "routing": 0.0}, {"all": 0.1})):
        found = respond(report(**over), config(OverBudget.TIGHTEN, **limits), KNOBS)
        assert found.knobs == Knobs(tis_cap=2.0, replay_routing=True)
    for over, limits in (({"all": 0.2}, {"all": 0.1}), ({"kv": 0.2, "routing": 0.0}, {"kv": 0.1})):
        found = respond(report(**over), config(OverBudget.TIGHTEN, **limits), KNOBS)
        assert found.knobs == Knobs(tis_cap=1.5, replay_routing=False), "not captured, or not about routing"


def test_tighten_halves_the_cap_towards_one_and_then_says_that_nothing_is_left():
    knobs, tight = Knobs(tis_cap=2.0, replay_routing=True), config(OverBudget.TIGHTEN, all=0.1)
    caps = []
    for _ in range(20):
        response = respond(report(all=1.0, routing=0.0), tight, knobs)
        knobs = response.knobs
        caps.append(knobs.tis_cap)
    assert caps[:3] == [1.5, 1.25, 1.125] and 1 < caps[-1] < 1.001 and "nothing is left" in response.messages[0]
    off = Knobs(tis_cap=None, replay_routing=True)
    assert respond(report(all=1.0), tight, off).knobs == off


def test_knobs_survive_a_checkpoint():
    cursor = Cursor(step=3, version=3, data_cursor=9, knobs=Knobs(tis_cap=1.25, replay_routing=True))
    assert Cursor.from_json(cursor.to_json()) == cursor
    assert Cursor.from_json('{"step": 1, "version": 1, "data_cursor": 4}').knobs is None


def test_a_budget_must_be_positive():
    with pytest.raises(InvalidRequest, match=r"mismatch.budget_kl.kv"):
        MismatchBudget(kv=0.0)
    with pytest.raises(InvalidRequest, match=r"mismatch.every_steps"):
        MismatchConfig(every_steps=-1)
    assert NO_MISMATCH.kl == 0.0
