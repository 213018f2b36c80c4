"""Speculative decoding with token trees, executable: the definition that engines are tested against.

Owns the loop of draft, verification pass, keyed walk and compaction, for one sequence on plain modules. Knows nothing
of engines, batches or speed.

The tokens are those of plain keyed decoding, whatever the drafter: a token is a function of (seed, position, logits),
a row's logits are a function of its path alone, and the walk only ever follows tokens that the target itself drew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from rollout.errors import InvalidRequest
from rollout.speculation.cached_lm import CachedLM
from rollout.speculation.coupling import KeyedSampling
from rollout.speculation.draft import CausalDrafter, Drafter
from rollout.speculation.token import Token
from rollout.speculation.tree import MAX_WIDTH, TokenTree, check_limits
from rollout.speculation.walk import walk


def speculative_decode(
    draft_model: Drafter | nn.Module,
    target_model: nn.Module,
    prompt: Sequence[int],
    *,
    max_width: int = MAX_WIDTH,
    max_depth: int = 4,
    budget: int = 16,
    max_tokens: int = 64,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_token_ids: Sequence[int] = (),
) -> list[Token]:
    """Generate one sequence, drafted as trees and verified by the target.

    Args:
        draft_model: A `Drafter`, or a causal language model of the target's vocabulary.
        target_model: A causal language model as `CachedLM` takes it.
        prompt: Token ids, at least one.
        max_width: Drafted tokens in one layer of a tree, at most; 1 gives chains, `MAX_WIDTH` is the limit.
        max_depth: Layers of a tree, at most.
        budget: Drafted tokens of a tree, at most; at least 1.
        max_tokens: Tokens to generate, at most.
        seed: Key of the noise, in [0, 2**63).
        temperature: T ≥ 0; 0 is greedy.
        top_k: Keep the k most likely tokens; None keeps all.
        top_p: Keep the smallest set of tokens whose mass reaches p; 1 keeps all.
        stop_token_ids: Tokens that end the generation; kept as its last token.

    Returns:
        The generated tokens, verified, in order.

    Raises:
        InvalidRequest: A limit or option is impossible, the draft is of another vocabulary, or a drafter broke the
            limits it was given.
    """
    check_limits(max_width=max_width, budget=budget)
    for name, value in (("max_depth", max_depth), ("max_tokens", max_tokens), ("prompt's length", len(prompt))):
        if value < 1:
            raise InvalidRequest(name, value, "at least 1")
    sampling = KeyedSampling(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p)
    if not isinstance(draft_model, (Drafter, nn.Module)):
        raise InvalidRequest("draft_model", type(draft_model).__name__, "a Drafter, or a language model (nn.Module)")
    drafter = draft_model if isinstance(draft_model, Drafter) else CausalDrafter(draft_model)
    limits = {"max_width": max_width, "max_depth": max_depth, "budget": budget}
    tokens: list[Token] = []
    for token in _generate(drafter, target_model, list(prompt), sampling, limits, max_tokens):
        tokens.append(token)
        if len(tokens) == max_tokens or token.token_id in stop_token_ids:
            break
    return tokens


def _generate(
    drafter: Drafter,
    target_model: nn.Module,
    context: list[int],
    sampling: KeyedSampling,
    limits: dict[str, int],
    max_tokens: int,
) -> Iterator[Token]:
    """Tokens without end; `context` grows as they come."""
    target = CachedLM(target_model, wants_hidden=drafter.needs_hidden)
    end = len(context) + max_tokens
    rows, tree = target.extend(context), TokenTree.empty()
    vocab_size = rows.logits.shape[1]
    if drafter.vocab_size not in (None, vocab_size):
        raise InvalidRequest("vocabulary of the draft model", drafter.vocab_size, f"the target's, {vocab_size}")
    logits, hidden = rows.logits[-1:], rows.hidden
    while True:
        base = len(target) - tree.num_rows  # slot and position of row 0
        sampled, logprobs = sampling.sample(logits, (base + tree.depths + 1).tolist())
        walked = walk(tree, sampled.tolist())
        target.keep(base, walked.rows)
        chosen = logprobs[list(walked.rows)].tolist()
        for depth, (token, logprob) in enumerate(zip(walked.tokens, chosen, strict=True), 1):
            is_drafted = depth <= walked.num_drafted
            context.append(token)
            yield Token(
                token_id=token,
                logprob=logprob,
                position=len(context) - 1,
                is_drafted=is_drafted,
                depth=depth if is_drafted else 0,
            )
        if hidden is not None and tree.num_nodes:
            hidden = hidden[list(walked.rows)]
        tree = _draft(drafter, context, hidden, sampling, limits, end, vocab_size)
        # The root, accepted a moment ago, and the nodes: one pass with each row at its depth, seeing its own path.
        root = len(target)
        rows = target.forward([context[-1], *tree.tokens.tolist()], root + tree.depths, tree.mask())
        logits, hidden = rows.logits, rows.hidden


def _draft(
    drafter: Drafter,
    context: list[int],
    hidden: torch.Tensor | None,
    sampling: KeyedSampling,
    limits: dict[str, int],
    end: int,
    vocab_size: int,
) -> TokenTree:
    """What the drafter proposes, checked; nothing where one more token is all that is asked for."""
    max_depth = min(limits["max_depth"], end - len(context) - 1)
    if max_depth < 1:
        return TokenTree.empty()
    max_width, budget = limits["max_width"], limits["budget"]
    tree = drafter.propose(
        context, hidden, sampling=sampling, max_width=max_width, max_depth=max_depth, budget=budget
    ).tree
    tree.check(max_width=max_width, budget=budget, vocab_size=vocab_size)
    if tree.depth > max_depth:
        raise InvalidRequest("depth of a draft tree", tree.depth, f"at most {max_depth} layers")
    return tree
