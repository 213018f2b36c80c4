"""The OpenAI-compatible routes: models, completions, chat.

Owns the way from a request's body to what is wanted of the service, and back to a response. Knows nothing of how
tokens come about.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response, StreamingResponse

from actors.gateway_backend import Backend
from actors.gateway_completions import Completion, Wanted
from actors.gateway_http import ApiError, Gatekeeper
from actors.gateway_metrics import GatewayMetrics
from actors.gateway_tokenizer import Tokenizer
from rollout.api import ChatRequest, CompletionRequest, Sampled
from rollout.api_answers import ERRORS, ChatCompletion, ModelCard, ModelList, TextCompletion
from rollout.errors import InvalidRequest
from rollout.gateway.authorization import Caller
from rollout.gateway.formats import ChatFormat, Format, TextFormat
from rollout.gateway.idempotency import Answer, Claim, IdempotencyStore
from rollout.gateway.keys import Role
from rollout.gateway.sampling import run_seed_of
from rollout.gateway_config import GatewayConfig
from rollout.types import ModelLimits, Prompt, SamplingParams

LONG_TEXT = 20_000  # characters; longer texts are tokenized in a thread, so that others do not wait
JSON, EVENTS = "application/json", "text/event-stream; charset=utf-8"
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAiParts:
    """What the routes are made of."""

    backend: Backend
    tokenizer: Tokenizer
    config: GatewayConfig
    gatekeeper: Gatekeeper
    metrics: GatewayMetrics
    answers: IdempotencyStore
    model_name: str
    created: int
    is_draining: Callable[[], bool]


class OpenAiRoutes:
    """See the module."""

    def __init__(self, parts: OpenAiParts) -> None:
        self._parts = parts

    def router(self) -> APIRouter:
        """The routes."""
        client = self._parts.gatekeeper.allow(Role.CLIENT)
        routes = APIRouter(prefix="/v1", tags=["openai"], responses=ERRORS)

        @routes.get("/models", response_model=ModelList, summary="The model that is served")
        async def models(caller: Caller = client) -> Any:
            return {"object": "list", "data": [self._model(await self._parts.backend.limits())]}

        @routes.get("/models/{name:path}", response_model=ModelCard, summary="The model that is served, by name")
        async def model(name: str, caller: Caller = client) -> Any:
            self._check_model(name)
            return self._model(await self._parts.backend.limits())

        @routes.post("/completions", response_model=None, responses={200: {"model": TextCompletion}})
        async def completions(
            body: CompletionRequest,
            request: Request,
            caller: Caller = client,
            idempotency_key: IdempotencyKey = None,
        ) -> Response:
            return await self._once(request, caller, idempotency_key, lambda: self._text(body, caller, idempotency_key))

        @routes.post("/chat/completions", response_model=None, responses={200: {"model": ChatCompletion}})
        async def chat(
            body: ChatRequest,
            request: Request,
            caller: Caller = client,
            idempotency_key: IdempotencyKey = None,
        ) -> Response:
            return await self._once(request, caller, idempotency_key, lambda: self._chat(body, caller, idempotency_key))

        return routes

    def _model(self, limits: ModelLimits) -> dict[str, Any]:
        return {
            "id": self._parts.model_name,
            "object": "model",
            "created": self._parts.created,
            "owned_by": "longroll",
            "max_model_len": limits.max_model_len,
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._parts.model_name:
            message = f"model: got a name that is not served here, expected {self._parts.model_name}"
            raise ApiError(404, message, code="model_not_found", param="model")

    async def _text(self, body: CompletionRequest, caller: Caller, idempotency_key: str | None) -> Response:
        self._check_model(body.model)
        self._check_size(len(body.prompts) * body.num_choices)
        if body.echo and body.stream and body.logprobs is not None:
            raise InvalidRequest("echo", "with logprobs in a stream", "one without the other, or stream = false")
        prompts = [await self._token_ids(prompt, body.add_special_tokens) for prompt in body.prompts]
        sampling = body.sampling(16 if body.max_tokens is None else max(1, body.max_tokens))
        await self._check(prompts, sampling)
        decode = self._parts.tokenizer.decode
        texts = [p if isinstance(p, str) else decode(p, False) for p in body.prompts] if body.echo else []
        wanted = Wanted(
            prompts=prompts,
            prompt_texts=texts,
            num_choices=body.num_choices,
            sampling=sampling,
            run_seed=run_seed_of(body.seed, caller.key.key_id, idempotency_key),
            stops=body.stops,
            skip_special_tokens=body.skip_special_tokens,
            has_logprobs=body.logprobs is not None,
            num_top_logprobs=body.logprobs or 0,
            is_streamed=bool(body.stream),
            has_usage_event=body.has_usage_event,
            is_prompt_only=body.max_tokens == 0,
        )
        return await self._answer(wanted, TextFormat, "cmpl", body, caller)

    async def _chat(self, body: ChatRequest, caller: Caller, idempotency_key: str | None) -> Response:
        self._check_model(body.model)
        self._check_size(body.num_choices)
        messages = [{"role": message.role, "content": message.text} for message in body.messages]
        prompt = self._parts.tokenizer.chat(messages, body.add_generation_prompt, body.chat_template_kwargs)
        limits = await self._parts.backend.limits()
        room = limits.max_model_len - len(prompt)
        if room < 1:
            raise InvalidRequest("messages", f"{len(prompt)} tokens", f"fewer than {limits.max_model_len}")
        sampling = body.sampling(room if body.limit is None else body.limit)
        await self._check([prompt], sampling)
        wanted = Wanted(
            prompts=[prompt],
            num_choices=body.num_choices,
            sampling=sampling,
            run_seed=run_seed_of(body.seed, caller.key.key_id, idempotency_key),
            stops=body.stops,
            skip_special_tokens=body.skip_special_tokens,
            has_logprobs=bool(body.logprobs),
            num_top_logprobs=body.top_logprobs or 0,
            is_streamed=bool(body.stream),
            has_usage_event=body.has_usage_event,
        )
        return await self._answer(wanted, ChatFormat, "chatcmpl", body, caller)

    def _check_size(self, num_choices: int) -> None:
        most = self._parts.config.max_choices_per_request
        if num_choices > most:
            raise InvalidRequest("prompt, n", f"{num_choices} choices", f"at most {most} in a request")

    async def _token_ids(self, prompt: str | list[int], add_special_tokens: bool) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        encode = self._parts.tokenizer.encode
        if len(prompt) > LONG_TEXT:
            return await asyncio.to_thread(encode, prompt, add_special_tokens)
        return encode(prompt, add_special_tokens)

    async def _check(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> None:
        """Raise InvalidRequest unless every prompt and its output fit the model, ApiError while the gateway drains."""
        if self._parts.is_draining():
            raise ApiError(503, "the service is shutting down", "server_error", "draining", None, 5.0)
        limits = await self._parts.backend.limits()
        for number, prompt in enumerate(prompts):
            limits.check(Prompt(token_ids=tuple(prompt), prompt_id=str(number)), sampling)

    async def _answer(self, wanted: Wanted, kind: type[Format], prefix: str, body: Sampled, caller: Caller) -> Response:
        parts = self._parts
        form = kind(
            answer_id=f"{prefix}-{caller.request_id}",
            created=int(time.time()),
            model=parts.model_name,
            has_token_ids=bool(body.return_token_ids),
            has_null_usage=wanted.has_usage_event,
            token_text=parts.tokenizer.token_text,
        )
        priority, max_wait_s = parts.config.interactive_priority, parts.config.max_wait_s
        completion = Completion(parts.backend, parts.tokenizer, wanted, form, priority, max_wait_s)
        began = time.monotonic()
        completion.begin()
        if not wanted.is_streamed:
            try:
                return Response(await completion.body(), media_type=JSON)
            finally:
                self._count(completion, began)
        events = completion.events()
        try:
            first = await anext(events)  # its status line tells whether it was admitted
            parts.backend.note_first_token(time.monotonic() - began)
        except BaseException:
            completion.end()
            raise

        async def all_events() -> AsyncIterator[bytes]:
            try:
                yield first
                async for event in events:
                    yield event
            finally:
                await events.aclose()  # type: ignore[attr-defined]
                self._count(completion, began)

        return StreamingResponse(all_events(), headers={"Cache-Control": "no-store"}, media_type=EVENTS)

    def _count(self, completion: Completion, began: float) -> None:
        usage, first = completion.usage, completion.first_token_at
        ttft_s = None if first is None else first - began
        self._parts.metrics.on_completion(usage.num_prompt_tokens, usage.num_completion_tokens, ttft_s)

    async def _once(
        self, request: Request, caller: Caller, key: str | None, answer: Callable[[], Awaitable[Response]]
    ) -> Response:
        """Answer, or give the answer again that the same request under the same Idempotency-Key got."""
        if key is None:
            return await until_disconnect(request, answer())
        body = await request.body()
        digest = hashlib.sha256(request.url.path.encode() + b"\0" + body).digest()
        claim = await self._parts.answers.claim(caller.key.key_id, key, digest)
        if isinstance(claim, Answer):
            return Response(claim.body, claim.status, {"Idempotency-Replayed": "true"}, claim.media_type)
        try:
            response = await until_disconnect(request, answer())
        except BaseException:
            claim.drop()
            raise
        return _kept(response, claim)


def _kept(response: Response, claim: Claim) -> Response:
    """The response, which is kept once all of it was sent."""
    if not isinstance(response, StreamingResponse):
        claim.keep(
            Answer(status=response.status_code, media_type=response.media_type or JSON, body=bytes(response.body))
        )
        return response
    pieces: list[bytes] = []
    source = response.body_iterator

    async def recorded() -> AsyncIterator[bytes]:
        is_whole = False
        try:
            async for piece in source:
                assert isinstance(piece, bytes), "events are bytes"
                pieces.append(piece)
                yield piece
            is_whole = b'data: {"error"' not in pieces[-1]
        finally:
            await source.aclose()  # type: ignore[attr-defined]
            if is_whole:
                claim.keep(Answer(status=200, media_type=EVENTS, body=b"".join(pieces)))
            else:
                claim.drop()

    response.body_iterator = recorded()
    return response


async def until_disconnect(request: Request, answer: Awaitable[Response]) -> Response:
    """Await an answer, and cancel it if its client goes away; its body must have been read."""
    working = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            raise ApiError(499, "the client went away", code="client_closed_request")
        return working.result()
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
