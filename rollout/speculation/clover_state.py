"""What the draft model remembers of a request: the augmenting block's keys and values, and the root of the next tree.

Owns that memory, which grows with the sequence, and a store of states that outlive their requests: an engine that
finds a prompt in its cache does not compute its hidden states again, so the members of a group, and the next chunk of
a trajectory, start from the state of whoever did. Knows nothing of the model that fills the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kernels.clover_draft import DraftMemory
from rollout.errors import InvalidRequest
from rollout.speculation.clover_config import DraftConfig

FIRST_CAPACITY = 64  # tokens; doubled when full


@dataclass(slots=True, kw_only=True, eq=False)
class DraftState:
    """One request's draft state; advanced by `CloverDraft.extend` only.

    A state need not begin at the sequence's start; the block then attends to what follows only. Acceptance suffers,
    nothing else.

    Attributes:
        position: Index of the last token taken in, the root's; one more than that of the first token it has not.
        length: Tokens in memory.
        root: [H], the root's state; None until something was taken in.
    """

    position: int
    length: int = 0
    root: torch.Tensor | None = None
    _memory: torch.Tensor | None = field(default=None, repr=False)  # [layers, 2, K, capacity, D]

    @classmethod
    def at(cls, position: int = 0) -> DraftState:
        """A state that has taken in nothing, of a sequence whose tokens up to `position` it will not see.

        Token 0 follows no hidden state, so it is never taken in: a state that misses nothing starts at 0.
        """
        if position < 0:
            raise InvalidRequest("position of a draft state", position, "at least 0")
        return cls(position=position)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return 0 if self._memory is None else self._memory.nbytes

    def fork(self, position: int | None = None) -> DraftState:
        """A copy that goes its own way: members of a group share their prompt.

        Args:
            position: Of the copy, at most this state's; None = the same. An earlier copy has no root yet.
        """
        dropped = 0 if position is None else self.position - position
        if not 0 <= dropped <= self.length:
            first = self.position - self.length
            raise InvalidRequest("position of a fork", position, f"one in [{first}, {self.position}]")
        length = self.length - dropped
        return DraftState(
            position=self.position - dropped,
            length=length,
            root=self.root if not dropped else None,
            _memory=None if self._memory is None else self._memory[..., :length, :].clone(),
        )

    def reserve(self, config: DraftConfig, count: int, like: torch.Tensor) -> None:
        """Make room for `count` more tokens, in the dtype and on the device of `like`."""
        needed = self.length + count
        old = self._memory
        if old is not None and old.shape[3] >= needed:
            return
        capacity = max(FIRST_CAPACITY, needed, 0 if old is None else 2 * old.shape[3])
        memory = like.new_empty(config.num_layers, 2, config.num_kv_heads, capacity, config.head_dim)
        if old is not None:
            memory[..., : self.length, :] = old[..., : self.length, :]
        self._memory = memory

    def place_for(self, config: DraftConfig, count: int, like: torch.Tensor) -> DraftMemory:
        """Memory with room for `count` more tokens, for who writes them to every layer at once."""
        self.reserve(config, count, like)
        assert self._memory is not None
        return DraftMemory(rows=self._memory, length=self.length, count=count, position=self.position + 1)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put rows [count, K, D] behind those in memory; returns all keys and values [K, L, D] of the layer."""
        assert self._memory is not None
        stop = self.length + len(key)
        keys, values = self._memory[layer, 0, :, :stop], self._memory[layer, 1, :, :stop]
        keys[:, self.length :] = key.transpose(0, 1)
        values[:, self.length :] = value.transpose(0, 1)
        return keys, values

    def advance(self, count: int, root: torch.Tensor) -> None:
        """The rows written to every layer count from now on."""
        self.length += count
        self.position += count
        self.root = root


class StateStore:
    """States of finished requests and of prompts, by their tokens; owned by the drafter's caller.

    Args:
        max_bytes: Memory of all states kept; the one unused for longest goes first.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise InvalidRequest("memory of draft states", max_bytes, "at least 0 bytes")
        self._max_bytes = max_bytes
        self._kept: dict[bytes, tuple[np.ndarray, DraftState]] = {}  # the last one was used last

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(state.num_bytes for _, state in self._kept.values())

    def keep(self, tokens: Sequence[int] | np.ndarray, state: DraftState) -> None:
        """Keep a state, which must not be extended any more (give a fork of one that will be).

        Args:
            tokens: Of its sequence, at least up to state.position.
            state: Whose memory is kept.
        """
        known = np.asarray(tokens, dtype=np.int64)[: state.position + 1]
        if len(known) <= state.position:
            raise InvalidRequest("tokens of a draft state", len(known), f"at least {state.position + 1}")
        key = known.tobytes()
        self._kept.pop(key, None)
        self._kept[key] = known, state
        while self.num_bytes > self._max_bytes:
            del self._kept[next(iter(self._kept))]

    def start(self, tokens: Sequence[int] | np.ndarray, position: int) -> DraftState:
        """A state for a sequence of which an engine computes hidden states from `position` on only.

        Args:
            tokens: Of the sequence.
            position: Tokens before this one, and it, are not to be taken in again: the first row that the engine
                computes is that of token `position`, and the first that will be taken in is token position + 1.

        Returns:
            A state at `position`: a fork of the kept one with these tokens that has seen most of them, or one that
            has seen nothing.
        """
        wanted = np.asarray(tokens, dtype=np.int64)[: position + 1]
        best, best_key = DraftState.at(position), None
        for key, (known, state) in self._kept.items():
            first = state.position - state.length
            if state.position < position or state.length - (state.position - position) <= best.length:
                continue
            if first <= position and np.array_equal(known[: position + 1], wanted):
                best, best_key = state, key
        if best_key is None:
            return best
        self._kept[best_key] = self._kept.pop(best_key)
        return best.fork(position)

    def clear(self) -> None:
        """Forget all, where the weights that made them have changed beyond use."""
        self._kept.clear()
