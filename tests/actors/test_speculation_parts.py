"""The parts of speculation inside an engine, without one."""

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
from actors.vllm_plugin.draft_records import DraftLimits, StepSize
from actors.vllm_plugin.drafters import AdversarialDrafter, RandomDrafter
from actors.vllm_plugin.options import PluginOptions
from actors.vllm_plugin.scheduler import VersionMixin
from actors.vllm_plugin.sibling_drafter import TOKENS_A_STEP, SiblingDrafter
from actors.vllm_plugin.tree_sampling import until_stop
from actors.vllm_plugin.trees import TreeBatch, Written
from rollout.config import EngineConfig, ModelConfig, SyncConfig
from rollout.errors import InvalidRequest
from rollout.speculation.tree import TokenTree
from rollout.speculation.walk import Accepted
from tests.actors.drafting_cases import LIMITS, MODEL, VOCAB, config, request

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"


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
