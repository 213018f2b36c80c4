"""What the HTTP APIs answer, for the OpenAPI document and for tests that hold answers against it.

Answers are written as JSON where they are made; these models say what that JSON is. Knows nothing of how it is made.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class AnswerModel(BaseModel):
    """Part of an answer."""

    model_config = ConfigDict(extra="forbid")


class ErrorObject(AnswerModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(AnswerModel):
    """Any answer with a status of 400 or more."""

    error: ErrorObject


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in {
        400: "The request cannot be served as it is",
        401: "No valid API key",
        403: "The key's role does not allow it",
        404: "No such thing, or somebody else's",
        409: "It contradicts what was asked for before",
        413: "The request body is too large",
        429: "Too much at once; see Retry-After",
        503: "Not now; see Retry-After",
    }.items()
}


class ModelCard(AnswerModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(AnswerModel):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class PromptTokensDetails(AnswerModel):
    cached_tokens: int


class UsageAnswer(AnswerModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TextLogprobs(AnswerModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(AnswerModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class TextCompletion(AnswerModel):
    """POST /v1/completions, whole or one event."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageAnswer | None = None


class ChatToken(AnswerModel):
    token: str
    logprob: float | None
    bytes: list[int] | None


class ChatTokenWithTop(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(AnswerModel):
    content: list[ChatTokenWithTop]
    refusal: None


class ChatMessage(AnswerModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(AnswerModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletion(AnswerModel):
    """POST /v1/chat/completions, whole."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer
    prompt_token_ids: list[int] | None = None


class ChatDelta(AnswerModel):
    role: Literal["assistant"] | None = None
    content: str


class ChatChunkChoice(AnswerModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(AnswerModel):
    """POST /v1/chat/completions, one event."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageAnswer | None = None
    prompt_token_ids: list[int] | None = None


class Submitted(AnswerModel):
    """POST /v1/rollouts."""

    id: str
    group_ids: list[str]
    num_groups: int


class Progressed(AnswerModel):
    """GET /v1/rollouts/{id}."""

    id: str
    num_pending: int
    num_finished: int
    num_groups_finished: int
    num_groups: int
    num_tokens: int


class Acknowledged(AnswerModel):
    num_acknowledged: int


class Released(AnswerModel):
    num_released: int


class ReplayedSample(AnswerModel):
    sample_index: int
    num_tokens: int
    first_difference: int | None


class Replayed(AnswerModel):
    """POST /v1/rollouts/replay."""

    version: int
    is_same: bool
    samples: list[ReplayedSample]


class Publication(AnswerModel):
    """A publication that succeeded; see rollout.fleet.SyncReport."""

    version: int
    num_tensors: int
    num_bytes: int
    num_bytes_full: int
    num_rows_changed: int
    stage_s: float
    flip_s: float
    stall_s: float
    ranks_lost: list[int]


class Weights(AnswerModel):
    """GET /v1/weights."""

    live_version: int
    state: Literal["idle", "staging", "flipping", "broken"]
    num_published: int
    num_refused: int
    shard_versions: dict[str, int]
    recent: list[Publication]


class HealthAnswer(AnswerModel):
    """GET /health."""

    status: Literal["ok", "draining", "unavailable"]
    live_version: int | None = None
