"""Prompts from files: one JSON object a line.

    {"prompt": "text" | [{"role": …, "content": …}, …], "prompt_id": "…", "metadata": {…}}
    {"token_ids": [1, 2, 3], …}

Knows nothing of models beyond the tokenizer it is given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from rollout.errors import InvalidRequest
from rollout.types import Prompt


class PromptTokenizer(Protocol):
    """The two tokenizer methods needed here (those of Hugging Face tokenizers)."""

    def encode(self, text: str) -> list[int]: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool, return_dict: bool
    ) -> list[int]: ...


def read_prompts(path: str | Path, tokenizer: PromptTokenizer) -> list[Prompt]:
    """Read all prompts of a JSONL file; blank lines are skipped.

    Args:
        path: The file. Its name stands for a missing prompt_id, with the line number.
        tokenizer: Encodes text as it is, and chat messages through the chat template.

    Raises:
        InvalidRequest: Names the file and line, or says that the format is not supported.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".json"):
        raise InvalidRequest("prompt file", str(path), "a .jsonl file (convert Parquet to JSONL first)")
    if not path.is_file():
        raise InvalidRequest("prompt file", str(path), "a file that exists")
    prompts = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                prompts.append(_read_line(line, f"{path.name}:{number}", tokenizer))
    if not prompts:
        raise InvalidRequest("prompt file", f"{path}, without any prompt", "at least one line")
    return prompts


def _read_line(line: str, place: str, tokenizer: PromptTokenizer) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidRequest(place, f"{line.strip()[:80]!r}", f"a JSON object ({error})") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("token_ids" in row):
        raise InvalidRequest(place, f"{line.strip()[:80]!r}", 'an object with either "prompt" or "token_ids"')
    unknown = sorted(set(row) - {"prompt", "token_ids", "prompt_id", "metadata"})
    if unknown:
        raise InvalidRequest(place, f"the key {unknown[0]!r}", "prompt, token_ids, prompt_id or metadata")
    metadata = row.get("metadata", {})
    if not isinstance(metadata, dict):
        raise InvalidRequest(f"{place} metadata", metadata, "an object")
    token_ids = _token_ids(row, place, tokenizer)
    if not token_ids:
        raise InvalidRequest(place, "an empty prompt", "at least one token")
    return Prompt(token_ids=token_ids, prompt_id=str(row.get("prompt_id", place)), metadata=metadata)


def _token_ids(row: dict[str, Any], place: str, tokenizer: PromptTokenizer) -> tuple[int, ...]:
    if "token_ids" in row:
        ids = row["token_ids"]
        if not isinstance(ids, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise InvalidRequest(f"{place} token_ids", ids, "a list of integers")
        return tuple(ids)
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return tuple(tokenizer.encode(prompt))
    if isinstance(prompt, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt):
        return tuple(
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
        )
    raise InvalidRequest(f"{place} prompt", prompt, 'a string or a list of {"role", "content"} messages')
