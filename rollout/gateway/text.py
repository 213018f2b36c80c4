"""From tokens to text while they come: no half characters, and nothing after a stop string.

The tokenizer is passed in as a function. A token need not end where a character ends, and how a token is written may
depend on the one before it, so new text is what a window of tokens reads as with the new ones, less what it read as
without them (as Hugging Face's text-generation-inference does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Decode = Callable[[Sequence[int]], str]
CONTEXT_TOKENS = 6  # of the prompt before the first token: more than any character takes
MAX_PENDING_TOKENS = 64  # that do not end a character; whatever they are by then, it is not text
INCOMPLETE = "\ufffd"


class TextStream:
    """The text of one output, piece by piece; all pieces together are what its tokens read as after the prompt.

    Args:
        decode: Tokens to text.
        prompt_token_ids: What came before.
    """

    def __init__(self, decode: Decode, prompt_token_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(prompt_token_ids[-CONTEXT_TOKENS:])
        self._num_read = len(self._window)

    def push(self, token_ids: Sequence[int]) -> str:
        """Further tokens; returns the text that is certain now."""
        self._window.extend(token_ids)
        before, text = self._decode(self._window[: self._num_read]), self._decode(self._window)
        is_stuck = len(self._window) - self._num_read > MAX_PENDING_TOKENS
        if text.endswith(INCOMPLETE) and not is_stuck:
            return ""
        return self._advance(before, text)

    def flush(self) -> str:
        """No token follows: the text that was held back, whole characters or not."""
        return self._advance(self._decode(self._window[: self._num_read]), self._decode(self._window))

    def _advance(self, before: str, text: str) -> str:
        self._window = self._window[-CONTEXT_TOKENS:]
        self._num_read = len(self._window)
        return text[len(before) :]


class StopStrings:
    """Finds the first of some strings in a text that comes in pieces.

    Args:
        stops: Strings that end a text; none is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Further text. Returns what may be shown, and the stop string that was found, of which nothing is shown."""
        self._held += text
        found = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if found:
            place, stop = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            shown, self._held = self._held[:place], ""
            return shown, stop
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        place = len(self._held) - keep
        shown, self._held = self._held[:place], self._held[place:]
        return shown, None

    def flush(self) -> str:
        """No text follows: what was held back."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop`, short of all of it, that `text` ends with."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of some tokens.

    Attributes:
        text: To be shown.
        num_tokens: How many of the tokens given belong to the output; fewer than all after a stop string.
        stop: The stop string that ended the output.
    """

    text: str
    num_tokens: int
    stop: str | None = None


class OutputText:
    """The text of one output up to its first stop string.

    Args:
        decode: Tokens to text.
        stops: Strings that end the output.
        prompt_token_ids: What came before.
    """

    def __init__(self, decode: Decode, stops: Sequence[str], prompt_token_ids: Sequence[int] = ()) -> None:
        self._text = TextStream(decode, prompt_token_ids)
        self._stops = StopStrings(stops) if stops else None

    def push(self, token_ids: Sequence[int], is_last: bool) -> Piece:
        """Further tokens, the last ones or not; not to be called after a stop."""
        if self._stops is None:
            text = self._text.push(token_ids) if token_ids else ""
            return Piece(text + self._text.flush() if is_last else text, len(token_ids))
        shown = ""
        for number, token_id in enumerate(token_ids, 1):  # one by one, so as to know which one ends a stop string
            text, stop = self._stops.push(self._text.push((token_id,)))
            shown += text
            if stop is not None:
                return Piece(shown, number, stop)
        if is_last:
            text, stop = self._stops.push(self._text.flush())
            shown += text if stop is not None else text + self._stops.flush()
            return Piece(shown, len(token_ids), stop)
        return Piece(shown, len(token_ids))
