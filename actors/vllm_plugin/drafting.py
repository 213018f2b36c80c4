"""Who drafts in a worker: the drafters, the choice among them step by step, and one tree for each request.

Owns the interface of drafters, what was drafted and is not verified yet, and what the governor is told. Knows nothing
of how trees are verified, and nothing of vLLM.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from rollout.governor.governor import Governor
from rollout.governor.records import OFF, Choice, SourceShare, StepOutcome, StepState
from rollout.governor.statistics import SpeculationRecord
from rollout.governor.tally import StepTally
from rollout.speculation.growth import ScoredTree, merge
from rollout.speculation.tree import TokenTree
from rollout.speculation.walk import Accepted
from rollout.speculation_config import SpeculationConfig

DRAFTS_ATTRIBUTE = "longroll_drafts"  # on vLLM's ModelRunnerOutput: request id → draft tokens of its next step


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRequest:
    """A request that may have a tree in its next step.

    Attributes:
        request_id: The engine's name of it.
        token_ids: [n] int32 prompt and output so far, the last one the root of its tree; a view, valid in this step.
        num_prompt_tokens: How many of them are its trajectory's prompt.
        seed: Gumbel key.
        temperature: 0 is greedy.
        top_k, top_p: None and 1 keep everything.
        group: Key of its prompt, the same for all members of a group; None if it is on its own.
        member: Key of the trajectory.
        max_depth: Layers it has use for, at least 1.
        budget: Nodes it may have, at least 1.
    """

    request_id: str
    token_ids: np.ndarray
    num_prompt_tokens: int
    seed: int
    temperature: float
    top_k: int | None
    top_p: float
    group: str | None
    member: str | None
    max_depth: int
    budget: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftLimits:
    """What a tree may have in this step.

    Attributes:
        max_width, max_depth: Nodes of a layer, and layers.
    """

    max_width: int
    max_depth: int


class Drafter(Protocol):
    """Proposes trees; the step waits for it.

    Attributes:
        needs_hidden: It wants the target's hidden states, by `take_hidden`.
    """

    needs_hidden: bool

    def propose(self, requests: Sequence[DraftRequest], limits: DraftLimits) -> Sequence[ScoredTree]:
        """One tree for each request, empty where it has no idea."""
        ...

    def take_hidden(
        self, request_ids: Sequence[str], counts: np.ndarray, first: np.ndarray, rows: torch.Tensor
    ) -> None:
        """What the target computed in a step.

        Args:
            request_ids: b of them.
            counts: [b] rows of each.
            first: [b] position of its first row; the others follow it.
            rows: [sum of counts, H] states after the final norm.
        """
        ...

    def learn(self, request: DraftRequest) -> None:
        """What a request has said so far, now and then while it is not drafted for."""
        ...

    def end(self, request: DraftRequest) -> None:
        """All that a request has said: it has ended."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A step that ran.

    Attributes:
        num_sequences: Requests in it.
        context_tokens: KV that they read, summed.
        rows: Rows sampled from.
        num_tokens: Tokens emitted.
        has_prefill: Something was prefilled in it.
        version: Of the weights.
        peer_rows: Of the other ranks of the group.
        trees: Of the requests that had one, by id, with what was accepted.
        is_continued: The step before it ended with requests that go on in this one, so that the time between is a step.
    """

    num_sequences: int
    context_tokens: int
    rows: int
    num_tokens: int
    has_prefill: bool
    version: int
    peer_rows: int
    trees: Sequence[tuple[str, TokenTree, Accepted]]
    is_continued: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """A tree on its way to be verified."""

    scored: ScoredTree
    asked: tuple[str, ...]


class DraftDesk:
    """Asks the drafters for trees. Used by one thread, but for `take_record`.

    Args:
        config: Limits and sources.
        drafters: By source.
        vocab_size: Of the target.
        max_nodes: Of all trees of a step.
        clock: Seconds.
    """

    def __init__(
        self,
        config: SpeculationConfig,
        drafters: Mapping[str, Drafter],
        *,
        vocab_size: int,
        max_nodes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._drafters, self._clock = config, dict(drafters), clock
        self._vocab_size, self._max_nodes = vocab_size, max_nodes
        self._sources = tuple(sorted(self._drafters))
        self._bits = {source: 1 << place for place, source in enumerate(self._sources)}
        self._governor = Governor(config) if config.governor else None
        self._fixed = Choice(
            shares=tuple(SourceShare(source=source, num_nodes=config.budget_nodes) for source in self._sources),
            budget_nodes=config.budget_nodes,
            max_depth=config.max_depth,
            max_width=config.max_width,
        )
        self._lock = threading.Lock()
        self._pending: dict[str, _Pending] = {}
        self._choice = OFF  # made the drafts that are pending
        self._draft_s: dict[str, float] = {}
        self._ended_at: float | None = None
        self._is_on = True

    def turn(self, on: bool) -> None:
        """Draft from the next step on, or no more; what was drafted is verified. From any thread."""
        self._is_on = on

    @property
    def needs_hidden(self) -> bool:
        """Whether some drafter wants hidden states."""
        return any(drafter.needs_hidden for drafter in self._drafters.values())

    @property
    def num_pending(self) -> int:
        """Trees that were drafted and not verified yet."""
        return len(self._pending)

    def tree_of(self, request_id: str) -> TokenTree | None:
        """The tree that was drafted for a request and not verified yet."""
        pending = self._pending.get(request_id)
        return None if pending is None else pending.scored.tree

    def drop(self, request_id: str) -> None:
        """A request's tree will not be verified."""
        self._pending.pop(request_id, None)

    def end(self, request: DraftRequest) -> None:
        """A request has ended."""
        self._pending.pop(request.request_id, None)
        for drafter in self._drafters.values():
            drafter.end(request)
        if self._governor is not None:
            self._governor.requests.forget(request.request_id)

    def verified(self, step: Verified) -> None:
        """Tell the governor what became of a step, and of the trees in it."""
        ended_at, began_at = self._clock(), self._ended_at
        self._ended_at = ended_at
        governor = self._governor
        if governor is None:
            for request_id, _, _ in step.trees:
                self._pending.pop(request_id, None)
            return
        tally = None
        if step.trees:
            tally = StepTally(self._config.max_depth)
            for request_id, tree, accepted in step.trees:
                pending = self._pending.pop(request_id)
                names = [self._name(bits) for bits in pending.scored.sources[: tree.num_nodes].tolist()]
                tally.add(pending.asked, tree.parents.tolist(), names, accepted.rows)
                governor.requests.learn(request_id, accepted.num_drafted)
        if began_at is None or not step.is_continued:
            return
        outcome = StepOutcome(
            choice=self._choice if tally is not None else OFF,
            num_sequences=step.num_sequences,
            context_tokens=step.context_tokens,
            version=step.version,
            rows=step.rows,
            num_tokens=step.num_tokens,
            step_s=ended_at - began_at,
            draft_s=tuple(self._draft_s.items()),
            has_prefill=step.has_prefill,
            tally=tally,
            peer_sequences=step.peer_rows,
            peer_rows=step.peer_rows,
        )
        with self._lock:
            governor.observe(outcome)

    def choose(self, num_sequences: int, context_tokens: int, version: int, peer_rows: int) -> Choice:
        """How to draft for the next step."""
        self._draft_s = {}
        self._choice = OFF
        if not num_sequences or not self._is_on:
            return OFF
        if self._governor is None:
            self._choice = self._fixed
            return self._choice
        state = StepState(
            num_sequences=num_sequences,
            context_tokens=context_tokens,
            sources=self._sources,
            version=version,
            peer_sequences=peer_rows,
            peer_rows=peer_rows,
        )
        with self._lock:
            self._choice = self._governor.choose(state)
        return self._choice

    def budgets(self, request_ids: Sequence[str]) -> list[int]:
        """Nodes for each request under the choice made; as many as fit a step."""
        most = min(self._choice.budget_nodes, self._max_nodes // max(1, len(request_ids)))
        if self._governor is None:
            return [most] * len(request_ids)
        return [min(most, budget) for budget in self._governor.budgets(self._choice, request_ids)]

    def propose(self, requests: Sequence[DraftRequest]) -> dict[str, TokenTree]:
        """Trees that are not empty, by request, under the choice made.

        Raises:
            InvalidRequest: A drafter proposed what it may not.
        """
        if not requests:
            return {}
        choice = self._choice
        offers: list[Sequence[ScoredTree]] = []
        for source in choice.sources:
            began = self._clock()
            limits = DraftLimits(max_width=choice.max_width, max_depth=choice.max_depth)
            bit = self._bits[source]
            offers.append([_marked(tree, bit) for tree in self._drafters[source].propose(requests, limits)])
            self._draft_s[source] = self._clock() - began
        trees = {}
        for request, *offered in zip(requests, *offers, strict=True):
            best = offered[0]
            if len(offered) > 1:
                best = merge(offered, max_width=choice.max_width, budget=request.budget)
            if best.num_nodes:
                best.tree.check(max_width=choice.max_width, budget=request.budget, vocab_size=self._vocab_size)
                self._pending[request.request_id] = _Pending(scored=best, asked=choice.sources)
                trees[request.request_id] = best.tree
        return trees

    def learn(self, request: DraftRequest) -> None:
        """See `Drafter.learn`."""
        for drafter in self._drafters.values():
            drafter.learn(request)

    def take_hidden(
        self, request_ids: Sequence[str], counts: np.ndarray, first: np.ndarray, rows: torch.Tensor
    ) -> None:
        """See `Drafter.take_hidden`."""
        for drafter in self._drafters.values():
            if drafter.needs_hidden:
                drafter.take_hidden(request_ids, counts, first, rows)

    def methods(self) -> dict[str, Callable[..., object]]:
        """What is served to the shard's actor, by name; from any thread."""
        sibling = self._drafters.get("sibling")
        shared = {} if sibling is None else {"sibling_delta": sibling.delta, "sibling_apply": sibling.apply}  # type: ignore[attr-defined]
        return {"take_speculation": self.take_record, "turn_speculation": self.turn, **shared}

    def take_record(self) -> SpeculationRecord | None:
        """What happened since it was last taken; None without a governor. From any thread."""
        if self._governor is None:
            return None
        with self._lock:
            return self._governor.take_record()

    def _name(self, bits: int) -> str:
        """The source that a node counts for: the first of those that proposed it."""
        return self._sources[(bits & -bits).bit_length() - 1]


def _marked(scored: ScoredTree, bit: int) -> ScoredTree:
    """The same tree as its drafter's: none of them knows what bit it has here."""
    return scored if bit == 1 else replace(scored, sources=np.full_like(scored.sources, bit))
