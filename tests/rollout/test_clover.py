"""The draft model: sequences against increments, and the trees it grows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout.errors import InvalidRequest
from rollout.speculation.clover import CloverDraft
from rollout.speculation.clover_simulation import best_nodes
from rollout.speculation.clover_state import FIRST_CAPACITY, DraftState, StateStore
from rollout.speculation.clover_trees import CloverProposer, DraftSampling, grow_beams
from tests.rollout.clover_cases import HIDDEN, VOCAB, ToyTarget, scrambled_draft, toy_config, toy_target

# Both ways compute the same sums of at most a few hundred float32 terms of size about 1, in another order: errors of
# about sqrt(300) · 2**-24 = 1e-6 a sum, through two layers and norms that enlarge them a few times.
TOLERANCE = 2e-5


def sequences(target: ToyTarget, lengths: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    tokens = [torch.randint(0, VOCAB, (n,), generator=generator) for n in lengths]
    return tokens, [target.hidden(t) for t in tokens]


def sampling(batch: int, temperature: float = 1.0, **cuts: torch.Tensor) -> DraftSampling:
    return DraftSampling(seeds=torch.arange(batch) + 7, temperature=torch.full((batch,), temperature), **cuts)


def extended(draft: CloverDraft, target: ToyTarget, lengths: list[int]) -> list[DraftState]:
    tokens, hidden = sequences(target, lengths)
    states = [DraftState.at() for _ in lengths]
    with torch.no_grad():
        draft.extend(
            states,
            [n - 1 for n in lengths],
            torch.cat([t[1:] for t in tokens]),
            torch.cat([h[:-1] for h in hidden]),
            target.layers,
        )
    return states


@torch.no_grad()
def test_roots_have_a_state_for_each_token_that_follows_one_and_look_back_only() -> None:
    target, draft = toy_target(), scrambled_draft()
    (tokens,), (hidden,) = sequences(target, [20])
    roots = draft.roots(tokens[None], hidden[None], target.layers)
    assert roots.shape == (1, 19, HIDDEN)
    changed = tokens.clone()
    changed[12] = (changed[12] + 1) % VOCAB
    other = draft.roots(changed[None], target.hidden(changed)[None], target.layers)
    assert torch.equal(other[:, :11], roots[:, :11]), "root 11 is the first that knows token 12"
    assert not torch.allclose(other[:, 11], roots[:, 11])


@torch.no_grad()
def test_increments_of_any_size_give_the_states_of_the_whole_sequence() -> None:
    target, draft = toy_target(), scrambled_draft()
    lengths = [2 * FIRST_CAPACITY + 3, 40, 90]
    tokens, hidden = sequences(target, lengths)
    whole = [draft.roots(t[None], h[None], target.layers)[0] for t, h in zip(tokens, hidden, strict=True)]
    states = [DraftState.at() for _ in lengths]
    generator = torch.Generator().manual_seed(1)
    while True:
        left = [
            (s, t, h, w) for s, t, h, w in zip(states, tokens, hidden, whole, strict=True) if s.position + 1 < len(t)
        ]
        if not left:
            break
        counts = [
            min(int(torch.randint(1, 30, (1,), generator=generator)), len(t) - 1 - s.position) for s, t, _, _ in left
        ]
        starts = [(s.position, n) for (s, *_), n in zip(left, counts, strict=True)]
        draft.extend(
            [s for s, *_ in left],
            counts,
            torch.cat([t[p + 1 : p + 1 + n] for (_, t, _, _), (p, n) in zip(left, starts, strict=True)]),
            torch.cat([h[p : p + n] for (_, _, h, _), (p, n) in zip(left, starts, strict=True)]),
            target.layers,
        )
        for state, _, _, expected in left:
            torch.testing.assert_close(state.root, expected[state.position - 1], rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_a_state_that_missed_the_beginning_is_that_of_the_sequence_without_it() -> None:
    # Rotary attention is relative, so only which tokens are seen counts.
    target, draft = toy_target(), scrambled_draft()
    (tokens,), (hidden,) = sequences(target, [50])
    state = DraftState.at(30)
    draft.extend([state], [19], tokens[31:], hidden[30:-1], target.layers)
    expected = draft.roots(tokens[None, 30:], hidden[None, 30:], target.layers)[0, -1]
    torch.testing.assert_close(state.root, expected, rtol=0, atol=TOLERANCE)
    assert (state.position, state.length) == (49, 19)


@torch.no_grad()
def test_forks_go_their_own_ways() -> None:
    target, draft = toy_target(), scrambled_draft()
    (tokens,), (hidden,) = sequences(target, [30])
    (first,) = extended(draft, target, [30])
    second = first.fork()
    for state, token in ((first, 3), (second, 4)):
        draft.extend([state], [1], torch.tensor([token]), hidden[-1:], target.layers)
        grown = torch.cat([tokens, torch.tensor([token])])
        expected = draft.roots(grown[None], torch.cat([hidden, hidden[-1:]])[None], target.layers)[0, -1]
        torch.testing.assert_close(state.root, expected, rtol=0, atol=TOLERANCE)


def test_extending_refuses_rows_that_do_not_add_up() -> None:
    target, draft = toy_target(), scrambled_draft()
    state = DraftState.at()
    for counts, rows in (([2], 3), ([0], 0), ([3], 2)):
        with pytest.raises(InvalidRequest, match="rows of accepted tokens"):
            draft.extend([state], counts, torch.zeros(rows, dtype=torch.long), torch.zeros(rows, HIDDEN), target.layers)
    with pytest.raises(InvalidRequest, match="position of a draft state"):
        DraftState.at(-1)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("width", "depth", "budget"), [(1, 4, 4), (4, 3, 12), (4, 5, 7), (2, 6, 100), (3, 1, 2)])
def test_trees_keep_their_limits_and_are_the_best_nodes_of_the_beam(
    temperature: float, width: int, depth: int, budget: int
) -> None:
    target, draft = toy_target(), scrambled_draft()
    states = extended(draft, target, [9, 30, 17])
    how = sampling(3, temperature)
    proposer = CloverProposer(draft, target.layers, source=2)
    trees = proposer.propose(states, how, [budget] * 3, max_width=width, max_depth=depth)
    beams = grow_beams(
        draft,
        target.layers,
        torch.stack([s.root for s in states if s.root is not None]),
        how.noise(torch.tensor([s.position for s in states]), depth, VOCAB),
        how,
        max_width=width,
        budget=width * depth,
    )
    kept = best_nodes(beams.scores, budget)
    for number, scored in enumerate(trees):
        scored.tree.check(max_width=width, budget=budget, vocab_size=VOCAB)
        assert scored.num_nodes == min(budget, width * depth)
        assert (scored.sources == 2).all()
        assert (np.diff(scored.scores) <= 0).all() and (scored.scores <= 0).all()
        best = sorted(beams.scores[number, kept[number]].tolist(), reverse=True)
        np.testing.assert_allclose(scored.scores, best, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_the_first_layer_is_ranked_by_logits_and_the_noise_of_its_position() -> None:
    target, draft = toy_target(), scrambled_draft()
    (state,) = extended(draft, target, [9])
    how = sampling(1)
    (scored,) = CloverProposer(draft, target.layers).propose([state], how, [4], max_width=4, max_depth=1)
    assert state.root is not None
    output = draft.root_output(state.root)
    noise = how.noise(torch.tensor([state.position]), 1, VOCAB)[0, 0]
    chances = draft.keyed_scores(output, target.layers.logits(output), noise, 0).softmax(-1)
    best = chances.topk(4)
    assert scored.tree.tokens.tolist() == best.indices.tolist()
    np.testing.assert_allclose(np.exp(scored.scores), best.values.numpy(), rtol=1e-4)


def test_nothing_is_drafted_that_top_k_and_top_p_exclude() -> None:
    target, draft = toy_target(), scrambled_draft()
    states = extended(draft, target, [9, 30])
    proposer = CloverProposer(draft, target.layers)
    only_one = sampling(2, top_k=torch.tensor([1, 0]))
    trees = proposer.propose(states, only_one, [12, 12], max_width=4, max_depth=3)
    assert trees[0].tree.widths().tolist() == [1, 1, 1], "top-k of 1 leaves a chain"
    assert trees[1].num_nodes == 12
    nucleus = sampling(2, top_p=torch.tensor([1e-6, 1.0]))
    again = proposer.propose(states, nucleus, [12, 12], max_width=4, max_depth=3)
    assert [t.tree.tokens.tolist() for t in again] == [t.tree.tokens.tolist() for t in trees]
    greedy = sampling(2, 0.0, top_k=torch.tensor([1, 1]))
    assert proposer.propose(states, greedy, [4, 4], max_width=4, max_depth=1)[0].num_nodes == 4, "greedy cuts nothing"


def test_a_request_is_drafted_for_alike_in_any_batch() -> None:
    target, draft = toy_target(), scrambled_draft()
    proposer = CloverProposer(draft, target.layers)
    states = extended(draft, target, [9, 30, 17])
    together = proposer.propose(states, sampling(3), [6, 9, 3], max_width=4, max_depth=4)
    for i, budget in enumerate([6, 9, 3]):
        alone = DraftSampling(seeds=torch.tensor([7 + i]), temperature=torch.ones(1))
        (tree,) = proposer.propose(states[i : i + 1], alone, [budget], max_width=4, max_depth=4)
        assert tree.tree == together[i].tree
    assert proposer.propose([], sampling(0), [], max_width=4, max_depth=4) == []


def test_bad_requests_are_refused() -> None:
    target, draft = toy_target(), scrambled_draft()
    proposer = CloverProposer(draft, target.layers)
    states = extended(draft, target, [9])
    for arguments, what in (
        ({"max_width": 5, "max_depth": 3}, "max_width"),
        ({"max_width": 4, "max_depth": 0}, "max_depth"),
    ):
        with pytest.raises(InvalidRequest, match=what):
            proposer.propose(states, sampling(1), [4], **arguments)
    with pytest.raises(InvalidRequest, match="budget"):
        proposer.propose(states, sampling(1), [0], max_width=4, max_depth=3)
    with pytest.raises(InvalidRequest, match="draft states"):
        proposer.propose([DraftState.at()], sampling(1), [4], max_width=4, max_depth=3)
    with pytest.raises(InvalidRequest, match="draft states"):
        proposer.propose(states, sampling(1), [4, 4], max_width=4, max_depth=3)


def test_tensors_of_another_shape_are_refused() -> None:
    draft = CloverDraft(toy_config())
    wider = CloverDraft(toy_config(intermediate_size=64)).state_dict()
    with pytest.raises(InvalidRequest, match=r"layers\.0\.down_proj"):
        draft.load(wider)
    with pytest.raises(InvalidRequest, match=r"block_norm\.weight"):
        draft.load({name: t for name, t in draft.state_dict().items() if name != "block_norm.weight"})


@torch.no_grad()
def test_a_group_starts_from_the_state_of_its_first_member() -> None:
    target, draft = toy_target(), scrambled_draft()
    (tokens,), (hidden,) = sequences(target, [30])
    (first,) = extended(draft, target, [30])
    store = StateStore(max_bytes=10**6)
    store.keep(tokens, first.fork())
    # The engine had the first 16 tokens in its cache: it computes states from token 16 on.
    member = store.start(tokens, 16)
    assert (member.position, member.length, member.root) == (16, 16, None)
    draft.extend([member], [13], tokens[17:], hidden[16:-1], target.layers)
    torch.testing.assert_close(member.root, first.root, rtol=0, atol=TOLERANCE)
    changed = tokens.clone()
    changed[16] = (changed[16] + 1) % VOCAB
    assert store.start(changed, 16).length == 0, "token 16 differs"
    assert store.start(changed, 15).length == 15
    assert store.start(tokens, 30 - 1).length == 29
    assert store.start(torch.cat([tokens, tokens]), 40).length == 0, "nobody has seen so much"
    store.clear()
    assert store.start(tokens, 16).length == 0


def test_the_store_forgets_what_was_unused_for_longest() -> None:
    target, draft = toy_target(), scrambled_draft()
    states = extended(draft, target, [20, 20, 20])
    sequences_of = [torch.arange(20) + i for i in range(3)]
    store = StateStore(max_bytes=2 * states[0].num_bytes)
    for tokens, state in zip(sequences_of[:2], states[:2], strict=True):
        store.keep(tokens, state)
    assert store.start(sequences_of[0], 10).length == 10
    store.keep(sequences_of[2], states[2])
    assert store.num_bytes == 2 * states[0].num_bytes
    assert [store.start(tokens, 10).length for tokens in sequences_of] == [10, 0, 10]
    with pytest.raises(InvalidRequest, match="tokens of a draft state"):
        store.keep(torch.arange(19), states[0])
    with pytest.raises(InvalidRequest, match="memory of draft states"):
        StateStore(max_bytes=-1)


def test_forks_go_back_no_further_than_memory_does() -> None:
    target, draft = toy_target(), scrambled_draft()
    (state,) = extended(draft, target, [20])
    for position in (20, -1):
        with pytest.raises(InvalidRequest, match="position of a fork"):
            state.fork(position)
    assert state.fork(0).length == 0
