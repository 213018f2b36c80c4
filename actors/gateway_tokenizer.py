"""The model's tokenizer as a gateway uses it: text to tokens, conversations to tokens, tokens to text.

Owns the tokenizer object. What text means to a request is in `rollout.gateway`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError

from rollout.config import ModelConfig
from rollout.errors import InvalidRequest


class Tokenizer:
    """Calls may be made from any thread.

    Args:
        model: Whose tokenizer it is.
    """

    def __init__(self, model: ModelConfig) -> None:
        from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

        self._whole = AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
        self._reserved = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
        # The Rust object beneath is several times quicker for short texts than what wraps it.
        self._core: Any = getattr(self._whole, "backend_tokenizer", None)
        self.stop_token_ids = _stop_token_ids(model, self._whole.eos_token_id, GenerationConfig)
        self.token_text = lru_cache(maxsize=1 << 18)(self._token_text)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Text to token ids. Raises InvalidRequest for text that cannot be encoded."""
        try:
            if self._core is not None:
                ids: list[int] = self._core.encode(text, add_special_tokens=add_special_tokens).ids
            else:
                ids = self._whole.encode(text, add_special_tokens=add_special_tokens)
        except (UnicodeError, TypeError, ValueError) as error:
            raise InvalidRequest("prompt", str(error), "text") from None
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Token ids to text."""
        if self._core is not None:
            return str(self._core.decode(token_ids, skip_special_tokens=skip_special_tokens))
        return str(self._whole.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """A conversation to token ids, by the model's own template.

        Args:
            messages: Mappings with role and content.
            add_generation_prompt: End with the beginning of an answer.
            options: Variables for the template.

        Raises:
            InvalidRequest: The template refuses the conversation, there is none, or an option is none of its.
        """
        taken = sorted(self._reserved & set(options or ()))
        if taken:
            raise InvalidRequest("chat_template_kwargs", ", ".join(taken), "variables of the model's template")
        try:
            text = self._whole.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **(options or {})
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise InvalidRequest("messages", str(error), "a conversation that the model's template takes") from None
        return self.encode(str(text), add_special_tokens=False)

    def _token_text(self, token_id: int) -> str:
        return self.decode((token_id,), skip_special_tokens=False)


def _stop_token_ids(model: ModelConfig, eos_token_id: int | None, configs: Any) -> frozenset[int]:
    """The model's end tokens, as its directory names them."""
    ids = {eos_token_id} if eos_token_id is not None else set()
    try:
        named = configs.from_pretrained(model.path).eos_token_id
    except OSError:  # the directory has no generation config
        named = None
    return frozenset(ids | set(named if isinstance(named, list) else [named] if named is not None else []))
