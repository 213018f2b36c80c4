"""Who drafts in a worker: the drafters, the choice among them step by step, and one tree for each request.

Owns what was drafted and is not verified yet, and what the governor is told. Knows nothing of how trees are verified,
and nothing of vLLM.

What the shard's actor calls while the engine runs (`Shard` has methods of the same names):

- `turn_speculation(sources, policy)`: draft with these of the engine's sources only, from the next step on, as the
  `DraftPolicy` says. Without sources nothing is kept for drafts either: what drafts later begins anew;
- `take_speculation()`: the governor's record since it was last taken: choices, acceptance, alarms, seconds lost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from actors.vllm_plugin.draft_records import Drafter, DraftLimits, DraftRequest, StepSize, Verified
from rollout.errors import InvalidRequest
from rollout.governor.comparison import is_on_hold
from rollout.governor.governor import Governor
from rollout.governor.records import OFF, Choice, SourceShare, StepOutcome, StepState
from rollout.governor.statistics import SpeculationRecord
from rollout.governor.tally import StepTally
from rollout.speculation.growth import ScoredTree, merge
from rollout.speculation.tree import TokenTree
from rollout.speculation.walk import Accepted
from rollout.speculation_config import DraftPolicy, SpeculationConfig

REST_AFTER = 32  # steps in a row without drafts at a size of batches, from which on only one of
REST_STRIDE = 8  # is looked at: looking costs a tenth of a short step
MAX_REST_STRIDE = 32  # and in the end only one of these: the stride doubles
LOOKS_A_STRIDE = 4  # every so many looks
RESIZED_LOOKS = 16  # steps that are looked at when batches have a size that is new: drafts may pay at this one
DRAFTS_ATTRIBUTE = "longroll_drafts"  # on vLLM's ModelRunnerOutput: request id → draft tokens of its next step


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """A tree on its way to be verified."""

    scored: ScoredTree
    asked: tuple[str, ...]


class DraftDesk:
    """Asks the drafters for trees. Used by one thread, but for what `methods` serves.

    Attributes:
        needs_hidden: Some drafter that is turned on wants hidden states.
        learns: Some drafter that is turned on wants to know what nobody drafts for.

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
        self._lock = threading.Lock()
        self._pending: dict[str, _Pending] = {}
        self._num_unanswered = 0  # requests of the step to come that nobody had a node for
        self._choice = OFF  # made the drafts that are pending
        self._draft_s: dict[str, float] = {}  # that they took
        self._prepare_s = 0.0  # before that, to catch up
        self._ended_at: float | None = None
        self._size = 0  # of the batch, as a power of two
        self._num_idle: dict[int, int] = {}  # steps in a row for which nobody was to draft, of those looked at, by size
        self._version: int | None = None  # of the weights, as last seen
        self._num_rested = 0  # steps that were not looked at, since one was
        self._has_drafted = False  # for the last step that was looked at
        self._turn(self._sources)
        self._is_on_hold = self._is_compared = False
        self._is_governed = self._was_governed = self._governor is not None  # the latter: when it was last chosen

    def turn(self, sources: Sequence[str], policy: str = DraftPolicy.GOVERNED) -> None:
        """Draft with these sources only from the next step on; none: not at all. From any thread.

        Args:
            sources: Of those that the engine was started with.
            policy: A `DraftPolicy`.

        Raises:
            InvalidRequest: The engine was started without one of them, or there is no such policy.
        """
        if policy not in set(DraftPolicy):
            raise InvalidRequest("policy of drafts", policy, f"one of {', '.join(DraftPolicy)}")
        unknown = sorted(set(sources) - set(self._drafters))
        if unknown:
            raise InvalidRequest("sources of drafts", unknown, f"some of {', '.join(self._sources)}")
        self._turn(tuple(sorted(sources)))
        self._is_compared = policy == DraftPolicy.COMPARED
        self._is_on_hold = policy == DraftPolicy.NEVER
        self._is_governed = self._governor is not None and policy != DraftPolicy.ALWAYS

    @property
    def is_turned_off(self) -> bool:
        """Whether all sources are."""
        return not self._turned_on

    def _turn(self, sources: tuple[str, ...]) -> None:
        drafters = [self._drafters[source] for source in sources]
        self._turned_on = sources
        self._readers = [drafter for drafter in drafters if drafter.needs_hidden]
        self.needs_hidden = bool(self._readers)
        self.learns = any(drafter.learns for drafter in drafters)

    def rests(self, num_sequences: int, step: int = 0) -> bool:
        """Whether the step of so many requests that just ended need not be looked at, nor the next one drafted for.

        Args:
            num_sequences: Requests in it.
            step: Its number, the same on all ranks of the group.
        """
        if self._is_compared:
            self._is_on_hold = is_on_hold(step)
        if self._is_on_hold and not self._pending:
            self._choice, self._num_unanswered, self._ended_at = OFF, 0, self._clock()
            return True
        self._size = num_sequences.bit_length()
        looks = self._num_idle.get(self._size, REST_AFTER - RESIZED_LOOKS) - REST_AFTER
        if looks < 0 or self._pending or not self._is_governed:
            return False
        if self._num_rested >= min(REST_STRIDE << looks // LOOKS_A_STRIDE, MAX_REST_STRIDE) - 1:
            return False
        self._num_rested += 1
        self._ended_at = self._clock()
        return True

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
        for source, drafter in self._drafters.items():
            if source in self._turned_on:
                drafter.end(request)
            else:
                drafter.forget(request.request_id)
        if self._governor is not None:
            self._governor.requests.forget(request.request_id)

    def verified(self, step: Verified) -> None:
        """Tell the governor what became of a step, and of the trees in it."""
        ended_at, began_at = self._clock(), self._ended_at
        self._ended_at = ended_at
        answered = [(self._pending.pop(request_id), tree, walked) for request_id, tree, walked in step.trees]
        unanswered, self._num_unanswered = self._num_unanswered, 0
        num_rested, self._num_rested = self._num_rested, 0
        has_drafted, self._has_drafted = self._has_drafted, bool(self._draft_s)
        governor = self._governor
        if governor is None or not self._was_governed:
            return
        for request_id, _, walked in step.trees:
            governor.requests.learn(request_id, walked.num_drafted)
        if began_at is None or not step.is_continued:
            return
        tally = self._tally(answered, unanswered)
        outcome = StepOutcome(
            choice=self._choice if tally is not None or self._choice.is_off else OFF,
            num_sequences=step.size.sequences,
            context_tokens=step.context_tokens,
            version=step.version,
            rows=step.size.rows,
            num_tokens=step.num_tokens,
            step_s=ended_at - began_at,
            draft_s=tuple(self._draft_s.items()),
            prepare_s=self._prepare_s,
            has_prefill=step.size.has_prefill or step.peers.has_prefill,
            tally=tally,
            peer_sequences=step.peers.sequences,
            peer_rows=step.peers.rows,
            num_rested=num_rested,
            follows_drafts=has_drafted or self._has_drafted,
        )
        with self._lock:
            governor.observe(outcome)

    def _tally(self, answered: Sequence[tuple[_Pending, TokenTree, Accepted]], num_unanswered: int) -> StepTally | None:
        """What the drafts of a step came to; None if nobody was asked for any."""
        if not answered and not num_unanswered:
            return None
        tally = StepTally(self._config.max_depth)
        for pending, tree, walked in answered:
            names = [self._name(bits) for bits in pending.scored.sources[: tree.num_nodes].tolist()]
            tally.add(pending.asked, tree.parents.tolist(), names, walked.rows)
        for _ in range(num_unanswered):
            tally.add(self._choice.sources, (), (), (0,))
        return tally

    def choose(self, num_sequences: int, context_tokens: int, version: int, peers: StepSize) -> Choice:
        """How to draft for the next step, with peers as they were in the last one."""
        self._draft_s, self._prepare_s = {}, 0.0
        self._choice = OFF
        if self._is_on_hold:
            return OFF
        self._was_governed = self._is_governed
        sources = self._turned_on
        if not num_sequences or not sources:
            return OFF
        if self._governor is None or not self._was_governed:
            self._choice = self._fixed(sources)
            return self._choice
        state = StepState(
            num_sequences=num_sequences,
            context_tokens=context_tokens,
            sources=sources,
            version=version,
            peer_sequences=peers.sequences,
            peer_rows=peers.rows,
        )
        with self._lock:
            self._choice = self._governor.choose(state)
        if version != self._version:  # drafts are new with it
            self._num_idle = {size: min(idle, REST_AFTER) for size, idle in self._num_idle.items()}
            self._version = version
        idle = self._num_idle.get(self._size, REST_AFTER - RESIZED_LOOKS)
        self._num_idle[self._size] = idle + 1 if self._choice.is_off else 0
        return self._choice

    def _fixed(self, sources: Sequence[str]) -> Choice:
        """All that the configuration allows."""
        config = self._config
        return Choice(
            shares=tuple(SourceShare(source=source, num_nodes=config.budget_nodes) for source in sources),
            budget_nodes=config.budget_nodes,
            max_depth=config.max_depth,
            max_width=config.max_width,
        )

    def budgets(self, request_ids: Sequence[str]) -> list[int]:
        """Nodes for each request under the choice made; as many as fit a step."""
        most = min(self._choice.budget_nodes, self._max_nodes // max(1, len(request_ids)))
        if self._governor is None or not self._was_governed:
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
        offered: list[list[ScoredTree]] = [[] for _ in requests]
        asked: list[list[str]] = [[] for _ in requests]
        limits = DraftLimits(max_width=choice.max_width, max_depth=choice.max_depth)
        for share in sorted(choice.shares, key=lambda share: -share.enough_tokens):
            places = [place for place, trees in enumerate(offered) if not _is_enough(trees, share.enough_tokens)]
            if not places:
                continue
            bit, drafter = self._bits[share.source], self._drafters[share.source]
            asking = [requests[place] for place in places]
            came = self._clock()
            drafter.prepare(asking)
            began = self._clock()
            self._prepare_s += began - came
            drafted = drafter.propose(asking, limits)
            for place, tree in zip(places, drafted, strict=True):
                offered[place].append(_marked(tree, bit))
                asked[place].append(share.source)
            self._draft_s[share.source] = self._clock() - began
        trees = {}
        for request, mine, sources in zip(requests, offered, asked, strict=True):
            best = mine[0]
            if len(mine) > 1:
                best = merge(mine, max_width=choice.max_width, budget=request.budget)
            best = _not_deeper(best, request.max_depth)
            if best.num_nodes:
                best.tree.check(max_width=choice.max_width, budget=request.budget, vocab_size=self._vocab_size)
                self._pending[request.request_id] = _Pending(scored=best, asked=tuple(sources))
                trees[request.request_id] = best.tree
        self._num_unanswered = len(requests) - len(trees)
        return trees

    def learn(self, request: DraftRequest) -> None:
        """See `Drafter.learn`."""
        for source in self._turned_on:
            self._drafters[source].learn(request)

    def take_hidden(
        self, request_ids: Sequence[str], counts: np.ndarray | None, first: np.ndarray, rows: torch.Tensor
    ) -> None:
        """See `Drafter.take_hidden`."""
        for drafter in self._readers:
            drafter.take_hidden(request_ids, counts, first, rows)

    @property
    def draft_model(self) -> torch.nn.Module | None:
        """The draft model of the drafter that has one."""
        found = (getattr(drafter, "draft", None) for drafter in self._drafters.values())
        return next((draft for draft in found if draft is not None), None)

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


def _is_enough(trees: Sequence[ScoredTree], tokens: float) -> bool:
    """Whether what was drafted for a request is expected to bring so many tokens."""
    return bool(trees) and max(tree.expected_accepted for tree in trees) >= tokens


def _not_deeper(scored: ScoredTree, max_depth: int) -> ScoredTree:
    """Without the layers that the request has no use for: what is accepted in them would not be sampled in the end."""
    tree = scored.tree
    if tree.depth <= max_depth:
        return scored
    kept = tree.depths[1:] <= max_depth
    # Rows of the smaller tree; parents are kept with their nodes.
    row = np.concatenate([[0], kept.cumsum()]).astype(np.int32)
    return ScoredTree(
        tree=TokenTree(tokens=tree.tokens[kept], parents=row[tree.parents[kept]]),
        scores=scored.scores[kept],
        sources=scored.sources[kept],
    )


def _marked(scored: ScoredTree, bit: int) -> ScoredTree:
    """The same tree as its drafter's: none of them knows what bit it has here."""
    return scored if bit == 1 else replace(scored, sources=np.full_like(scored.sources, bit))
