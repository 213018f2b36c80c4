"""What clients may send over HTTP: the requests of the OpenAI-compatible API and of the rollout API.

Every field is checked here as far as that needs no model; what a client of the OpenAI API may send and the service
does not do is refused unless it has the value that changes nothing, never ignored. Answers are in
`rollout.api_answers`. Knows nothing of how requests are served.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, field_validator, model_validator

from rollout.types import MAX_TEMPERATURE, SamplingParams

MAX_INT = 2**31 - 1
MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_NAME = 512
MAX_STOP_CHARACTERS = 1024

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "length_penalty": (None, 1),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
    "use_beam_search": (None, False),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "audio": (None,),
    "web_search_options": (None,),
    "store": (None, False),
    "reasoning_effort": (None,),
    "service_tier": (None, "auto", "default"),
}
"""Fields that change nothing with one of these values, and are refused with any other."""

Count = Annotated[int, Field(ge=0, le=MAX_INT)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
TokenIds = list[StrictInt]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class ApiModel(BaseModel):
    """A request body: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(ApiModel):
    """Of a streamed answer."""

    include_usage: StrictBool = False
    continuous_usage_stats: Literal[False] = False


class Sampled(ApiModel):
    """What completions of both kinds have in common."""

    model: Name | None = None
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = 1
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: Literal[False] = False
    seed: Seed | None = None
    ignore_eos: StrictBool = False
    skip_special_tokens: StrictBool = True
    return_token_ids: StrictBool | None = False
    user: str | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        rest = dict(values)
        for name, allowed in NEUTRAL.items():
            if name not in rest or name in cls.model_fields:
                continue
            value = rest.pop(name)
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
                raise ValueError(f"{name} is not supported (only {', '.join(map(repr, allowed))})")
        return rest

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
            raise ValueError(f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters")
        return value

    @field_validator("stop_token_ids")
    @classmethod
    def _check_stop_token_ids(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and (len(value) > MAX_N or any(not 0 <= token <= MAX_INT for token in value)):
            raise ValueError(f"at most {MAX_N} token ids ≥ 0")
        return value

    @model_validator(mode="after")
    def _check_stream_options(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream = true")
        return self

    @property
    def num_choices(self) -> int:
        """Choices for each prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a choice."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def has_usage_event(self) -> bool:
        """Whether a stream ends with an event that tells the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int) -> SamplingParams:
        """How its tokens are drawn. Raises InvalidRequest."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k if self.top_k is not None and self.top_k > 0 else None,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
        )


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: StrictStr | TokenIds | list[StrictStr] | list[TokenIds]
    max_tokens: Count | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: StrictBool | None = False
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    add_special_tokens: StrictBool = True

    @model_validator(mode="after")
    def _check_together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.num_choices:
            raise ValueError("best_of is not supported unless it is n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens = 0 needs echo = true")
        if not self.prompt:
            raise ValueError("prompt is empty")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(ApiModel):
    """A part of a message; only text."""

    type: Literal["text"]
    text: StrictStr


class Message(ApiModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """All text of it."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    logprobs: StrictBool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: StrictBool = True
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer; None: what fits."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class RolloutSampling(ApiModel):
    """How the tokens of rollouts are drawn."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] = 512
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] = 1.0
    top_k: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop_token_ids: list[Annotated[int, Field(ge=0, le=MAX_INT)]] = []
    ignore_eos: StrictBool = False

    def params(self) -> SamplingParams:
        """As the service knows it. Raises InvalidRequest."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
        )


class RolloutPrompt(ApiModel):
    """A prompt with whatever its reward needs."""

    token_ids: TokenIds | None = None
    text: StrictStr | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)] | None = None
    prompt_id: Name | None = None
    metadata: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check_one(self) -> RolloutPrompt:
        if sum(value is not None for value in (self.token_ids, self.text, self.messages)) != 1:
            raise ValueError("exactly one of token_ids, text and messages")
        return self


class RolloutSubmission(ApiModel):
    """POST /v1/rollouts: n samples of each prompt."""

    prompts: Annotated[list[RolloutPrompt], Field(min_length=1, max_length=100_000)]
    n_samples_per_prompt: Annotated[int, Field(ge=1, le=10_000)] = 1
    sampling: RolloutSampling = RolloutSampling()
    run_seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    group_ids: list[Name] | None = None
    reward: Name = "none"
    priority: Annotated[int, Field(ge=0, le=1000)] = 0
    run_id: Name | None = None


class GroupIds(ApiModel):
    """POST /v1/rollouts/{id}/acknowledge: groups that the client has."""

    group_ids: Annotated[list[Name], Field(max_length=100_000)]


class Lease(ApiModel):
    """POST /v1/rollouts/lease: finished groups of a run, for a while."""

    run_id: Name
    consumer: Name
    max_groups: Annotated[int, Field(ge=1, le=10_000)] = 1
    lease_s: Annotated[float, Field(gt=0, le=7 * 86_400)] = 600.0


class Release(ApiModel):
    """POST /v1/rollouts/release: all that a consumer has leased."""

    run_id: Name
    consumer: Name


class Acknowledgement(ApiModel):
    """POST /v1/rollouts/acknowledge: a checkpoint has learned from groups."""

    run_id: Name
    group_ids: Annotated[list[Name], Field(max_length=100_000)]
    checkpoint: Name


class Replay(ApiModel):
    """POST /v1/rollouts/replay: generate a recorded group again, and compare."""

    run_id: Name
    group_id: Name


class Rollback(ApiModel):
    """POST /v1/weights/rollback: serve the weights of a model directory as a new version."""

    directory: Name
