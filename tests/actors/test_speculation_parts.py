"""The parts of speculation inside an engine, without one."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vllm.v1.request import RequestStatus

from actors.engine_args import engine_args
from actors.vllm_plugin import patches
from actors.vllm_plugin.clover_drafter import CloverDrafter
from actors.vllm_plugin.draft_records import NOTHING, DraftLimits, DraftRequest, StepSize, Verified
from actors.vllm_plugin.drafters import AdversarialDrafter, RandomDrafter
from actors.vllm_plugin.drafting import (
    LOOKS_A_STRIDE,
    MAX_REST_STRIDE,
    RESIZED_LOOKS,
    REST_AFTER,
    REST_STRIDE,
    DraftDesk,
)
from actors.vllm_plugin.options import PluginOptions
from actors.vllm_plugin.scheduler import VersionMixin
from actors.vllm_plugin.sibling_drafter import TOKENS_A_STEP, SiblingDrafter
from actors.vllm_plugin.tree_sampling import until_stop
from actors.vllm_plugin.trees import TreeBatch, Written
from rollout.config import EngineConfig, ModelConfig, SyncConfig
from rollout.errors import InvalidRequest
from rollout.governor.records import OFF, SourceShare
from rollout.speculation.growth import ScoredTree
from rollout.speculation.tree import TokenTree
from rollout.speculation.walk import Accepted, walk
from rollout.speculation_config import SpeculationConfig
from tests.actors.speculation_drafters import StubDrafter

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
VOCAB = 50
MODEL = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: VOCAB))


def config(**options) -> SpeculationConfig:
    return SpeculationConfig(**{"enabled": True, "governor": False, "budget_nodes": 6} | options)


def request(name: str = "a", tokens=(1, 2, 3, 4), budget: int = 6, max_depth: int = 8, group=None) -> DraftRequest:
    return DraftRequest(
        request_id=name,
        token_ids=np.array(tokens, dtype=np.int32),
        num_prompt_tokens=2,
        seed=5,
        temperature=1.0,
        top_k=None,
        top_p=1.0,
        group=group,
        member=name,
        max_depth=max_depth,
        budget=budget,
    )


LIMITS = DraftLimits(max_width=4, max_depth=5)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"max_width": 5}, "max_width"),
        ({"max_width": 0}, "max_width"),
        ({"budget_nodes": 0}, "budget_nodes"),
        ({"max_depth": 0}, "max_depth"),
        ({"sources": ("nobody",)}, "sources"),
        ({"sources": ()}, "sources"),
        ({"sources": ("clover2",)}, "draft_model"),
        ({"draft_travels": True}, "draft_travels"),
    ],
)
def test_impossible_options(options: dict, what: str) -> None:
    with pytest.raises(InvalidRequest, match=f"engine.speculation.{what}"):
        config(**options)


def test_options_reach_the_engine_and_what_cannot_be_is_refused() -> None:
    def arguments(on_gpu: bool = False, **engine):
        model = ModelConfig(path="models/tiny")
        options = EngineConfig(num_shards=1, speculation=config(sources=("sibling", "random")), **engine)
        return engine_args(model, options, SyncConfig(), rank=0, rendezvous=None, on_gpu=on_gpu)

    found = PluginOptions.of(SimpleNamespace(additional_config=arguments().additional_config))
    assert found.speculation == config(sources=("sibling", "random"))
    with pytest.raises(InvalidRequest, match="tensor_parallel_size"):
        arguments(tensor_parallel_size=2)
    on_gpu = arguments(on_gpu=True)
    assert (on_gpu.attention_backend, on_gpu.async_scheduling) == ("CUSTOM", False)
    off = engine_args(
        ModelConfig(path="models/tiny"), EngineConfig(num_shards=1), SyncConfig(), rank=0, rendezvous=None, on_gpu=False
    )
    assert PluginOptions.of(SimpleNamespace(additional_config=off.additional_config)).speculation is None


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


def test_ranks_tell_each_other_the_size_of_their_steps() -> None:
    """Three ranks: this one decodes with drafts, one prefills, one has nothing to do."""
    columns = torch.tensor([[9, 9, 0, 0, 4, 3, 9], [40, 40, 0, 0, 4, 2, 2], [1, 1, 0, 0, 5, 0, 0]], dtype=torch.int32)
    said: list[list[int]] = []

    def gather_rows(rows: list[torch.Tensor], counts: list[int]) -> list[torch.Tensor]:
        said.append(rows[0][0].tolist())
        return [torch.cat([rows[0], columns[1:]])]

    exchange = SimpleNamespace(gather_rows=gather_rows)
    group = SimpleNamespace(device_communicator=SimpleNamespace(exchange=exchange))
    config = SimpleNamespace(data_parallel_size=3, data_parallel_rank=0)
    with (
        mock.patch.object(patches, "get_dp_group", lambda: group),
        mock.patch.object(patches.dp_utils, "_get_device_and_group", lambda config: ("cpu", None)),
        mock.patch.object(patches, "_sizes", []),
    ):
        patches.announce(3, 9)
        told = patches._coordinate_with_vote(False, 9, 9, 0, config)
        peers = patches.size_of_peers(0)
        patches._coordinate_with_vote(False, 1, 1, 0, config)  # a dummy step announces nothing
    assert told.T.tolist() == [[9, 9, 0, 0], [40, 40, 0, 0], [1, 1, 0, 0]], "vLLM sees its own four rows"
    assert peers == StepSize(sequences=2, rows=2, has_prefill=True)
    assert [one[-2:] for one in said] == [[3, 9], [0, 0]]


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


def test_a_draft_model_that_was_off_catches_up_before_it_drafts() -> None:
    """What is drafted is the same either way; a step's own row is left to the step."""
    weights = load_file(TINY / "model.safetensors")
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    model = SimpleNamespace(embed_tokens=SimpleNamespace(weight=embedding), lm_head=SimpleNamespace(weight=head))
    vocab_size, hidden_size = head.shape
    described = mock.Mock(model=str(TINY), get_vocab_size=lambda: vocab_size, get_hidden_size=lambda: hidden_size)
    tokens = np.arange(3, 60, dtype=np.int32)
    states = torch.randn(len(tokens) - 1, hidden_size, generator=torch.Generator().manual_seed(0)).to(head.dtype)
    asked, limits = request(tokens=tokens), DraftLimits(max_width=4, max_depth=4)
    drafted = []
    for prepares in (True, False):
        engine = SimpleNamespace(model_config=described)
        drafter = CloverDrafter(config(draft_model=str(TINY / "draft")), engine, model)
        drafter.take_hidden(["a"], np.array([len(states)]), np.array([0]), states)
        if prepares:
            drafter.prepare([asked])
            assert drafter._lag(asked) == 1
        (tree,) = drafter.propose([asked], limits)
        assert drafter._lag(asked) == 0
        drafter.prepare([asked])
        drafted.append((tree.tree.tokens.tolist(), tree.tree.parents.tolist()))
    assert drafted[0] == drafted[1] and drafted[0][0]


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


def test_always_means_whatever_the_governor_would_choose() -> None:
    """And what comes of it is not laid at the governor's door."""
    one = desk(StubDrafter([TokenTree.chain([1])]), governor=True)
    with mock.patch.object(one, "_governor") as governor:
        governor.choose.return_value = OFF
        assert one.choose(1, 10, 0, NOTHING).is_off
        one.turn(["tests:0"], True)
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


@pytest.mark.parametrize("drafter", [RandomDrafter, AdversarialDrafter])
def test_drafters_that_are_wrong_keep_the_limits(drafter: type) -> None:
    one = drafter(config(), MODEL, None)
    sizes = set()
    for turn in range(200):
        budget, depth = 1 + turn % 9, 1 + turn % 4
        asked = request(tokens=np.arange(turn % 7 + 1), budget=budget, max_depth=depth)
        limits = DraftLimits(max_width=1 + turn % 4, max_depth=5)
        (scored,) = one.propose([asked], limits)
        scored.tree.check(max_width=limits.max_width, budget=budget, vocab_size=VOCAB)
        assert scored.tree.depth <= depth and (np.diff(scored.scores) <= 0).all()
        sizes.add(scored.num_nodes)
    assert max(sizes) >= 4


def test_siblings_draft_for_each_other_across_shards() -> None:
    here, there = (SiblingDrafter(config(), MODEL, None) for _ in range(2))
    story = np.arange(3, 3 + 3 * TOKENS_A_STEP) % VOCAB
    here.learn(request("a", story[:40], group="g"))
    here.learn(request("a", story, group="g"))
    delta = here.delta("there")
    assert sum(len(one.tokens) for one in delta) >= len(story) - 2 and not here.delta("there")
    there.apply(delta)
    late = request("b", story[:50], group="g")
    assert there.propose([request("c", story[:50], group="other"), late], LIMITS)[0].num_nodes == 0
    for _ in range(4):  # a few tokens a step
        (drafted,) = there.propose([late], LIMITS)
    assert drafted.tree.tokens.tolist()[0] == story[50]
    own = there.delta("here")
    assert {one.member for one in own} == {"b", "c"}, "what came from a shard does not go back to it"


def test_rows_positions_and_moves_of_a_step() -> None:
    """A prefill chunk, a request with a tree, a decoding one, and a chain."""
    tree, chain = TokenTree.of_lists([1, 2, 3, 4], [0, 0, 1, 2]), TokenTree.chain([5, 6])
    batch = TreeBatch(
        trees=[TokenTree.empty(), tree, TokenTree.empty(), chain],
        starts=np.array([0, 7, 12, 13, 16]),
        bases=np.array([20, 100, 30, 40]),
    )
    rows, owners, positions = batch.sampled_rows
    assert rows.tolist() == [6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert owners.tolist() == [0, 1, 1, 1, 1, 1, 2, 3, 3, 3]
    assert positions.tolist() == [20, 100, 101, 101, 102, 102, 30, 40, 41, 42]
    assert batch.branching() == [1]
    drawn, places = batch.draws
    assert drawn[places].tolist() == [0, 1, 2, 2, 4, 4, 6, 7, 8, 9], "the first of each request's rows at a depth"
    impl = mock.Mock()
    key, value = torch.arange(16.0)[:, None], torch.arange(16.0)[:, None] + 50
    batch.written.append(Written(impl=impl, layer="layer", key=key, value=value, kv_cache="cache"))
    accepted = [
        Accepted(tokens=(9,), rows=(0,)),
        Accepted(tokens=(2, 4, 8), rows=(0, 2, 4)),
        Accepted(tokens=(9,), rows=(0,)),
        Accepted(tokens=(5, 6, 1), rows=(0, 1, 2)),
    ]
    moved, slots = batch.move(accepted, torch.arange(16) + 200)
    assert moved.tolist() == [9, 11] and slots.tolist() == [208, 209]
    layer, keys, values, cache, targets = impl.do_kv_cache_update.call_args.args
    assert (layer, cache) == ("layer", "cache") and targets.tolist() == [208, 209]
    assert keys.flatten().tolist() == [9, 11] and values.flatten().tolist() == [59, 61]
    assert not batch.written


def test_nothing_is_accepted_after_a_token_that_ends_the_request() -> None:
    walked = Accepted(tokens=(5, 2, 8, 9), rows=(0, 1, 3, 4))

    def until(stop_token_ids: list[int] | None, eos_token_id: int | None = None) -> Accepted:
        return until_stop(walked, SimpleNamespace(stop_token_ids=stop_token_ids, eos_token_id=eos_token_id))

    assert until([2, 8]) == until([8], eos_token_id=2) == Accepted(tokens=(5, 2), rows=(0, 1))
    assert until([9]) is walked and until(None) is walked, "the last one may end it"
    assert until([5]).num_drafted == 0


def test_the_scheduler_takes_drafts_of_running_requests_only() -> None:
    scheduler = VersionMixin.__new__(VersionMixin)
    states = {"a": RequestStatus.RUNNING, "b": RequestStatus.PREEMPTED, "c": RequestStatus.FINISHED_STOPPED}
    scheduler.requests = {name: SimpleNamespace(status=status, spec_token_ids=[]) for name, status in states.items()}
    scheduler._take_drafts({"a": [1, 2], "b": [3], "c": [4], "gone": [5]})
    assert {name: one.spec_token_ids for name, one in scheduler.requests.items()} == {"a": [1, 2], "b": [], "c": []}
