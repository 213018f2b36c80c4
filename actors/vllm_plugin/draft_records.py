"""What the runner, the desk and the drafters of a worker tell each other. Imports nothing of vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from rollout.speculation.growth import ScoredTree
from rollout.speculation.tree import TokenTree
from rollout.speculation.walk import Accepted


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
        learns: It wants to know what requests say that it does not draft for, by `learn`.
    """

    needs_hidden: bool
    learns: bool

    def prepare(self, requests: Sequence[DraftRequest]) -> None:
        """Take in what these requests said while they were not drafted for: what drafting costs once, not every step.

        Called before each `propose`, with the same requests.
        """
        ...

    def propose(self, requests: Sequence[DraftRequest], limits: DraftLimits) -> Sequence[ScoredTree]:
        """One tree for each request, empty where it has no idea."""
        ...

    def take_hidden(
        self, request_ids: Sequence[str], counts: np.ndarray | None, first: np.ndarray, rows: torch.Tensor
    ) -> None:
        """What the target computed in a step.

        Args:
            request_ids: b of them.
            counts: [b] rows of each; None: one each.
            first: [b] position of its first row; the others follow it. Valid in this call.
            rows: [sum of counts, H] states after the final norm. On a CPU nobody writes to them any more, elsewhere
                they are valid in this call.
        """
        ...

    def learn(self, request: DraftRequest) -> None:
        """What a request has said so far, now and then while it is not drafted for."""
        ...

    def end(self, request: DraftRequest) -> None:
        """All that a request has said: it has ended."""
        ...

    def forget(self, request_id: str) -> None:
        """A request has ended, and nobody wants to draft from what it said."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSize:
    """What a rank, or several together, put into a forward.

    Attributes:
        sequences: Requests.
        rows: Rows that are sampled from: one for each request, and its draft nodes.
        has_prefill: There were other rows.
    """

    sequences: int
    rows: int
    has_prefill: bool


NOTHING = StepSize(sequences=0, rows=0, has_prefill=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A step that ran.

    Attributes:
        size: Of it, on this rank.
        peers: Of it, on the other ranks of the group.
        context_tokens: KV that its requests read, summed.
        num_tokens: Tokens emitted.
        version: Of the weights.
        trees: Of the requests that had one, by id, with what was accepted.
        is_continued: The step before it ended with requests that go on in this one, so that the time between is a step.
    """

    size: StepSize
    peers: StepSize
    context_tokens: int
    num_tokens: int
    version: int
    trees: Sequence[tuple[str, TokenTree, Accepted]]
    is_continued: bool
