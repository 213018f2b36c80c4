"""Distillation, online updates, and acceptance counted on trajectories."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F

from kernels.gumbel_sample import gumbel_noise
from rollout.errors import InvalidRequest, LongrollError
from rollout.speculation.clover import CloverDraft, TargetLayers
from rollout.speculation.clover_drafter import CloverDrafter
from rollout.speculation.clover_loss import LossWeights, distillation_loss, draw_roots
from rollout.speculation.clover_samples import DraftSample, collate, drawn_batches
from rollout.speculation.clover_simulation import (
    Acceptance,
    TreeShape,
    count_steps,
    look_up,
    simulate_draft,
    simulate_look_up,
)
from rollout.speculation.clover_training import DraftTrainer, DraftTrainingConfig
from rollout.speculation.coupling import KeyedSampling
from rollout.speculation.walk import walk
from tests.rollout.clover_cases import HIDDEN, VOCAB, ToyTarget, scrambled_draft, toy_config, toy_target

QUICK = DraftTrainingConfig(lr=1e-2, warmup_steps=5, batch_tokens=512)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def trained(sharpness: float = 1.0, steps: int = 150) -> tuple[ToyTarget, CloverDraft]:
    """A draft that has learnt the toy target. Shared: nobody may change it."""
    target = toy_target(sharpness)
    torch.manual_seed(0)
    draft = CloverDraft(toy_config(num_layers=1))
    DraftTrainer(draft, QUICK).fit(
        target.samples(10_000, 200), target=target.layers, num_steps=steps, generator=generator(), say=lambda *_: None
    )
    return target, draft.eval()


def acceptance(draft: CloverDraft, target: ToyTarget, samples: list[DraftSample], **limits: int) -> Acceptance:
    shape = TreeShape(**({"max_width": 4, "depth": 3, "budget": 12} | limits))
    return simulate_draft(draft, samples, [shape], target=target.layers, temperature=1.0)[0]


def test_the_loss_is_its_definition_row_by_row() -> None:
    target, draft = toy_target(), scrambled_draft()
    samples = [target.sample(s, 3, 6 + s) for s in range(3)]
    batch = collate(samples)
    where = draw_roots(batch, 1000, generator())
    weights = LossWeights(hidden=3.0, token=0.5, trust=0.25, decay=0.6)
    temperature = 0.8
    got = distillation_loss(draft, batch, where, target=target.layers, weights=weights, temperature=temperature)
    sums: list[list[torch.Tensor]] = [[] for _ in range(draft.config.num_steps)]
    for sample in samples:
        roots = draft.roots(sample.token_ids[None], sample.hidden[None], target.layers)[0]
        for root in range(sample.num_prompt_tokens, len(sample.token_ids) - 1):
            state, output = roots[root - 1], draft.root_output(roots[root - 1])
            for depth in range(min(draft.config.num_steps, len(sample.token_ids) - 1 - root)):
                place = root + depth  # the token whose successor is predicted
                if depth:
                    state, output = draft.next_state(state, target.embedding[sample.token_ids[place]])
                logits = target.head @ output
                probs = (target.head @ sample.hidden[place] / temperature).softmax(-1)
                noise = gumbel_noise(torch.tensor([sample.seed]), torch.tensor([place + 1]), VOCAB)[0]
                scores = draft.keyed_scores(output, logits, temperature * noise, depth)
                sums[depth].append(
                    3.0 * F.smooth_l1_loss(output, sample.hidden[place])
                    - 0.5 * (probs * (logits / temperature).log_softmax(-1)).sum()
                    - 0.25 / 0.6**depth * scores.log_softmax(-1)[sample.token_ids[place + 1]]
                )
    expected = sum(0.6**depth * torch.stack(rows).mean() for depth, rows in enumerate(sums))
    # Means of about 30 float32 terms of size up to 10, summed in another order.
    torch.testing.assert_close(got.loss, expected, rtol=1e-5, atol=1e-4)
    assert len(where[0]) == sum(5 + s for s in range(3))


def test_trust_alone_learns_from_the_noise() -> None:
    target, draft = toy_target(), scrambled_draft()
    batch = collate(target.samples(0, 4))
    weights = LossWeights(hidden=0.0, token=0.0, trust=1.0)
    distillation_loss(
        draft, batch, draw_roots(batch, 50, generator()), target=target.layers, weights=weights
    ).loss.backward()
    moved = {name for name, p in draft.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {"trust.weight", "trust.bias", "trust_by_depth"}


def test_training_raises_acceptance_on_trajectories_it_has_not_seen() -> None:
    target, draft = trained()
    torch.manual_seed(0)
    held_out = target.samples(50_000, 60)
    before = acceptance(CloverDraft(toy_config(num_layers=1)).eval(), target, held_out)
    tree, chain = acceptance(draft, target, held_out), acceptance(draft, target, held_out, max_width=1, budget=3)
    assert tree.num_tokens == before.num_tokens == chain.num_tokens
    assert before.tokens_per_step < chain.tokens_per_step < tree.tokens_per_step
    assert tree.tokens_per_step > before.tokens_per_step + 0.5


def test_knowing_the_noise_raises_acceptance() -> None:
    target, draft = trained()
    held_out = target.samples(60_000, 60)
    keyed, blind = acceptance(draft, target, held_out), acceptance(draft, target, held_out, is_keyed=False)
    assert keyed.tokens_per_step > blind.tokens_per_step + 0.2


def test_the_same_seeds_give_the_same_draft() -> None:
    target = toy_target()
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        draft = CloverDraft(toy_config())
        losses: list[float] = []
        DraftTrainer(draft, QUICK).fit(
            target.samples(0, 20),
            target=target.layers,
            num_steps=5,
            generator=generator(4),
            say=lambda _, r, losses=losses: losses.append(r.loss),  # type: ignore[misc]
        )
        results.append((losses, draft.state_dict()))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def test_an_online_update_follows_a_target_that_moved() -> None:
    target, draft = trained()
    moved = ToyTarget(
        embedding=target.embedding,
        second=target.second + 0.7 * torch.randn(VOCAB, HIDDEN, generator=generator(9)),
        head=target.head,
    )
    held_out, fresh = moved.samples(80_000, 60), moved.samples(70_000, 60)
    own = CloverDraft(draft.config)
    own.load(draft.state_dict())
    frozen = acceptance(own.eval(), moved, held_out)
    config = DraftTrainingConfig(online_lr=5e-3, batch_tokens=512)
    results = DraftTrainer(own, config).update(
        fresh, target=moved.layers, num_steps=60, generator=generator(), version=5
    )
    updated = acceptance(own.eval(), moved, held_out)
    assert updated.tokens_per_step > frozen.tokens_per_step + 0.1
    assert own.config.target_version == 5
    assert len(results) == 60 and results[-1].loss < results[0].loss
    assert results[-1].agreement[0] > results[0].agreement[0]


def test_updates_go_on_from_a_state_as_if_nothing_had_happened() -> None:
    target, config = toy_target(), DraftTrainingConfig(warmup_steps=5, batch_tokens=512)
    first, second = target.samples(0, 20), target.samples(500, 20)
    through = DraftTrainer(scrambled_draft(), config)
    through.update(first, target=target.layers, num_steps=3, generator=generator(1), version=1)
    tensors = {name: t.clone() for name, t in through.draft.state_dict().items()}
    state = copy.deepcopy(through.state())
    through.update(second, target=target.layers, num_steps=3, generator=generator(2), version=2)

    resumed = DraftTrainer(CloverDraft(through.draft.config), config)
    resumed.draft.load(tensors)
    resumed.restore(state)
    resumed.update(second, target=target.layers, num_steps=3, generator=generator(2), version=2)
    for a, b in zip(through.draft.parameters(), resumed.draft.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tokens_that_the_target_did_not_draw_are_no_lesson() -> None:
    target, draft = toy_target(), scrambled_draft()
    sample = target.sample(0, 4, 12)
    is_sampled = torch.arange(16) >= 4
    is_sampled[8:11] = False
    holed = dataclasses.replace(sample, is_sampled=is_sampled)
    assert collate([sample]).is_output[0].equal(torch.arange(16) >= 4)
    batch = collate([holed])
    assert batch.is_output[0].equal(is_sampled)
    _, place = draw_roots(batch, 100, generator())
    assert sorted(place.tolist()) == [4, 5, 6, 11, 12, 13, 14]
    # The root before the hole has one token to learn from, whatever stands in the hole.
    where, weights = (torch.tensor([0]), torch.tensor([6])), LossWeights()
    other = batch.tokens.clone()
    other[0, 8:11] = (other[0, 8:11] + 1) % VOCAB
    losses = [
        distillation_loss(draft, dataclasses.replace(batch, tokens=t), where, target=target.layers, weights=weights)
        for t in (batch.tokens, other)
    ]
    assert torch.equal(losses[0].loss, losses[1].loss) and len(losses[0].agreement) == 1


def test_updates_without_samples_or_with_broken_ones_change_nothing() -> None:
    target, draft = toy_target(), scrambled_draft()
    trainer = DraftTrainer(draft, QUICK)
    before = {name: t.clone() for name, t in draft.state_dict().items()}
    common = {"target": target.layers, "generator": generator(), "version": 1}
    with pytest.raises(InvalidRequest, match="fresh samples"):
        trainer.update([], num_steps=1, **common)
    trainer.update([], num_steps=0, **common)
    sample = target.sample(0, 3, 9)
    broken = DraftSample(
        token_ids=sample.token_ids, num_prompt_tokens=3, hidden=torch.full_like(sample.hidden, math.nan), seed=0
    )
    with pytest.raises(LongrollError, match="gradient norm"):
        trainer.update([broken], num_steps=1, **common)
    assert all(torch.equal(before[name], t) for name, t in draft.state_dict().items())


def test_ranks_that_average_take_one_step_together() -> None:
    target = toy_target()
    samples = [target.samples(0, 6), target.samples(100, 6)]
    seen: list[list[torch.Tensor]] = []
    for own in samples:
        trainer = DraftTrainer(scrambled_draft(), QUICK, average=lambda g: seen.append([t.clone() for t in g]))
        trainer.update(own, target=target.layers, num_steps=1, generator=generator(), version=1)
    means = [(a + b) / 2 for a, b in zip(*seen, strict=True)]

    def average(gradients: list[torch.Tensor]) -> None:
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean)

    drafts = [scrambled_draft(), scrambled_draft()]
    for draft, own in zip(drafts, samples, strict=True):
        trainer = DraftTrainer(draft, QUICK, average=average)
        trainer.update(own, target=target.layers, num_steps=1, generator=generator(), version=1)
    for a, b in zip(drafts[0].parameters(), drafts[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_rank_without_samples_takes_the_others_steps() -> None:
    target, draft = toy_target(), scrambled_draft()
    theirs = [torch.randn(p.shape, generator=generator(3)) for p in draft.parameters()]
    seen: list[bool] = []

    def average(gradients: list[torch.Tensor]) -> None:
        seen.append(any(bool(g.any()) for g in gradients))
        for gradient, their in zip(gradients, theirs, strict=True):
            gradient.copy_(their)

    before = [p.detach().clone() for p in draft.parameters()]
    trainer = DraftTrainer(draft, QUICK, average=average)
    results = trainer.update([], target=target.layers, num_steps=2, generator=generator(), version=1)
    assert seen == [False, False] and [r.agreement for r in results] == [(), ()]
    assert all(not torch.equal(a, b) for a, b in zip(before, draft.parameters(), strict=True))


def test_an_output_of_one_token_teaches_nothing_and_breaks_nothing() -> None:
    target, draft = toy_target(), scrambled_draft()
    sample = target.sample(0, 5, 1)
    trainer = DraftTrainer(draft, QUICK)
    trainer.update([sample], target=target.layers, num_steps=1, generator=generator(), version=1)
    assert acceptance(draft, target, [sample]).num_steps == 0


def test_batches_are_drawn_by_what_they_teach_and_keep_their_size() -> None:
    target = toy_target()
    short, long = [target.sample(s, 20, 2) for s in range(30)], [target.sample(s, 4, 40) for s in range(30)]
    batches = drawn_batches(short + long, 100, generator())
    num_tokens = {2: 0, 40: 0}
    for _ in range(300):
        batch = next(batches)
        assert len(batch) * max(len(s.token_ids) for s in batch) <= 100
        for s in batch:
            num_tokens[len(s.token_ids) - s.num_prompt_tokens] += 1
    # 15 batches hold 2 long ones (80 tokens), 8 hold 4 short ones (8): drawn 1,200 to 64, so 284 of 300 are long ones.
    assert 260 * 2 <= num_tokens[40] <= 300 * 2


def test_samples_without_a_prompt_or_with_other_states_are_refused() -> None:
    tokens = torch.arange(5)
    for prompt, rows in ((0, 5), (5, 5), (2, 4)):
        with pytest.raises(InvalidRequest):
            DraftSample(token_ids=tokens, num_prompt_tokens=prompt, hidden=torch.zeros(rows, HIDDEN), seed=0)


def test_simulated_steps_are_those_of_a_walk_step_by_step() -> None:
    target, draft = trained()
    num_steps, num_tokens = 0, 0
    samples = target.samples(90_000, 12)
    for sample in samples:
        tokens = sample.token_ids.tolist()
        drafter = CloverDrafter(draft, target.layers)
        place, known = sample.num_prompt_tokens, 0
        while place < len(tokens) - 1:
            tree = drafter.propose(
                tokens[: place + 1],
                sample.hidden[known:place],
                sampling=KeyedSampling(seed=sample.seed),
                max_width=4,
                max_depth=3,
                budget=8,
            ).tree
            known = place
            # After each row the target draws the trajectory's next token: all rows that matter lie on it.
            following = [*tokens, VOCAB, VOCAB, VOCAB]
            sampled = [following[place + 1 + depth] for depth in tree.depths.tolist()]
            place += len(walk(tree, sampled).tokens)
            num_steps += 1
        num_tokens += len(tokens) - 1 - sample.num_prompt_tokens
    simulated = acceptance(draft, target, samples, budget=8)
    assert (simulated.num_steps, simulated.num_tokens) == (num_steps, num_tokens)


def test_steps_are_counted_along_the_walk() -> None:
    # Two trajectories of 5 and 2 roots; what would match at roots that a step jumps over does not count.
    counted = count_steps([2, 9, 9, 0, 1, 3, 9], [4, 1, 1, 4, 4, 2, 1], [5, 2], 3)
    assert counted == Acceptance(num_tokens=7, num_steps=4, num_drafted=14, by_depth=(3, 2, 1))
    assert counted.tokens_per_step == 7 / 4


def test_prompt_look_up_takes_the_earliest_of_the_longest_matches() -> None:
    tokens = [1, 2, 3, 9, 2, 3, 7, 1, 2, 3]
    assert list(look_up(tokens, min_ngram=2, max_ngram=5, depth=2)) == [9, 2], "1 2 3 matches at 0"
    assert list(look_up(tokens, min_ngram=1, max_ngram=2, depth=4)) == [9, 2, 3, 7], "2 3 matches at 1 before 4"
    assert list(look_up([5, 6, 7], min_ngram=1, max_ngram=3, depth=2)) == []
    assert list(look_up([4, 4, 4], min_ngram=1, max_ngram=2, depth=3)) == [4]


def test_prompt_look_up_saves_steps_where_text_repeats() -> None:
    sample = DraftSample(
        token_ids=torch.tensor([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4]),
        num_prompt_tokens=5,
        hidden=torch.zeros(12, HIDDEN),
        seed=0,
    )
    # Roots 5 … 10: token 5 (a 2) is drafted for from the match of "2" at 1: 3 4 1 are right; then 3 4 (and the end).
    counted = simulate_look_up([sample], min_ngram=1, max_ngram=2, depth=3)
    assert (counted.num_tokens, counted.num_steps) == (6, 2)


def test_a_drafter_wants_the_states_of_exactly_the_new_tokens() -> None:
    target, draft = toy_target(), scrambled_draft()
    sample = target.sample(0, 6, 4)
    drafter = CloverDrafter(draft, target.layers)
    ask = functools.partial(
        drafter.propose,
        sampling=KeyedSampling(seed=1, temperature=0.0, top_k=5, top_p=0.9),
        max_width=2,
        max_depth=2,
        budget=4,
    )
    tokens = sample.token_ids.tolist()
    assert ask(tokens[:7], sample.hidden[:6]).num_nodes == 4
    for hidden in (None, sample.hidden[:7], sample.hidden[6:8, :4]):
        with pytest.raises(InvalidRequest, match="hidden states"):
            ask(tokens[:9], hidden)


def test_target_layers_follow_matrices_that_change_in_place() -> None:
    embedding, head = torch.zeros(4, 2), torch.zeros(4, 2)
    layers = TargetLayers.of(embedding, head)
    head.fill_(1.0)
    assert layers.logits(torch.ones(1, 2)).tolist() == [[2.0] * 4]
