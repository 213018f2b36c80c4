"""Completions as the OpenAI API writes them: whole answers and server-sent events.

A fragment is what is shown of one choice at once: all of it in a whole answer, some tokens of it in an event. Events of
plain text, of which there are many, are put together by hand around the text. Owns the JSON; knows nothing of how
tokens come about.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.streaming import TopLogprobs

DONE = b"data: [DONE]\n\n"
TokenText = Callable[[int], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Tokens with their log-probabilities.

    Attributes:
        token_ids, logprobs: One a token; None where a token was not scored.
        top_logprobs: One entry a token, or empty.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float | None]
    top_logprobs: Sequence[TopLogprobs | None] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """Some of one choice.

    Attributes:
        index: Of the choice.
        text: To be shown.
        token_ids: Generated tokens of it.
        scored: For the field logprobs; None: they were not asked for.
        text_offset: Characters of the choice before this fragment.
        finish_reason: Why it ended, in its last fragment.
        stop_reason: The stop string or token that ended it, if one did.
        is_first: Of its choice.
        prompt_token_ids: Of the choice, where token ids were asked for.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    scored: Scored | None = None
    text_offset: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    is_first: bool = False
    prompt_token_ids: Sequence[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a request."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


class Format:
    """What answers of both kinds have in common.

    Args:
        answer_id: Of the answer.
        created: Seconds since 1970.
        model: Name of the model, as the client knows it.
        has_token_ids: Show token ids beside the text.
        has_null_usage: Events say that their usage is null, as those of streams do that end with a usage.
        token_text: The text of one token.
    """

    whole_object: str
    event_object: str

    def __init__(
        self,
        *,
        answer_id: str,
        created: int,
        model: str,
        has_token_ids: bool,
        has_null_usage: bool,
        token_text: TokenText,
    ) -> None:
        self._answer_id, self._created, self._model = answer_id, created, model
        self._has_token_ids, self._has_null_usage, self._token_text = has_token_ids, has_null_usage, token_text
        head = json.dumps(self._head(self.event_object))[:-1]
        self._event_head = f'data: {head}, "choices": [{{"index": '
        self._event_tail = ', "usage": null}\n\n' if has_null_usage else "}\n\n"

    def event(self, fragment: Fragment) -> bytes:
        """A server-sent event."""
        if fragment.scored is None and not self._has_token_ids and fragment.finish_reason is None:
            middle = self._plain(fragment)
            if middle is not None:
                return f"{self._event_head}{fragment.index}{middle}]{self._event_tail}".encode()
        return self._event([self._part(fragment)], fragment, None)

    def usage_event(self, usage: Usage) -> bytes:
        """The event that ends a stream which tells its usage."""
        return self._event([], None, usage)

    def body(self, fragments: Sequence[Fragment], usage: Usage) -> bytes:
        """A whole answer."""
        record = self._head(self.whole_object) | {"choices": [self._whole(one) for one in fragments]}
        record |= self._extras(fragments[0]) | {"usage": usage.to_json()}
        return json.dumps(record).encode()

    def _event(self, choices: list[dict[str, Any]], fragment: Fragment | None, usage: Usage | None) -> bytes:
        record = self._head(self.event_object) | {"choices": choices}
        if fragment is not None and fragment.is_first:
            record |= self._extras(fragment)
        if usage is not None:
            record["usage"] = usage.to_json()
        elif self._has_null_usage:
            record["usage"] = None
        return f"data: {json.dumps(record)}\n\n".encode()

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._answer_id, "object": kind, "created": self._created, "model": self._model}

    def _name(self, token_id: int) -> str:
        """A token as text; what is not text by itself is named by its id, so that no two are the same."""
        text = self._token_text(token_id)
        return f"token_id:{token_id}" if "\ufffd" in text else text

    def _ending(self, fragment: Fragment) -> dict[str, Any]:
        ending: dict[str, Any] = {"finish_reason": fragment.finish_reason}
        if fragment.finish_reason is not None:
            ending["stop_reason"] = fragment.stop_reason
        if self._has_token_ids:
            ending["token_ids"] = list(fragment.token_ids)
        return ending

    def _extras(self, fragment: Fragment) -> dict[str, Any]:
        return {}

    def _plain(self, fragment: Fragment) -> str | None:
        raise NotImplementedError

    def _part(self, fragment: Fragment) -> dict[str, Any]:
        raise NotImplementedError

    def _whole(self, fragment: Fragment) -> dict[str, Any]:
        raise NotImplementedError


class TextFormat(Format):
    """Of /v1/completions."""

    whole_object = event_object = "text_completion"

    def _plain(self, fragment: Fragment) -> str | None:
        return f', "text": {json.dumps(fragment.text)}, "logprobs": null, "finish_reason": null}}'

    def _part(self, fragment: Fragment) -> dict[str, Any]:
        choice = {"index": fragment.index, "text": fragment.text, "logprobs": self._logprobs(fragment)}
        if self._has_token_ids and fragment.is_first:
            choice["prompt_token_ids"] = list(fragment.prompt_token_ids or ())
        return choice | self._ending(fragment)

    def _whole(self, fragment: Fragment) -> dict[str, Any]:
        return self._part(fragment)

    def _logprobs(self, fragment: Fragment) -> dict[str, Any] | None:
        scored = fragment.scored
        if scored is None:
            return None
        tokens = [self._name(token) for token in scored.token_ids]
        offsets, place = [], fragment.text_offset
        for token in scored.token_ids:
            offsets.append(place)
            place += len(self._token_text(token))
        return {
            "tokens": tokens,
            "token_logprobs": list(scored.logprobs),
            "top_logprobs": [self._top(entry) for entry in scored.top_logprobs] or None,
            "text_offset": offsets,
        }

    def _top(self, entry: TopLogprobs | None) -> dict[str, float] | None:
        return {self._name(token): logprob for token, logprob in reversed(entry)} if entry else None


class ChatFormat(Format):
    """Of /v1/chat/completions."""

    whole_object, event_object = "chat.completion", "chat.completion.chunk"

    def _plain(self, fragment: Fragment) -> str | None:
        role = '"role": "assistant", ' if fragment.is_first else ""
        delta = f'{{{role}"content": {json.dumps(fragment.text)}}}'
        return f', "delta": {delta}, "logprobs": null, "finish_reason": null}}'

    def _part(self, fragment: Fragment) -> dict[str, Any]:
        role = {"role": "assistant"} if fragment.is_first else {}
        choice = {
            "index": fragment.index,
            "delta": role | {"content": fragment.text},
            "logprobs": self._logprobs(fragment),
        }
        return choice | self._ending(fragment)

    def _whole(self, fragment: Fragment) -> dict[str, Any]:
        message = {"role": "assistant", "content": fragment.text, "refusal": None}
        choice = {"index": fragment.index, "message": message, "logprobs": self._logprobs(fragment)}
        return choice | self._ending(fragment)

    def _extras(self, fragment: Fragment) -> dict[str, Any]:
        return {"prompt_token_ids": list(fragment.prompt_token_ids or ())} if self._has_token_ids else {}

    def _logprobs(self, fragment: Fragment) -> dict[str, Any] | None:
        scored = fragment.scored
        if scored is None:
            return None
        tops = scored.top_logprobs or [()] * len(scored.token_ids)
        content = [
            self._entry(token, logprob) | {"top_logprobs": [self._entry(*pair) for pair in (top or ())[1:]]}
            for token, logprob, top in zip(scored.token_ids, scored.logprobs, tops, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text = self._token_text(token_id)
        has_text = "\ufffd" not in text
        return {
            "token": self._name(token_id),
            "logprob": logprob,
            "bytes": list(text.encode("utf-8", "replace")) if has_text else None,
        }
