"""One engine of the simulated fleet: its batch, its queue and its KV cache, as vLLM keeps them.

Owns what runs, waits and is cached on one data-parallel rank. Knows nothing of seconds: the group it belongs to
says how many steps have passed. A sequence is admitted, first come first served, when a slot and the KV for its
context are free; it is prefilled within the step's token budget; it decodes. Where KV runs out the newest
sequence is preempted: it goes back to the head of the queue and is prefilled again later. Members of a group on
the same rank share the KV of their prompt. KV that nobody uses stays until its room is needed, oldest first.

How many tokens a sequence gains in a step changes with speculation, so a rank counts its progress: the tokens that a
sequence has gained which decoded all the time.

KV is counted in tokens; what the last block of a sequence wastes, 8 tokens on average, is not.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from dataclasses import dataclass

ROUNDING = 1e-6  # of a token: what float arithmetic may be off in telling whether a token is there


@dataclass(slots=True, eq=False)
class Sequence:
    """A chunk on an engine. Owned by its rank.

    Attributes:
        job_id, group_id: Whose chunk it is.
        prompt_tokens: Tokens of the prompt.
        base_tokens: Generated before this chunk.
        target: Tokens that this chunk will generate.
        submitted_at: When the scheduler assigned it.
        kept: Generated in this chunk before the sequence was last preempted.
        prefill_left: Tokens to compute before it decodes.
        started: Progress of its rank at which it began to decode; None before.
        lead: Tokens it had then, above those kept: 1 where a prefill sampled it.
    """

    job_id: str
    group_id: str
    prompt_tokens: int
    base_tokens: int
    target: int
    submitted_at: float
    kept: int = 0
    prefill_left: int = 0
    started: float | None = None
    lead: int = 0
    holds_prompt: bool = False

    @property
    def own_tokens(self) -> int:
        """Generated tokens that it held when it was last admitted."""
        return self.base_tokens + self.kept

    def grown(self, progress: float) -> float:
        """Tokens beyond `own_tokens` at a progress of its rank; may pass the target within the last step."""
        return 0.0 if self.started is None else self.lead + progress - self.started

    def num_tokens(self, progress: float) -> int:
        """Tokens of this chunk at a progress of its rank."""
        return min(self.target, self.kept + math.floor(self.grown(progress) + ROUNDING))

    @property
    def ends_at(self) -> float:
        """Progress of its rank at which a decoding sequence reaches its target."""
        assert self.started is not None, "asked of a decoding sequence only"
        return self.started + self.target - self.kept - self.lead


@dataclass(slots=True)
class RankCounts:
    """What an engine has done so far, in tokens and events."""

    num_preemptions: int = 0
    num_prefilled: int = 0
    num_cached: int = 0
    max_used_tokens: float = 0.0
    max_running: int = 0


class Rank:
    """See the module.

    Args:
        max_running: Sequences admitted at once.
        kv_tokens: Tokens the cache holds.
        max_batched_tokens: Rows of one step.
    """

    def __init__(self, max_running: int, kv_tokens: int, max_batched_tokens: int) -> None:
        self._max_running, self._kv_tokens = max_running, kv_tokens
        self._max_batched_tokens = max_batched_tokens
        self.accepted, self._rows_per_sequence = 1.0, 1  # tokens and rows of a decoding sequence in a step
        self.progress = 0.0
        self.counts = RankCounts()
        self.clear()

    def clear(self) -> None:
        """Forget everything, as a dead engine does."""
        self.running: dict[str, Sequence] = {}
        self.waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()
        self._ends: list[tuple[float, int, Sequence]] = []
        self._num_pushed = 0
        self.num_decoding = 0
        self.context_tokens = 0.0  # of decoding sequences, each with its whole prompt
        self.used_tokens = 0.0  # of KV, a shared prompt once
        self._prompt_users: dict[str, int] = {}
        self._cached: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._cached_tokens = 0.0

    @property
    def is_prefilling(self) -> bool:
        return bool(self._prefilling)

    @property
    def decode_rows(self) -> int:
        return self.num_decoding * self._rows_per_sequence

    def speculate(self, num_drafts: int, accepted: float) -> None:
        """From now on a decoding sequence has so many drafts in a step, and gains so many tokens on average."""
        self._rows_per_sequence, self.accepted = 1 + num_drafts, accepted

    def sequences(self) -> list[Sequence]:
        """Everything on the engine, running or waiting."""
        return [*self.running.values(), *self.waiting]

    def submit(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def forget_cache(self) -> None:
        """The weights have changed: no KV is worth anything."""
        self._cached.clear()
        self._cached_tokens = 0.0

    def prefill_of_step(self) -> tuple[int, float]:
        """Tokens that the next step prefills, and the sum of the contexts they attend to."""
        left = max(0, self._max_batched_tokens - self.decode_rows)
        tokens, reads = 0, 0.0
        for sequence in self._prefilling:
            take = min(left, sequence.prefill_left)
            if take == 0:
                break
            done = sequence.prompt_tokens + sequence.own_tokens - sequence.prefill_left
            tokens, left = tokens + take, left - take
            reads += take * (done + take / 2)
        return tokens, reads

    def steps_to_event(self) -> int | None:
        """Steps until something happens by itself; None if nothing ever does. At least 1."""
        if self._prefilling:
            return 1
        if not self.num_decoding:
            return None
        while not self._is_current(self._ends[0]):
            heapq.heappop(self._ends)
        room = int((self._kv_tokens - self.used_tokens) // (self.num_decoding * self.accepted))
        return max(1, min(math.ceil((self._ends[0][0] - self.progress - ROUNDING) / self.accepted), room))

    def advance(self, num_steps: int) -> list[Sequence]:
        """`num_steps` have passed. Returns those that reached their target, removed."""
        growth = self.num_decoding * self.accepted * num_steps
        left = max(0, self._max_batched_tokens - self.decode_rows)
        self.progress += self.accepted * num_steps
        self.context_tokens += growth
        self.used_tokens += growth
        if self._prefilling and num_steps:
            assert num_steps == 1, "a prefill is stepped through"
            self._prefill(left)
        self.counts.max_used_tokens = max(self.counts.max_used_tokens, self.used_tokens)
        self._evict()
        finished = []
        while self._ends and (self._ends[0][0] <= self.progress + ROUNDING or not self._is_current(self._ends[0])):
            entry = heapq.heappop(self._ends)
            if self._is_current(entry):
                finished.append(entry[2])
                self._remove(entry[2])
        return finished

    def abort(self, job_id: str) -> Sequence | None:
        """Take a sequence off the engine; its tokens are `kept`. None if it is not here."""
        sequence = self.running.get(job_id)
        if sequence is not None:
            tokens = sequence.num_tokens(self.progress)
            self._remove(sequence)
            sequence.kept, sequence.started = tokens, None
            return sequence
        for waiting in self.waiting:
            if waiting.job_id == job_id:
                self.waiting.remove(waiting)
                return waiting
        return None

    def settle(self) -> None:
        """Between two steps: preempt where the next one would not fit, or else admit what fits."""
        is_full = False
        while self.used_tokens + self.num_decoding * self.accepted > self._kv_tokens and len(self.running) > 1:
            self._preempt(next(reversed(self.running.values())))
            is_full = True
        while not is_full and self.waiting and len(self.running) < self._max_running and self._admit():
            pass
        self._evict()
        self.counts.max_used_tokens = max(self.counts.max_used_tokens, self.used_tokens)
        self.counts.max_running = max(self.counts.max_running, len(self.running))

    def _admit(self) -> bool:
        sequence = self.waiting[0]
        is_shared = self._prompt_users.get(sequence.group_id, 0) > 0
        needed = sequence.own_tokens + (0 if is_shared else sequence.prompt_tokens)
        growth = (self.num_decoding + len(self._prefilling) + 1) * self.accepted
        if self.running and self.used_tokens + needed + growth > self._kv_tokens:
            return False
        self.waiting.popleft()
        hit = self._take_cached(("prompt", sequence.group_id)) if not is_shared else sequence.prompt_tokens
        own = self._take_cached(("own", sequence.job_id))
        if hit >= sequence.prompt_tokens:  # what follows a hole is of no use
            hit += min(own, sequence.own_tokens)
        self.used_tokens += needed
        self._prompt_users[sequence.group_id] = self._prompt_users.get(sequence.group_id, 0) + 1
        self.running[sequence.job_id] = sequence
        missing = sequence.prompt_tokens + sequence.own_tokens - math.floor(hit)
        self.counts.num_cached += math.floor(hit)
        if missing <= 1:
            sequence.prefill_left = 0
            self._decode(sequence, lead=0)
        else:
            sequence.prefill_left = missing
            self._prefilling.append(sequence)
        return True

    def _decode(self, sequence: Sequence, lead: int) -> None:
        sequence.started, sequence.lead = self.progress, lead
        heapq.heappush(self._ends, (sequence.ends_at, self._num_pushed, sequence))
        self._num_pushed += 1
        self.num_decoding += 1
        self.context_tokens += sequence.prompt_tokens + sequence.own_tokens + lead
        self.used_tokens += lead

    def _prefill(self, left: int) -> None:
        while self._prefilling and left:
            sequence = self._prefilling[0]
            take = min(left, sequence.prefill_left)
            sequence.prefill_left -= take
            left -= take
            self.counts.num_prefilled += take
            if sequence.prefill_left:
                break
            self._prefilling.popleft()
            self._decode(sequence, lead=1)  # the last of a prefill samples a token

    def _preempt(self, sequence: Sequence) -> None:
        tokens = sequence.num_tokens(self.progress)
        self._remove(sequence)
        sequence.kept, sequence.started, sequence.lead = tokens, None, 0
        self.waiting.appendleft(sequence)
        self.counts.num_preemptions += 1

    def _remove(self, sequence: Sequence) -> None:
        """Free what a running sequence holds; its KV stays in the cache as long as there is room."""
        del self.running[sequence.job_id]
        is_computed = sequence.started is not None
        grown = sequence.grown(self.progress)
        if is_computed:
            self.num_decoding -= 1
            self.context_tokens -= sequence.prompt_tokens + sequence.own_tokens + grown
        else:
            self._prefilling.remove(sequence)
        self.used_tokens -= sequence.own_tokens + grown
        self._prompt_users[sequence.group_id] -= 1
        if not self._prompt_users[sequence.group_id]:
            del self._prompt_users[sequence.group_id]
            self.used_tokens -= sequence.prompt_tokens
        if is_computed:
            # What comes last is evicted first, as vLLM frees the blocks of a sequence.
            self._cache(("own", sequence.job_id), sequence.own_tokens + grown)
            if sequence.group_id not in self._prompt_users:
                self._cache(("prompt", sequence.group_id), sequence.prompt_tokens)

    def _is_current(self, entry: tuple[float, int, Sequence]) -> bool:
        """Whether a heap entry still speaks of a decoding sequence: a preempted one ends later than it says."""
        sequence = entry[2]
        if self.running.get(sequence.job_id) is not sequence or sequence.started is None:
            return False
        return entry[0] == sequence.ends_at

    def _cache(self, key: tuple[str, str], tokens: float) -> None:
        self._cached_tokens += tokens - self._cached.pop(key, 0.0)
        self._cached[key] = tokens

    def _take_cached(self, key: tuple[str, str]) -> float:
        tokens = self._cached.pop(key, 0.0)
        self._cached_tokens -= tokens
        return tokens

    def _evict(self) -> None:
        excess = self.used_tokens + self._cached_tokens - self._kv_tokens
        while excess > 0 and self._cached:
            key, tokens = next(iter(self._cached.items()))
            gone = min(tokens, excess)
            excess -= gone
            self._cached_tokens -= gone
            if gone == tokens:
                del self._cached[key]
            else:
                self._cached[key] = tokens - gone
