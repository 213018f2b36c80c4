"""Tokens on their way to whoever follows a trajectory while it is generated.

A stream is a convenience beside the record: the finished trajectory has the last word. Since a token depends on
weights, prompt, seed and position only, what is sent twice after a retry or a move is the same, and the receiver drops
the positions that it has. Knows nothing of engines, actors or HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass

TopLogprobs = tuple[tuple[int, float], ...]
"""Token ids with their log-probabilities at one position: the token that is there, then the most likely ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStream:
    """Who follows a trajectory, and what is sent beside its tokens.

    Attributes:
        subscriber: Asks the shards for tokens, of all its streams together.
        stream_id: The subscriber's name for this trajectory.
        num_top_logprobs: Most likely alternatives sent with every token; 0 = none.
        num_prompt_logprobs: The same for every token of the prompt; None: the prompt is not scored.
    """

    subscriber: str
    stream_id: str
    num_top_logprobs: int = 0
    num_prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """What a user has seen of a stream: seconds from the request to the first token, and to the time of telling."""

    ttft_s: float
    age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkEnd:
    """How a chunk ended, sent with its last tokens: whoever follows it need not wait for the record.

    Attributes:
        is_stopped: By an end token; else its budget is used up.
        num_cached_tokens: As in a chunk's result.
    """

    is_stopped: bool
    num_cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDelta:
    """Some tokens of a stream.

    Attributes:
        stream_id: Whose.
        start: Index of the first one in the output.
        token_ids, logprobs: As in a chunk's result.
        top_logprobs: One entry a token where they were asked for, else empty.
        prompt_logprobs: One entry a prompt token, None for the first, once before the first token; else empty.
        end: Of the chunk, after these tokens.
    """

    stream_id: str
    start: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[TopLogprobs | None, ...] = ()
    end: ChunkEnd | None = None
