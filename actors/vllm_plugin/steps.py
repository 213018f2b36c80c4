"""The record of one forward, which crosses from a worker to its shard's actor. Imports nothing of vLLM."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A forward that sampled.

    Attributes:
        vote: Number of the vote before it, the same on every rank of the group.
        version: Weights it ran under.
        ended_at: time.monotonic() when its tokens were sampled, in seconds.
        num_requests: Requests in it.
        num_trees: Of those, the ones with drafts that it verified.
    """

    vote: int
    version: int
    ended_at: float
    num_requests: int
    num_trees: int = 0
