"""The desk at which an engine's trees are drafted, without an engine."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from actors.vllm_plugin.draft_records import NOTHING, StepSize, Verified
from actors.vllm_plugin.drafters import AdversarialDrafter, RandomDrafter
from actors.vllm_plugin.drafting import (
    LOOKS_A_STRIDE,
    MAX_REST_STRIDE,
    RESIZED_LOOKS,
    REST_AFTER,
    REST_STRIDE,
    DraftDesk,
)
from rollout.errors import InvalidRequest
from rollout.governor.comparison import TURN_STEPS, is_on_hold
from rollout.governor.records import OFF, SourceShare
from rollout.speculation.growth import ScoredTree
from rollout.speculation.tree import TokenTree
from rollout.speculation.walk import walk
from rollout.speculation_config import DraftPolicy
from tests.actors.drafting_cases import MODEL, VOCAB, config, request
from tests.actors.speculation_drafters import StubDrafter


def step(num_sequences: int, trees=(), num_tokens: int | None = None, peers: StepSize = NOTHING) -> Verified:
    rows = num_sequences + sum(tree.num_nodes for _, tree, _ in trees)
    return Verified(
        size=StepSize(sequences=num_sequences, rows=rows, has_prefill=False),
        peers=peers,
        context_tokens=10,
        num_tokens=num_sequences if num_tokens is None else num_tokens,
        version=0,
        trees=trees,
        is_continued=True,
    )


def desk(*drafters, clock=None, **options) -> DraftDesk:
    named = {f"tests:{place}": drafter for place, drafter in enumerate(drafters)}
    extra = {} if clock is None else {"clock": clock}
    return DraftDesk(config(sources=tuple(named), **options), named, vocab_size=VOCAB, max_nodes=40, **extra)


@pytest.mark.parametrize(
    ("tree", "what"),
    [
        (TokenTree.of_lists([1, VOCAB], [0, 1]), "vocabulary"),
        (TokenTree.chain(list(range(7))), "budget"),
        (TokenTree.of_lists([1, 2, 3], [0, 0, 0]), "width"),
    ],
)
def test_a_drafter_that_does_what_it_may_not(tree: TokenTree, what: str) -> None:
    one = desk(StubDrafter([tree]), max_width=2)
    one.choose(1, 10, 0, NOTHING)
    with pytest.raises(InvalidRequest, match=what):
        one.propose([request()])


def test_drafts_of_several_sources_make_one_tree_and_trimmed_ones_are_counted() -> None:
    first, second = TokenTree.of_lists([1, 2, 3], [0, 1, 2]), TokenTree.of_lists([1, 9], [0, 0])
    one = desk(StubDrafter([first], [-0.1, -0.2, -0.9]), StubDrafter([second], [-0.3, -0.5]), governor=True)
    with mock.patch.object(one, "_governor") as governor:
        governor.choose.return_value = one._fixed(["tests:0", "tests:1"])
        one.verified(step(1))
        one.choose(1, 10, 0, NOTHING)
        trees = one.propose([request()])
        assert list(trees) == ["a"] and one.tree_of("a") is trees["a"] and one.num_pending == 1
        assert trees["a"].to_lists() == ([1, 2, 9, 3], [0, 1, 0, 2])
        trimmed = trees["a"].prefix(3)
        one.verified(step(1, [("a", trimmed, walk(trimmed, [1, 2, 7, 7]))], num_tokens=3))
        outcome = governor.observe.call_args.args[0]
    assert one.num_pending == 0
    by_source = outcome.tally.by_source
    assert {name: (t.nodes, t.accepted, t.offered) for name, t in by_source.items()} == {
        "tests:0": (2, 2, 1),
        "tests:1": (1, 0, 1),
    }
    assert outcome.tally.together.nodes == 3 and outcome.step_s > 0


def test_a_drafter_without_an_idea_is_known_for_it() -> None:
    """Requests that nobody had a node for were asked and got no offer, beside others and alone."""
    one = desk(StubDrafter([TokenTree.chain([1, 2]), TokenTree.empty(), TokenTree.empty()]), governor=True)
    with mock.patch.object(one, "_governor") as governor:
        governor.choose.return_value = one._fixed(["tests:0"])
        one.verified(step(3))
        one.choose(3, 10, 0, NOTHING)
        trees = one.propose([request(name) for name in "abc"])
        one.verified(step(3, [(name, tree, walk(tree, [9, 9, 9])) for name, tree in trees.items()]))
        first = governor.observe.call_args.args[0]
        one.choose(2, 10, 0, NOTHING)
        with mock.patch.object(one._drafters["tests:0"], "propose", lambda asked, limits: [ScoredTree.empty()] * 2):
            assert one.propose([request("b"), request("c")]) == {}
        one.verified(step(2))
        second = governor.observe.call_args.args[0]
        one.verified(step(2))
        third = governor.observe.call_args.args[0]
    for outcome, asked, offered in ((first, 3, 1), (second, 2, 0)):
        tally = outcome.tally.by_source["tests:0"]
        assert (tally.asked, tally.offered, tally.accepted) == (asked, offered, 0)
        assert outcome.tally.together.asked == asked and not outcome.choice.is_off
    assert second.rows == second.num_sequences == 2 and dict(second.draft_s)["tests:0"] > 0
    assert third.tally is None, "nobody was asked again"


def test_peers_are_told_as_requests_and_rows() -> None:
    peers = StepSize(sequences=3, rows=11, has_prefill=False)
    one = desk(StubDrafter([TokenTree.chain([1])]), governor=True)
    with mock.patch.object(one, "_governor") as governor:
        one.verified(step(1))
        governor.choose.return_value = OFF
        one.choose(1, 10, 0, peers)
        one.verified(step(1, peers=peers))
        state, outcome = governor.choose.call_args.args[0], governor.observe.call_args.args[0]
        one.choose(1, 10, 0, peers)
        one.verified(step(1, peers=replace(peers, has_prefill=True)))
        prefilled = governor.observe.call_args.args[0]
    for told in (state, outcome):
        assert (told.peer_sequences, told.peer_rows) == (3, 11)
    assert not outcome.has_prefill and prefilled.has_prefill, "a step that waits for a prefill is no decode step"


def test_no_tree_is_deeper_than_its_request_can_go() -> None:
    deep = TokenTree.of_lists([1, 2, 3, 4, 5, 6], [0, 1, 2, 1, 3, 4])
    one = desk(StubDrafter([deep, deep]))
    one.choose(2, 10, 0, NOTHING)
    trees = one.propose([request("a", max_depth=2), request("b", max_depth=4)])
    assert trees["a"].to_lists() == ([1, 2, 4], [0, 1, 1])
    assert trees["b"] is deep


def test_all_trees_fit_a_step() -> None:
    one = desk(RandomDrafter(config(), MODEL, None))
    one.choose(100, 10, 0, NOTHING)
    assert one.budgets([str(i) for i in range(100)]) == [0] * 100
    assert one.budgets([str(i) for i in range(10)]) == [4] * 10
    assert one.budgets(["a"]) == [6]


def test_a_dear_source_is_asked_where_a_cheap_one_expects_too_little() -> None:
    """Three requests: for one the cheap source expects 1.2 tokens, for one 0.3, for one it has no idea."""
    cheap = StubDrafter([TokenTree.chain([1, 2]), TokenTree.chain([1, 2]), TokenTree.empty()])
    cheap.propose = mock.Mock(  # type: ignore[method-assign]
        return_value=[
            ScoredTree(tree=tree, scores=np.log(chances), sources=np.ones(len(chances), dtype=np.int32))
            for tree, chances in (
                (TokenTree.chain([1, 2]), np.array([0.8, 0.4])),
                (TokenTree.chain([1, 2]), np.array([0.2, 0.1])),
                (TokenTree.empty(), np.empty(0)),
            )
        ]
    )
    dear = StubDrafter([TokenTree.chain([5])] * 2, [-0.1])
    one = desk(dear, cheap, governor=True)
    requests = [request(name) for name in "abc"]
    with mock.patch.object(one, "_governor") as governor:
        shares = (
            SourceShare(source="tests:0", num_nodes=3, enough_tokens=1.0),
            SourceShare(source="tests:1", num_nodes=3),
        )
        governor.choose.return_value = replace(one._fixed([]), shares=shares)
        one.verified(step(3))
        one.choose(3, 30, 0, NOTHING)
        with mock.patch.object(dear, "propose", wraps=dear.propose) as asked:
            trees = one.propose(requests)
        assert [r.request_id for r in asked.call_args.args[0]] == ["b", "c"]
        assert {name: tree.tokens.tolist() for name, tree in trees.items()} == {"a": [1, 2], "b": [5, 1, 2], "c": [5]}
        one.verified(step(3, [(name, tree, walk(tree, [9] * tree.num_rows)) for name, tree in trees.items()]))
        by_source = governor.observe.call_args.args[0].tally.by_source
        assert (by_source["tests:0"].asked, by_source["tests:1"].asked) == (2, 3)


def test_catching_up_is_timed_apart_from_drafting() -> None:
    now = [0.0]
    drafter = StubDrafter([TokenTree.chain([1, 2])])

    def passing(seconds: float, result: object) -> object:
        now[0] += seconds
        return result

    drafter.prepare = lambda requests: passing(5.0, None)  # type: ignore[method-assign]
    drafted = drafter.propose([request()], None)
    drafter.propose = lambda requests, limits: passing(0.25, drafted)  # type: ignore[method-assign]
    one = desk(drafter, clock=lambda: now[0], governor=True)
    with mock.patch.object(one, "_governor") as governor:
        governor.choose.return_value = one._fixed(["tests:0"])
        one.verified(step(1))
        one.choose(1, 10, 0, NOTHING)
        trees = one.propose([request()])
        one.verified(step(1, [(name, tree, walk(tree, [9] * tree.num_rows)) for name, tree in trees.items()]))
        outcome = governor.observe.call_args.args[0]
        assert (outcome.draft_s, outcome.prepare_s, outcome.step_s) == ((("tests:0", 0.25),), 5.0, 5.25)
        one.choose(1, 10, 0, NOTHING)
        one.verified(step(1))
        assert governor.observe.call_args.args[0].prepare_s == 0.0


def test_a_step_that_follows_drafts_is_known_for_it() -> None:
    one = desk(StubDrafter([TokenTree.chain([1])]), governor=True)
    with mock.patch.object(one, "_governor") as governor:
        follows = []
        for drafts in (False, False, True, True, False, False):
            one.verified(step(1, [(name, one.tree_of(name), walk(one.tree_of(name), [9, 9])) for name in one._pending]))
            follows.append(governor.observe.call_args is not None and governor.observe.call_args.args[0].follows_drafts)
            governor.choose.return_value = one._fixed(["tests:0"]) if drafts else OFF
            one.choose(1, 10, 0, NOTHING)
            if drafts:
                one.propose([request()])
    # The fourth and the fifth verify trees, the sixth finds their bookkeeping.
    assert follows == [False, False, False, True, True, True]
    with mock.patch.object(one, "_governor") as governor:
        one.verified(step(1))
        assert not governor.observe.call_args.args[0].follows_drafts


def test_steps_that_nobody_drafts_for_are_looked_at_now_and_then() -> None:
    now = [0.0]
    one = desk(StubDrafter([TokenTree.chain([1])]), clock=lambda: now[0], governor=True)
    with mock.patch.object(one, "_governor") as governor:
        governor.choose.return_value = OFF

        def run_steps(count: int, size: int = 4, version: int = 0) -> int:
            """How many of them were looked at."""
            looked = 0
            for _ in range(count):
                now[0] += 0.01
                if not one.rests(size):
                    one.verified(step(size))
                    one.choose(size, 10, version, NOTHING)
                    looked += 1
            return looked

        assert run_steps(RESIZED_LOOKS) == RESIZED_LOOKS, "at a size that is new drafts may pay"
        first_stride = REST_STRIDE * LOOKS_A_STRIDE
        assert run_steps(first_stride) == LOOKS_A_STRIDE
        for call in governor.observe.call_args_list:
            assert call.args[0].step_s == pytest.approx(0.01), "of one step, whatever came before"
        assert governor.observe.call_args.args[0].num_rested == REST_STRIDE - 1
        assert run_steps(RESIZED_LOOKS, size=1) == RESIZED_LOOKS
        run_steps(3 * first_stride)
        assert run_steps(3 * MAX_REST_STRIDE) == 3, "less and less is looked at"
        assert run_steps(first_stride, size=1) == LOOKS_A_STRIDE, "that size is known"
        while not run_steps(1, version=1):
            pass
        several = LOOKS_A_STRIDE - 1
        assert run_steps(several * REST_STRIDE, version=1) == several, "drafts are new with the weights"
        run_steps(3 * first_stride, version=1)
        governor.choose.return_value = replace(one._fixed(["tests:0"]), is_trial=True)
        while not run_steps(1, version=1):
            pass
        governor.choose.return_value = OFF
        assert run_steps(REST_AFTER, version=1) == REST_AFTER, "what is tried may be tried again"
        governor.choose.return_value = one._fixed(["tests:0"])
        run_steps(MAX_REST_STRIDE, version=1)
        assert not one.rests(4), "somebody drafts"
        one.turn([])
        assert one.is_turned_off


def test_turned_off_nothing_is_drafted() -> None:
    one = desk(RandomDrafter(config(), MODEL, None), AdversarialDrafter(config(), MODEL, None))
    assert one.choose(3, 10, 0, NOTHING).sources == ("tests:0", "tests:1")
    one.turn([])
    assert one.choose(3, 10, 0, NOTHING).is_off
    one.turn(["tests:1"])
    assert one.choose(3, 10, 0, NOTHING).sources == ("tests:1",)
    assert one.choose(0, 0, 0, NOTHING).is_off
    with pytest.raises(InvalidRequest, match="nobody"):
        one.turn(["nobody"])
    with pytest.raises(InvalidRequest, match="policy of drafts: got now, expected one of governed, always, never"):
        one.turn([], "now")


def test_never_means_at_any_moment() -> None:
    """Nobody drafts, what drafters need is kept, and what passes meanwhile is not laid at the governor's door."""
    now = [0.0]
    one = desk(StubDrafter([TokenTree.chain([1])]), governor=True, clock=lambda: now[0])
    with mock.patch.object(one, "_governor") as governor:
        governor.choose.return_value = one._fixed(["tests:0"])
        governor.budgets.return_value = [6]

        def next_step(trees=()) -> bool:
            """Whether it was looked at."""
            now[0] += 0.010
            if one.rests(1):
                return False
            one.verified(step(1, trees))
            one.choose(1, 10, 0, NOTHING)
            return True

        next_step()
        tree = one.propose([request()])["a"]
        one.turn(["tests:0"], DraftPolicy.NEVER)
        assert next_step([("a", tree, walk(tree, [9, 9]))]), "a tree that was drafted before is verified"
        assert one.choose(1, 10, 0, NOTHING).is_off and not one.is_turned_off
        governor.reset_mock()
        assert not any(next_step() for _ in range(100))
        one.turn(["tests:0"])
        assert next_step() and next_step()
        observed = [call.args[0] for call in governor.observe.call_args_list]
        assert [one.step_s for one in observed] == pytest.approx([0.010, 0.010])
        assert all(one.choice.is_off for one in observed) and governor.choose.call_count == 2


def test_compared_means_by_turns() -> None:
    """The governor is shown its own turns alone, and no time that passes in the others."""
    now, looked_at = [0.0], []
    one = desk(StubDrafter([TokenTree.chain([1])]), governor=True, clock=lambda: now[0])
    one.turn(["tests:0"], DraftPolicy.COMPARED)
    with mock.patch.object(one, "_governor") as governor:
        governor.choose.return_value = OFF
        for number in range(4 * TURN_STEPS):
            now[0] += 0.020 if is_on_hold(number) else 0.010
            if not one.rests(1, number):
                looked_at.append(number)
                one.verified(step(1))
                one.choose(1, 10, 0, NOTHING)
        observed = [call.args[0].step_s for call in governor.observe.call_args_list]
    assert looked_at == [number for number in range(4 * TURN_STEPS) if not is_on_hold(number)]
    assert observed == pytest.approx([0.010] * (len(looked_at) - 1)), "nobody knows when the first began"


def test_always_means_whatever_the_governor_would_choose() -> None:
    """And what comes of it is not laid at the governor's door."""
    one = desk(StubDrafter([TokenTree.chain([1])]), governor=True)
    with mock.patch.object(one, "_governor") as governor:
        governor.choose.return_value = OFF
        assert one.choose(1, 10, 0, NOTHING).is_off
        one.turn(["tests:0"], DraftPolicy.ALWAYS)
        one.verified(step(1))
        assert one.choose(1, 10, 0, NOTHING).budget_nodes == one.budgets(["a"])[0] == 6
        tree = one.propose([request()])["a"]
        one.turn(["tests:0"])
        one.verified(step(1, [("a", tree, walk(tree, [9, 9]))]))
        assert one.num_pending == 0 and governor.observe.call_count == 0
        assert one.choose(1, 10, 0, NOTHING).is_off


def test_useless_drafts_are_given_up() -> None:
    """A step of 10 ms, and half of one more with drafts that are always wrong: soon there are hardly any."""
    now = [0.0]
    one = desk(StubDrafter([TokenTree.chain([7, 7, 7])] * 4, keeps_budget=True), clock=lambda: now[0], governor=True)
    names = list("abcd")
    drafted = []
    for _ in range(400):
        choice = one.choose(4, 400, 0, NOTHING)
        requests = [request(n, budget=b) for n, b in zip(names, one.budgets(names), strict=True) if b]
        trees = {} if choice.is_off else one.propose(requests)
        drafted.append(bool(trees))
        now[0] += 0.015 if trees else 0.010
        verified = [(name, tree, walk(tree, [0] * tree.num_rows)) for name, tree in trees.items()]
        one.verified(step(4, verified))
    assert any(drafted), "it was tried"
    assert now[0] < 400 * 0.010 / 0.97
