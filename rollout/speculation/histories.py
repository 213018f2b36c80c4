"""Token histories that can be asked where their last few tokens have occurred before.

Owns the tokens of many sequences, the chains that link equal contexts, and the bound on their number. Knows nothing
of who generated what, or of trees.

Every position of a history is entered once for each of a few context lengths k: a hash of the k tokens before it
leads to the newest position with that hash, and each position to the one before it with the same hash. That is the
hash chain of LZ77 compressors (RFC 1951, section 4), and not a suffix tree or automaton, because it takes one integer
for each position and length, the newest comes first, and histories can be dropped: an entry whose history is gone
ends its chain. What SuffixDecoding (arXiv 2411.04975) and DAS (arXiv 2511.13841) ask of their suffix trees is asked
of the positions found.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

CONTEXT_LENGTHS = (2, 4, 8, 16)
"""Context lengths that are looked for, shortest first; a match counts as the longest of these that it reaches."""
MAX_CONTEXT = CONTEXT_LENGTHS[-1]
MAX_CHAIN = 32
"""Entries of one chain that are looked at: bounds a query."""
ENOUGH_MATCHES = 8
"""Matches that are looked for; shorter contexts only while there are fewer."""
MAX_HISTORY = (1 << 24) - 1
"""Tokens of one history, at most: an entry is a history's number and, in its low 24 bits, a position."""

_WORD = (1 << 64) - 1
_BASE = 0x9E3779B97F4A7C15  # odd, with bits all over: the high bits of a product depend on all tokens
_POWERS = tuple(pow(_BASE, length, 1 << 64) for length in CONTEXT_LENGTHS)


class Match(NamedTuple):
    """The asked-for context ends before tokens[place]; its last `length` tokens agree, perhaps more."""

    tokens: array[int]
    place: int
    length: int


class History:
    """One growing sequence; owned by `Histories`."""

    __slots__ = ("number", "salt", "tokens", "sums", "links")

    def __init__(self, number: int, salt: int) -> None:
        self.number, self.salt = number, salt
        self.tokens: array[int] = array("i")
        # Rolling polynomial of the tokens so far, modulo 2**64: that of any stretch is a difference of two.
        self.sums: array[int] = array("Q", (0,))
        # For each context length: the entry before this position's in the same chain, 0 at its end.
        self.links: tuple[array[int], ...] = tuple(array("q", (0,)) for _ in CONTEXT_LENGTHS)


class Histories:
    """All histories of one process, and their memory: about 50 bytes for each token held, and tables of
    32 to 64 bytes for each token of the capacity, of which only pages in use take memory.

    Args:
        capacity_tokens: Tokens held, at most. The history that has not grown for longest is dropped first.
    """

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity = capacity_tokens
        bits = max(10, (capacity_tokens - 1).bit_length())
        self._shift = 64 - bits
        # Fresh pages of zeros cost nothing until an entry falls on them.
        tables: list[np.ndarray] = [np.zeros(1 << bits, dtype=np.int64) for _ in CONTEXT_LENGTHS]
        self._heads: tuple[memoryview, ...] = tuple(table.data for table in tables)
        self._histories: OrderedDict[int, History] = OrderedDict()
        self._last_number = 0
        self.num_tokens = 0
        self.num_dropped_tokens = 0

    def __len__(self) -> int:
        return len(self._histories)

    def __iter__(self) -> Iterator[History]:
        return iter(self._histories.values())

    def __contains__(self, history: History) -> bool:
        return history.number in self._histories

    def new(self, salt: int) -> History:
        """An empty history. Histories of different salts (64 bits) are not found by each other's contexts."""
        self._last_number += 1
        history = self._histories[self._last_number] = History(self._last_number, salt & _WORD)
        return history

    def append(self, history: History, tokens: Iterable[int]) -> None:
        """Make a history longer; may drop others, and itself if it alone is over the capacity."""
        own, sums = history.tokens, history.sums
        before = size = len(own)
        total, salt, shift, code = sums[-1], history.salt, self._shift, history.number << 24
        levels = tuple(zip(CONTEXT_LENGTHS, _POWERS, self._heads, history.links, strict=True))
        for token in tokens:
            own.append(token)
            size += 1
            total = (total * _BASE + token + 1) & _WORD
            sums.append(total)
            for length, power, heads, links in levels:
                if size < length:
                    links.append(0)
                    continue
                slot = (((total - sums[size - length] * power) ^ salt) & _WORD) >> shift
                links.append(heads[slot])
                heads[slot] = code | size
        self.num_tokens += size - before
        self._histories.move_to_end(history.number)
        while self.num_tokens > self._capacity:
            oldest = next(iter(self._histories.values()))
            self.num_dropped_tokens += len(oldest.tokens)
            self.drop(oldest)

    def drop(self, history: History) -> None:
        """Forget a history; entries that lead to it end their chains from now on."""
        del self._histories[history.number]
        self.num_tokens -= len(history.tokens)

    def matches(self, salt: int, context: Sequence[int] | np.ndarray) -> list[Match]:
        """Where the end of `context` has occurred before and went on, longest contexts and newest places first.

        Args:
            salt: Of the histories to look in.
            context: Tokens; only the last MAX_CONTEXT count.
        """
        tail = array("i", context[-MAX_CONTEXT:])
        sums = [0]
        for token in tail:
            sums.append((sums[-1] * _BASE + token + 1) & _WORD)
        histories, salt = self._histories, salt & _WORD
        found: dict[int, Match] = {}
        for level in range(len(CONTEXT_LENGTHS) - 1, -1, -1):
            length = CONTEXT_LENGTHS[level]
            if length > len(tail):
                continue
            key = ((sums[-1] - sums[-1 - length] * _POWERS[level]) ^ salt) & _WORD
            code = self._heads[level][key >> self._shift]
            pattern = tail[-length:]
            for _ in range(MAX_CHAIN):
                history = histories.get(code >> 24)
                if history is None:
                    break
                place, tokens = code & MAX_HISTORY, history.tokens
                # A chain also holds what happens to share its slot, and the end of a history has no continuation.
                if (
                    place < len(tokens)
                    and code not in found
                    and history.salt == salt
                    and tokens[place - length : place] == pattern
                ):
                    found[code] = Match(tokens, place, length)
                    if len(found) == ENOUGH_MATCHES:
                        return list(found.values())
                code = history.links[level][place]
        return list(found.values())
