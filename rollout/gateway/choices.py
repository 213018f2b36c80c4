"""One completion under way, as its gateway sees it: tokens that come in pieces, and how it ended.

Pieces may come twice, overlap, or be missing, as streams are sent again after a retry and are not durable. Where each
continued the one before, the last one ends the choice. Otherwise the finished trajectory has the last word: it fills
what is missing, and tokens that it contradicts are an error, because they may have been shown. Knows nothing of text,
HTTP or calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rollout.errors import LongrollError
from rollout.streaming import ChunkEnd, TokenDelta, TopLogprobs
from rollout.types import FinishReason, Status, Trajectory


class StreamDiverged(LongrollError):
    """Tokens that were sent already are not those of the finished completion: the weights changed as an engine died."""


class Choice:
    """Lives in one event loop.

    Args:
        stream_id: Its name.
        prompt_token_ids: What it continues.
        max_tokens: After so many it ends.
        changed: Set whenever anything has come; shared by the choices of one request.
        needs_top, needs_prompt: It is complete only with the log-probabilities of alternatives, or of the prompt.
    """

    def __init__(
        self,
        stream_id: str,
        prompt_token_ids: Sequence[int],
        max_tokens: int,
        changed: asyncio.Event,
        *,
        needs_top: bool = False,
        needs_prompt: bool = False,
    ) -> None:
        self.stream_id, self.prompt_token_ids, self._max_tokens = stream_id, prompt_token_ids, max_tokens
        self._needs_top, self._needs_prompt = needs_top, needs_prompt
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[TopLogprobs] = []
        self.prompt_logprobs: tuple[TopLogprobs | None, ...] = ()
        self.finish_reason: FinishReason | None = None
        self.num_cached_tokens = 0
        self.trajectory: Trajectory | None = None
        self.error: Exception | None = None
        self._is_ended = False
        self._is_seamless = True  # every delta continued the one before
        self._changed = changed

    @property
    def is_over(self) -> bool:
        """It has ended, or cannot be had."""
        return self._is_ended or self.error is not None

    @property
    def is_complete(self) -> bool:
        """Over, and nothing that was asked for is missing."""
        if self.error is not None:
            return True
        if not self._is_ended:
            return False
        has_top = not self._needs_top or len(self.top_logprobs) >= len(self.token_ids)
        return has_top and (not self._needs_prompt or bool(self.prompt_logprobs))

    def add(self, delta: TokenDelta) -> None:
        """Take in the tokens of a delta that are new; one that leaves a gap is left to the finished trajectory."""
        num_known = len(self.token_ids) - delta.start
        self._is_seamless &= num_known == 0
        if not self.is_over and 0 <= num_known < len(delta.token_ids):
            self.token_ids.extend(delta.token_ids[num_known:])
            self.logprobs.extend(delta.logprobs[num_known:])
            self._changed.set()
        self._add_logprobs(delta)
        if delta.end is not None and self._is_seamless:
            self._chunk_ended(delta.end)

    def _chunk_ended(self, end: ChunkEnd) -> None:
        self.num_cached_tokens += end.num_cached_tokens
        is_last = end.is_stopped or len(self.token_ids) >= self._max_tokens
        if is_last and not self.is_over:
            self._is_ended = True
            self.finish_reason = FinishReason.STOP if end.is_stopped else FinishReason.LENGTH
            self._changed.set()

    def _add_logprobs(self, delta: TokenDelta) -> None:
        """What the finished trajectory does not have, so it may come after that."""
        num_known = len(self.top_logprobs) - delta.start
        if delta.top_logprobs and 0 <= num_known < len(delta.top_logprobs):
            self.top_logprobs.extend(delta.top_logprobs[num_known:])
            self._changed.set()
        if delta.prompt_logprobs and not self.prompt_logprobs:
            self.prompt_logprobs = delta.prompt_logprobs
            self._changed.set()

    def end(self, trajectory: Trajectory) -> None:
        """The completion is over."""
        if self.is_over:
            return
        num_known = len(self.token_ids)
        if trajectory.status in (Status.COMPLETED, Status.TRUNCATED):
            if self.token_ids != trajectory.token_ids[:num_known]:
                self.fail(StreamDiverged(f"completion: got other tokens than the {num_known} that were sent before"))
                return
            self.token_ids.extend(trajectory.token_ids[num_known:])
            self.logprobs.extend(trajectory.logprobs[num_known:])
        self._is_ended, self.trajectory, self.finish_reason = True, trajectory, trajectory.finish_reason
        self.num_cached_tokens = trajectory.metadata.get("num_cached_tokens", 0)
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """The completion could not be had."""
        if not self.is_over:
            self.error = error
            self._changed.set()
