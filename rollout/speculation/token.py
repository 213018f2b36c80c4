"""One generated token and how it came about."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """What `speculative_decode` returns for every position.

    Attributes:
        token_id: Id in the target's vocabulary.
        logprob: Log-probability under the distribution it was drawn from (temperature, top-k and top-p applied).
        position: Absolute index in prompt + output; with the seed, the key of its noise.
        is_drafted: A drafter had proposed it, so it cost no pass of its own.
        depth: Layer of the tree it was accepted from; 0 where it was not drafted.
    """

    token_id: int
    logprob: float
    position: int
    is_drafted: bool
    depth: int
