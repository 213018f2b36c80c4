"""One completion request from its tokens to its answer, whole or as a stream.

Owns the choices of the request until it is answered; whatever ends it, nothing of it goes on being generated. How it
is written is in `rollout.gateway.formats`, what is generated is the service's.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

from actors.gateway_backend import Backend
from actors.gateway_http import ApiError, api_error
from actors.gateway_tokenizer import Tokenizer
from rollout.gateway.choices import Choice
from rollout.gateway.formats import DONE, Format, Fragment, Scored, Usage
from rollout.gateway.sampling import REWARD, group_id_of
from rollout.gateway.text import OutputText
from rollout.streaming import TokenStream
from rollout.types import FinishReason, Prompt, RolloutRequest, SamplingParams, Status, Ticket

LATE_LOGPROBS_S = 10.0  # after a completion has ended; they come by another way than its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a completion request comes to, whichever API it came by.

    Attributes:
        prompts: Token ids of each prompt.
        prompt_texts: The prompts to be repeated before the output, or none.
        num_choices: Of each prompt.
        sampling: Of all of them.
        run_seed: See rollout.gateway.sampling.
        stops: Strings that end a choice.
        skip_special_tokens: Leave special tokens out of the text.
        has_logprobs: Tell the log-probability of every token.
        num_top_logprobs: And of so many alternatives.
        is_streamed: Answer with events.
        has_usage_event: End a stream with the usage.
        is_prompt_only: Show the prompt, and nothing of the output.
    """

    prompts: Sequence[Sequence[int]]
    prompt_texts: Sequence[str] = ()
    num_choices: int = 1
    sampling: SamplingParams
    run_seed: int
    stops: Sequence[str] = ()
    skip_special_tokens: bool = True
    has_logprobs: bool = False
    num_top_logprobs: int = 0
    is_streamed: bool = False
    has_usage_event: bool = False
    is_prompt_only: bool = False

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt's tokens are told."""
        return bool(self.prompt_texts) and self.has_logprobs


@dataclass(slots=True, kw_only=True)
class _Run:
    """One choice of a request. Owned by the completion."""

    index: int
    prompt: int
    choice: Choice
    text: OutputText
    num_taken: int = 0  # tokens that were looked at
    num_tokens: int = 0  # of those, tokens of the output
    num_characters: int = 0
    is_ended: bool = False


class Completion:
    """See the module.

    Args:
        backend: The service.
        tokenizer: The model's.
        wanted: What is asked for.
        form: How it is written.
        priority: In the scheduler.
        max_wait_s: Longest wait for an engine.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        wanted: Wanted,
        form: Format,
        priority: int,
        max_wait_s: float,
    ) -> None:
        self._backend, self._tokenizer, self._wanted, self._form = backend, tokenizer, wanted, form
        self._priority, self._max_wait_s = priority, max_wait_s
        self._changed = asyncio.Event()
        self._decode = partial(tokenizer.decode, skip_special_tokens=wanted.skip_special_tokens)
        self._ticket = Ticket(ticket_id=uuid.uuid4().hex, num_choices=len(wanted.prompts) * wanted.num_choices)
        self._runs: list[_Run] = []
        self._num_cached = 0
        self.first_token_at: float | None = None

    def begin(self) -> None:
        """Ask the service for every choice. Raises QueueFull if there are too many under way."""
        wanted = self._wanted
        self._backend.check_room(self._ticket.num_choices)
        for prompt in range(len(wanted.prompts)):
            for sample in range(wanted.num_choices):
                self._begin_choice(prompt, sample)

    def _begin_choice(self, prompt: int, sample: int) -> None:
        wanted, index = self._wanted, len(self._runs)
        token_ids = tuple(wanted.prompts[prompt])
        choice = Choice(
            uuid.uuid4().hex,
            token_ids,
            wanted.sampling.max_tokens,
            self._changed,
            needs_top=wanted.num_top_logprobs > 0,
            needs_prompt=wanted.scores_prompt and len(token_ids) > 1,
        )
        is_followed = wanted.is_streamed or wanted.stops or wanted.num_top_logprobs or wanted.scores_prompt
        stream = TokenStream(
            subscriber=self._backend.client_id,
            stream_id=choice.stream_id,
            num_top_logprobs=wanted.num_top_logprobs,
            num_prompt_logprobs=wanted.num_top_logprobs if wanted.scores_prompt else None,
        )
        request = RolloutRequest(
            prompts=(Prompt(token_ids=token_ids, prompt_id=choice.stream_id),),
            n_samples_per_prompt=1,
            sampling=wanted.sampling,
            run_seed=wanted.run_seed,
            group_ids=(group_id_of(prompt, sample),),
            reward=REWARD,
            priority=self._priority,
            stream=stream if is_followed else None,
            max_wait_s=self._max_wait_s,
            ticket=self._ticket,
            is_interactive=True,
        )
        text = OutputText(self._decode, wanted.stops, token_ids)
        self._runs.append(_Run(index=index, prompt=prompt, choice=choice, text=text))
        self._backend.begin(request, choice)

    def end(self) -> None:
        """Stop whatever still runs; to be called in any case."""
        for run in self._runs:
            self._backend.end(run.choice)

    async def body(self) -> bytes:
        """The whole answer. Raises the first error of any choice."""
        try:
            parts: list[list[Fragment]] = [[] for _ in self._runs]
            async for fragments in self._fragments():
                for fragment in fragments:
                    parts[fragment.index].append(fragment)
            return self._form.body([_joined(some) for some in parts], self.usage)
        finally:
            self.end()

    async def events(self) -> AsyncIterator[bytes]:
        """The answer in pieces. An error before the first piece is raised; one after it is the last piece."""
        is_begun = False
        try:
            async for fragments in self._fragments():
                yield b"".join(self._form.event(fragment) for fragment in fragments)
                is_begun = True
            tail = self._form.usage_event(self.usage) if self._wanted.has_usage_event else b""
            yield tail + DONE
        except Exception as error:  # the status line is gone; the error is told in the stream
            if not is_begun:
                raise
            told = error if isinstance(error, ApiError) else api_error(error)
            yield b"data: " + told.to_json() + b"\n\n" + DONE
        finally:
            self.end()

    @property
    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once, whatever the number of its choices."""
        return Usage(
            num_prompt_tokens=sum(len(prompt) for prompt in self._wanted.prompts),
            num_completion_tokens=sum(run.num_tokens for run in self._runs),
            num_cached_tokens=self._num_cached,
        )

    async def _fragments(self) -> AsyncIterator[list[Fragment]]:
        """What is new of all choices, as it comes."""
        open_runs = list(self._runs)
        late_at: float | None = None
        while open_runs:
            if late_at is None:
                await self._changed.wait()
            else:
                await self._wait_until(late_at)
            self._changed.clear()
            fragments = [fragment for run in open_runs if (fragment := self._advance(run)) is not None]
            if fragments:
                if self.first_token_at is None:
                    self.first_token_at = time.monotonic()
                yield fragments
            open_runs = [run for run in open_runs if not run.is_ended]
            if open_runs and late_at is None and all(run.choice.is_over for run in open_runs):
                late_at = time.monotonic() + LATE_LOGPROBS_S

    async def _wait_until(self, deadline: float) -> None:
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await self._changed.wait()
        except TimeoutError:
            raise ApiError(503, "log-probabilities were lost; ask again", "server_error", "logprobs_lost") from None

    def _advance(self, run: _Run) -> Fragment | None:
        """What is new of one choice; None for nothing."""
        choice = run.choice
        if choice.error is not None:
            raise choice.error
        num_ready = len(choice.token_ids)
        if self._wanted.num_top_logprobs:
            num_ready = min(num_ready, len(choice.top_logprobs))
        is_last, token_ids = choice.is_complete, choice.token_ids[run.num_taken : num_ready]
        if not is_last and (not token_ids or (self._wanted.scores_prompt and not choice.prompt_logprobs)):
            return None
        if is_last:
            self._check_end(run)
        first = run.num_taken
        run.num_taken = num_ready
        return self._fragment(run, first, token_ids, is_last)

    def _fragment(self, run: _Run, first: int, token_ids: list[int], is_last: bool) -> Fragment:
        wanted, choice = self._wanted, run.choice
        is_stop_token = bool(token_ids) and self._is_stop_token(token_ids[-1])
        shown_ids = token_ids[:-1] if is_stop_token else token_ids
        piece = run.text.push(shown_ids, is_last or is_stop_token)
        if piece.stop is not None:
            token_ids = token_ids[: piece.num_tokens]
        finish_reason, stop_reason = None, None
        if piece.stop is not None:
            finish_reason, stop_reason = "stop", piece.stop
        elif is_last:
            finish_reason = "stop" if choice.finish_reason is FinishReason.STOP else "length"
            if token_ids and token_ids[-1] in wanted.sampling.stop_token_ids:
                stop_reason = token_ids[-1]  # type: ignore[assignment]
        text, is_first = piece.text, run.num_tokens == 0 and first == 0
        if wanted.is_prompt_only:
            text, token_ids = "", []
        scored = self._scored(run, first, token_ids, is_first) if wanted.has_logprobs else None
        if is_first and wanted.prompt_texts:
            text = wanted.prompt_texts[run.prompt] + text
        fragment = Fragment(
            index=run.index,
            text=text,
            token_ids=token_ids,
            scored=scored,
            text_offset=run.num_characters,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            is_first=is_first,
            prompt_token_ids=choice.prompt_token_ids,
        )
        run.num_tokens += len(token_ids)
        run.num_characters += len(text)
        if finish_reason is not None:
            run.is_ended = True
            self._backend.end(choice)
        return fragment

    def _scored(self, run: _Run, first: int, token_ids: Sequence[int], is_first: bool) -> Scored:
        choice, stop = run.choice, first + len(token_ids)
        output = Scored(
            token_ids=token_ids, logprobs=choice.logprobs[first:stop], top_logprobs=choice.top_logprobs[first:stop]
        )
        if not (is_first and self._wanted.scores_prompt):
            return output
        known = choice.prompt_logprobs or (None,)
        return Scored(
            token_ids=[*choice.prompt_token_ids, *output.token_ids],
            logprobs=[*(entry[0][1] if entry else None for entry in known), *output.logprobs],
            top_logprobs=[*known, *output.top_logprobs] if self._wanted.num_top_logprobs else (),
        )

    def _is_stop_token(self, token_id: int) -> bool:
        """Whether a token ended the output: those are never shown as text."""
        sampling = self._wanted.sampling
        if token_id in sampling.stop_token_ids:
            return True
        return not sampling.ignore_eos and token_id in self._tokenizer.stop_token_ids

    def _check_end(self, run: _Run) -> None:
        """Raise unless the choice ended by itself."""
        trajectory = run.choice.trajectory
        self._num_cached += run.choice.num_cached_tokens
        if trajectory is None:  # its stream ended it, which one that failed or was aborted does not
            return
        if trajectory.status is Status.FAILED:
            raise ApiError(503, f"the completion failed: {trajectory.error}", "server_error", "failed", None, 1.0)
        if trajectory.status is Status.ABORTED:
            raise ApiError(503, "the completion was aborted", "server_error", "aborted", None, 1.0)


def _joined(fragments: Sequence[Fragment]) -> Fragment:
    """All fragments of a choice as one."""
    first, last = fragments[0], fragments[-1]
    if len(fragments) == 1:
        return first
    scored = [fragment.scored for fragment in fragments if fragment.scored is not None]
    return Fragment(
        index=first.index,
        text="".join(fragment.text for fragment in fragments),
        token_ids=[token for fragment in fragments for token in fragment.token_ids],
        scored=Scored(
            token_ids=[token for one in scored for token in one.token_ids],
            logprobs=[logprob for one in scored for logprob in one.logprobs],
            top_logprobs=[entry for one in scored for entry in one.top_logprobs],
        )
        if scored
        else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        is_first=True,
        prompt_token_ids=first.prompt_token_ids,
    )
