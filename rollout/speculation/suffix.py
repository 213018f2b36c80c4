"""Sibling drafts: what other members of a group, and earlier visits of its prompt, went on with after the same tokens.

Owns the map from groups and members to histories, the trees grown from matches, and the messages by which shards
share what their members generate. Knows nothing of engines or of how messages travel.

The idea, and trees scored by counts, are from SuffixDecoding (arXiv 2411.04975); an index for each prompt that
earlier epochs feed is from DAS (arXiv 2511.13841). Here evidence is weighed by the length of its match and
calibrated against the tokens that members go on to generate, so that scores are chances and can be merged with
another drafter's.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from operator import itemgetter

import numpy as np

from rollout.errors import InvalidRequest
from rollout.speculation.calibration import Calibration
from rollout.speculation.growth import ScoredTree
from rollout.speculation.histories import MAX_CONTEXT, MAX_HISTORY, Histories, History, Match
from rollout.speculation.tree import MAX_WIDTH, Ints, TokenTree, check_limits

DOUBT = 0.5
"""Weight of "something else", in matches as long as the longest: n that agree are right with n / (n + DOUBT)."""
CALIBRATE_EVERY_TOKENS = 16
"""Tokens added between two comparisons of what would have been drafted with what came, at first."""
MAX_CALIBRATE_EVERY_TOKENS = 32
"""And after some hundreds of comparisons, when a comparison has little left to tell."""
LEAST_SCORE = math.log(1 / 64)
"""Nodes less likely than this are left out unless asked for: verifying them costs more than they bring."""

_NUM_KINDS = MAX_CONTEXT.bit_length()
_Expansion = tuple[int, list[tuple[int, float, list[Match]]]]
"""Kind of evidence, and for each token its estimate and the matches that go on with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiblingTokens:
    """Consecutive tokens of one member.

    Attributes:
        group: Key of the prompt, the same at every visit.
        member: Key of the trajectory within the group.
        start: Absolute position of the first token in prompt + output.
        tokens: [n] int32.
    """

    group: str
    member: str
    start: int
    tokens: np.ndarray


@dataclass(slots=True)
class _Member:
    history: History
    start: int
    """Absolute position of the history's first token."""
    local_start: int | None = None
    """Position from which on this index was the first to know the tokens; None if all came by `apply`."""

    @property
    def end(self) -> int:
        return self.start + len(self.history.tokens)


class SiblingIndex:
    """Sibling drafts of one shard; owns all its histories.

    Args:
        capacity_tokens: Tokens held over all groups, at most. What has not grown for longest is dropped first.

    Raises:
        InvalidRequest: The capacity is below 1.
    """

    def __init__(self, capacity_tokens: int) -> None:
        if capacity_tokens < 1:
            raise InvalidRequest("capacity_tokens", capacity_tokens, "at least 1")
        self._histories = Histories(capacity_tokens)
        self._calibration = Calibration(_NUM_KINDS)
        self._members: dict[tuple[str, str], _Member] = {}
        self._prompts: dict[str, History] = {}
        self._unsent: dict[str, dict[tuple[str, str], int]] = {}
        self._uncalibrated = 0
        self._interval: float = CALIBRATE_EVERY_TOKENS

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return self._histories.num_tokens

    @property
    def num_members(self) -> int:
        """Members whose names are held; those of dropped histories are let go in time."""
        return len(self._members)

    @property
    def num_dropped_tokens(self) -> int:
        """Tokens dropped so far to keep within the capacity."""
        return self._histories.num_dropped_tokens

    def begin(self, group: str, member: str, prompt: Ints) -> None:
        """Announce a member before its first token: its prompt is held once a group, and its end leads the output.

        A member that is known already is left as it is.
        """
        prompt = _ints(prompt)
        known = self._prompts.get(group)
        if known is None or known not in self._histories:
            self._prompts[group] = known = self._histories.new(_salt(group))
            self._histories.append(known, prompt)
        if self._member(group, member) is None:
            start = max(0, len(prompt) - MAX_CONTEXT)
            self._append(group, member, prompt[start:], start, is_local=True)

    def add(self, group: str, member: str, tokens: Ints, start: int | None = None) -> None:
        """Take in what a member of this shard has generated.

        Args:
            group: Key of the prompt.
            member: Key of the trajectory, unique over visits.
            tokens: New tokens. Those that are known already are skipped.
            start: Absolute position of the first of them; None if they follow the last known one.
        """
        tokens = _ints(tokens)
        known = self._member(group, member)
        if start is None:
            start = 0 if known is None else known.end
        if known is not None and start < known.start:
            self._append(group, member, tokens, start, is_local=True)
            return
        if known is not None and start < known.end:
            tokens, start = tokens[known.end - start :], known.end
        for done in range(0, len(tokens), CALIBRATE_EVERY_TOKENS):
            piece = tokens[done : done + CALIBRATE_EVERY_TOKENS]
            known = self._member(group, member)
            if known is not None and known.end == start + done:
                self._calibrate(group, known, piece)
            self._append(group, member, piece, start + done, is_local=True)

    def propose(
        self,
        group: str,
        context: Ints,
        *,
        max_width: int = MAX_WIDTH,
        max_depth: int = 8,
        budget: int = 16,
        min_score: float = LEAST_SCORE,
        source: int = 1,
    ) -> ScoredTree:
        """What the group's histories went on with after the end of this context.

        Args:
            group: Key of the prompt.
            context: Prompt and output so far, or at least the last MAX_CONTEXT tokens of it.
            max_width: Nodes in one layer, at most.
            max_depth: Layers, at most; at least 1.
            budget: Nodes, at most; at least 1.
            min_score: Leave out nodes whose log-probability of being reached is below.
            source: Bit that marks the nodes.

        Returns:
            At most `budget` nodes, best first; none where the context has not occurred.

        Raises:
            InvalidRequest: A limit is impossible.
        """
        check_limits(max_width=max_width, budget=budget)
        if max_depth < 1:
            raise InvalidRequest("max_depth", max_depth, "at least 1")
        matches = self._histories.matches(_salt(group), context)
        if not matches:
            return ScoredTree.empty()
        tokens: list[int] = []
        parents: list[int] = []
        chances: list[float] = []
        widths = [0] * max_depth
        # The chance comes first and is negative, as heaps pop the smallest; then what is unique, so that matches are
        # never compared.
        heap: list[tuple[float, int, int, int, list[Match]]] = []
        row, depth, chance, onward, calibrated = 0, 0, 1.0, matches, self._calibration.chance
        least = math.exp(min_score)
        while True:
            if depth < max_depth:
                kind, children = self._expand(onward, depth)
                for token, share, further in children[:max_width]:
                    path = chance * calibrated(kind, share)
                    if path >= least:
                        heapq.heappush(heap, (-path, row, token, depth, further))
            while heap and widths[heap[0][3]] == max_width:
                heapq.heappop(heap)
            if not heap or len(tokens) == budget:
                break
            chance, parent, token, depth, onward = heapq.heappop(heap)
            chance = -chance
            widths[depth] += 1
            depth += 1
            tokens.append(token)
            parents.append(parent)
            chances.append(chance)
            row = len(tokens)
        if not tokens:
            return ScoredTree.empty()
        return ScoredTree(
            tree=TokenTree.of_lists(tokens, parents),
            scores=np.log(np.array(chances)),
            sources=np.full(row, source, dtype=np.int32),
        )

    def delta(self, receiver: str) -> tuple[SiblingTokens, ...]:
        """What this shard's members have generated since the last call for this receiver; all of it at the first.

        Tokens that came by `apply` are never passed on: their own shard sends them.
        """
        unsent = self._unsent.get(receiver)
        if unsent is None:
            unsent = {key: known.local_start for key, known in self._members.items() if known.local_start is not None}
        self._unsent[receiver] = {}
        entries = []
        for (group, member), start in unsent.items():
            known = self._member(group, member)
            if known is None or known.end <= start:
                continue
            start = max(start, known.start)
            tokens = np.array(known.history.tokens[start - known.start :], dtype=np.int32)
            entries.append(SiblingTokens(group=group, member=member, start=start, tokens=tokens))
        return tuple(entries)

    def apply(self, delta: Sequence[SiblingTokens]) -> int:
        """Take in what another shard's members have generated; returns the number of tokens that were new."""
        return sum(self._append(one.group, one.member, one.tokens.tolist(), one.start, is_local=False) for one in delta)

    def forget(self, group: str) -> None:
        """Drop all that is held of a group."""
        salt = _salt(group)
        for history in [one for one in self._histories if one.salt == salt]:
            self._histories.drop(history)
        self._prompts.pop(group, None)
        for key in [key for key in self._members if key[0] == group]:
            del self._members[key]

    def _member(self, group: str, member: str) -> _Member | None:
        known = self._members.get((group, member))
        if known is not None and known.history not in self._histories:
            del self._members[group, member]
            return None
        return known

    def _forget_dropped(self) -> None:
        """Let go of the names of dropped histories, before they outnumber the living."""
        if len(self._members) + len(self._prompts) <= 2 * len(self._histories) + 64:
            return
        self._members = {key: known for key, known in self._members.items() if known.history in self._histories}
        self._prompts = {key: history for key, history in self._prompts.items() if history in self._histories}
        for receiver, unsent in self._unsent.items():
            self._unsent[receiver] = {key: start for key, start in unsent.items() if key in self._members}

    def _append(self, group: str, member: str, tokens: Sequence[int], start: int, *, is_local: bool) -> int:
        """Returns the number of tokens that were new."""
        known = self._member(group, member)
        if known is not None and start < known.start:
            return self._prepend(group, member, known, tokens, start, is_local=is_local)
        if known is None or start > known.end or known.end - known.start + len(tokens) > MAX_HISTORY:
            # A gap starts a new history; what was held of the member stays among the group's.
            known = self._members[group, member] = _Member(self._histories.new(_salt(group)), start)
            self._forget_dropped()
        fresh = tokens[known.end - start :]
        if len(fresh) == 0:
            return 0
        if is_local:
            if known.local_start is None:
                known.local_start = known.end
            for unsent in self._unsent.values():
                unsent.setdefault((group, member), known.end)
        self._histories.append(known.history, fresh)
        return len(fresh)

    def _prepend(
        self, group: str, member: str, known: _Member, tokens: Sequence[int], start: int, *, is_local: bool
    ) -> int:
        """Tokens from before what is held, which come late where a member has moved: its history is written anew."""
        if start + len(tokens) < known.start:
            return 0
        held = known.history.tokens.tolist()
        joined = [*tokens[: known.start - start], *held, *tokens[known.end - start :]]
        self._histories.drop(known.history)
        local_start = start if is_local else known.local_start
        self._members[group, member] = again = _Member(self._histories.new(_salt(group)), start, local_start)
        if is_local:
            for unsent in self._unsent.values():
                unsent[group, member] = start
        self._histories.append(again.history, joined)
        return len(joined) - len(held)

    @staticmethod
    def _expand(matches: list[Match], depth: int) -> _Expansion:
        """What the matches went on with `depth` tokens later, heaviest first.

        A match that held for `depth` more tokens is that much longer; its weight is the square of its length, so one
        of 16 tokens outweighs sixteen of 4.
        """
        if len(matches) == 1:
            [(tokens, place, length)] = matches
            if place + depth >= len(tokens):
                return 0, []
            return _kind(length + depth), [(tokens[place + depth], 1 / (1 + DOUBT), matches)]
        weights: dict[int, int] = {}
        onward: dict[int, list[Match]] = {}
        longest = total = 0
        for match in matches:
            tokens, place, length = match
            place += depth
            if place >= len(tokens):
                continue
            token, length = tokens[place], length + depth
            weight = length * length
            longest = max(longest, length)
            total += weight
            if token in weights:
                weights[token] += weight
                onward[token].append(match)
            else:
                weights[token] = weight
                onward[token] = [match]
        denominator = total + DOUBT * longest * longest
        expansion = [(token, weight / denominator, onward[token]) for token, weight in weights.items()]
        if len(expansion) > 1:
            expansion.sort(key=_share, reverse=True)
        return _kind(longest), expansion

    def _calibrate(self, group: str, known: _Member, tokens: Sequence[int]) -> None:
        """Compare, now and then, what would have been drafted before these tokens with the tokens."""
        self._uncalibrated += len(tokens)
        if self._uncalibrated < self._interval:
            return
        self._uncalibrated = 0
        self._interval = min(self._interval * 1.005, MAX_CALIBRATE_EVERY_TOKENS)
        matches = self._histories.matches(_salt(group), known.history.tokens[-MAX_CONTEXT:])
        for depth, token in enumerate(tokens[:MAX_CONTEXT]):
            kind, expansion = self._expand(matches, depth)
            for candidate, estimate, _ in expansion[:MAX_WIDTH]:
                self._calibration.observe(kind, estimate, candidate == token)
            matches = next((onward for candidate, _, onward in expansion if candidate == token), [])
            if not matches:
                break


_share = itemgetter(1)


def _kind(length: int) -> int:
    """Kind of evidence: matches of 1, of 2 or 3, of 4 to 7 tokens and so on, the last without end."""
    return min(length.bit_length(), _NUM_KINDS) - 1


def _ints(tokens: Ints) -> Sequence[int]:
    """Python's integers, which the rolling hash needs: an array's would overflow."""
    return tokens.tolist() if isinstance(tokens, np.ndarray) else tokens


def _salt(group: str) -> int:
    return int.from_bytes(blake2b(group.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
