"""Submitted groups as rows, and whether a group that comes again is the same.

Knows nothing of databases.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from rollout.errors import InvalidRequest
from rollout.journal.encoding import digest_of, encode_prompt, encode_request, plain_text, tokens_to_bytes
from rollout.journal.errors import JournalConflict
from rollout.seeds import trajectory_seed
from rollout.types import RolloutRequest

MAX_PRIORITY = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class NewGroup:
    """A submitted group in the form of its row."""

    group_id: str
    prompt_tokens: bytes
    prompt: str
    prompt_digest: str
    request: str
    digest: str

    @property
    def columns(self) -> tuple[object, ...]:
        """What its row begins with after the ids."""
        return self.prompt_tokens, self.prompt, self.prompt_digest, self.request, self.digest

    def check_same(self, what: str, prompt_digest: str, request: str) -> None:
        """Raise JournalConflict, naming the difference, unless it is what was submitted under its id before."""
        if prompt_digest != self.prompt_digest:
            raise JournalConflict(f"{what}: got another prompt than it was submitted with, expected the same")
        was, now = json.loads(request), json.loads(self.request)
        for name, value in was.items():
            if now[name] != value:
                raise JournalConflict(f"{what}: got {name} {now[name]}, expected {value} as it was submitted with")


def encode_groups(run_id: str, request: RolloutRequest, handle_id: str) -> list[NewGroup]:
    """The groups of a request as rows.

    Raises:
        InvalidRequest: Ids or metadata that cannot be kept, or a seed that cannot be derived.
    """
    plain_text("run_id", run_id)
    plain_text("handle_id", handle_id)
    if abs(request.priority) > MAX_PRIORITY:
        raise InvalidRequest("priority", request.priority, f"an integer within ±{MAX_PRIORITY}")
    shared = encode_request(request.sampling, request.n_samples_per_prompt, request.reward, request.run_seed)
    groups = []
    for group_id, prompt in zip(request.group_ids, request.prompts, strict=True):
        plain_text("group id", group_id)
        try:
            trajectory_seed(request.run_seed, group_id, request.n_samples_per_prompt - 1)
        except ValueError as error:
            raise InvalidRequest("run_seed / group_ids", (request.run_seed, group_id), str(error)) from None
        tokens, text = tokens_to_bytes(f"prompt {prompt.prompt_id} token_ids", prompt.token_ids), encode_prompt(prompt)
        prompt_digest = digest_of(tokens, text)
        groups.append(
            NewGroup(
                group_id=group_id,
                prompt_tokens=tokens,
                prompt=text,
                prompt_digest=prompt_digest,
                request=shared,
                digest=digest_of(run_id, group_id, prompt_digest, shared),
            )
        )
    return groups
