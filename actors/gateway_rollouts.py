"""The rollout API over HTTP: submissions, their results, leases, acknowledgements, replays.

A submission's handle names the key it was made with, so that whose it is needs no table: others are told that there is
no such thing. So are runs: a trainer's runs are its own, and an operator names any run as it is kept. Owns nothing.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from fastapi.responses import Response, StreamingResponse

from actors.gateway_backend import Backend
from actors.gateway_http import ApiError, Gatekeeper, api_error
from actors.gateway_tokenizer import Tokenizer
from rollout.api import (
    Acknowledgement,
    GroupIds,
    Lease,
    Release,
    Replay,
    RolloutPrompt,
    RolloutSubmission,
)
from rollout.api_answers import ERRORS, Acknowledged, Progressed, Released, Replayed, Submitted
from rollout.errors import InvalidRequest, LongrollError, UnknownHandle
from rollout.gateway.authorization import Caller
from rollout.gateway.keys import Role
from rollout.gateway.records import first_difference, group_line
from rollout.gateway_config import GatewayConfig
from rollout.handles import Delivery
from rollout.journal.records import RestoredGroup
from rollout.requests import build_request
from rollout.types import Group, Prompt, RolloutRequest, Trajectory

NDJSON = "application/x-ndjson"
MAX_GROUPS_PER_CALL = 64
HANDLE = r"[0-9a-z]{1,16}-[0-9a-f]{32}|[0-9a-f]{32}"
HandleId = Annotated[str, Path(pattern=f"^({HANDLE})$")]
NDJSON_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "One group a line", "content": {NDJSON: {"schema": {"type": "string"}}}}
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutParts:
    """What the routes are made of."""

    backend: Backend
    tokenizer: Tokenizer
    config: GatewayConfig
    gatekeeper: Gatekeeper


class RolloutRoutes:
    """See the module."""

    def __init__(self, parts: RolloutParts) -> None:
        self._parts, self._backend = parts, parts.backend

    def router(self) -> APIRouter:
        """The routes. Those of runs come before those of handles, whose names they must not be taken for."""
        routes = APIRouter(prefix="/v1/rollouts", tags=["rollouts"], responses=ERRORS)
        self._add_run_routes(routes)
        self._add_handle_routes(routes)
        return routes

    def _add_run_routes(self, routes: APIRouter) -> None:
        trainer = self._parts.gatekeeper.allow(Role.TRAINER)

        @routes.post("", response_model=Submitted, status_code=202, summary="Ask for n samples of each prompt")
        async def submit(body: RolloutSubmission, caller: Caller = trainer) -> Any:
            return await self._submit(body, caller)

        @routes.post("/lease", response_model=None, responses=NDJSON_ANSWER, summary="Finished groups, for a while")
        async def lease(body: Lease, caller: Caller = trainer) -> Response:
            run_id = _run_id(body.run_id, caller)
            groups = await self._backend.call("lease", run_id, body.consumer, body.max_groups, body.lease_s)
            return Response(b"".join(group_line(group) for group in groups), media_type=NDJSON)

        @routes.post("/release", response_model=Released, summary="End a consumer's leases")
        async def release(body: Release, caller: Caller = trainer) -> Any:
            run_id = _run_id(body.run_id, caller)
            return {"num_released": await self._backend.call("release", run_id, body.consumer)}

        @routes.post("/acknowledge", response_model=Acknowledged, summary="A checkpoint has learned from groups")
        async def acknowledge(body: Acknowledgement, caller: Caller = trainer) -> Any:
            run_id = _run_id(body.run_id, caller)
            group_ids = tuple(body.group_ids)
            num = await self._backend.call("acknowledge_groups", run_id, group_ids, body.checkpoint)
            return {"num_acknowledged": num}

        @routes.post("/replay", response_model=Replayed, summary="Generate a recorded group again, and compare")
        async def replay(body: Replay, caller: Caller = trainer) -> Any:
            return await self._replay(_run_id(body.run_id, caller), body.group_id)

    def _add_handle_routes(self, routes: APIRouter) -> None:
        trainer = self._parts.gatekeeper.allow(Role.TRAINER)

        @routes.get("/{handle_id}", response_model=Progressed, summary="How far a submission is")
        async def progress(handle_id: HandleId, caller: Caller = trainer) -> Any:
            _check_owner(handle_id, caller)
            found = await self._backend.call("progress", handle_id)
            names = ("num_pending", "num_finished", "num_groups_finished", "num_groups", "num_tokens")
            return {"id": handle_id} | {name: getattr(found, name) for name in names}

        @routes.get("/{handle_id}/results", response_model=None, responses=NDJSON_ANSWER, summary="Groups as they end")
        async def results(
            handle_id: HandleId,
            caller: Caller = trainer,
            timeout_s: Annotated[float, Query(gt=0, le=3600)] = 600.0,
        ) -> Response:
            _check_owner(handle_id, caller)
            lines = self._results(handle_id, timeout_s)
            first = await anext(lines, b"")  # an unknown handle is told by the status
            return StreamingResponse(_with(first, lines), media_type=NDJSON, headers={"Cache-Control": "no-store"})

        @routes.post("/{handle_id}/acknowledge", response_model=Acknowledged, summary="The client has groups")
        async def acknowledge_handle(handle_id: HandleId, body: GroupIds, caller: Caller = trainer) -> Any:
            _check_owner(handle_id, caller)
            await self._backend.call("acknowledge", handle_id, tuple(body.group_ids))
            return {"num_acknowledged": len(set(body.group_ids))}

        @routes.delete("/{handle_id}", response_model=None, status_code=204, summary="Give up what is unfinished")
        async def abort(handle_id: HandleId, caller: Caller = trainer) -> Response:
            _check_owner(handle_id, caller)
            await self._backend.call("abort", handle_id)
            return Response(status_code=204)

    async def _submit(self, body: RolloutSubmission, caller: Caller) -> dict[str, Any]:
        if body.reward not in self._parts.config.rewards:
            raise InvalidRequest("reward", body.reward, f"one of {', '.join(self._parts.config.rewards)}")
        prompts = [
            Prompt(
                token_ids=tuple(await self._token_ids(prompt)),
                prompt_id=prompt.prompt_id or f"prompt{place}",
                metadata=prompt.metadata,
            )
            for place, prompt in enumerate(body.prompts)
        ]
        handle_id = f"{caller.key.key_id}-{uuid.uuid4().hex}"
        request = build_request(
            prompts,
            body.n_samples_per_prompt,
            body.sampling.params(),
            body.run_seed,
            body.group_ids or [f"{place:06d}" for place in range(len(prompts))],
            body.reward,
            body.priority,
            None if body.run_id is None else _run_id(body.run_id, caller),
            limits=await self._backend.limits(),
            submission=0,
        )
        await self._backend.call("submit", request, f"http-{caller.key.key_id}", handle_id)
        return {"id": handle_id, "group_ids": list(request.group_ids), "num_groups": len(prompts)}

    async def _token_ids(self, prompt: RolloutPrompt) -> Sequence[int]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        tokenizer = self._parts.tokenizer
        if prompt.text is not None:
            return await asyncio.to_thread(tokenizer.encode, prompt.text, True)
        messages = [{"role": message.role, "content": message.text} for message in prompt.messages or ()]
        return await asyncio.to_thread(tokenizer.chat, messages)

    async def _results(self, handle_id: str, timeout_s: float) -> AsyncIterator[bytes]:
        """Groups that have not been acknowledged, each once; ends with the last one, or when the time is over."""
        loop = asyncio.get_running_loop()
        deadline, sent = loop.time() + timeout_s, frozenset[str]()
        while True:
            remaining_s = max(0.0, deadline - loop.time())
            delivery: Delivery = await self._backend.call(
                "next_groups", handle_id, MAX_GROUPS_PER_CALL, remaining_s, (), sent
            )
            for group in delivery.groups:
                yield group_line(group)
            sent |= {group.group_id for group in delivery.groups}
            if delivery.is_done or (not delivery.groups and loop.time() >= deadline):
                return

    async def _replay(self, run_id: str, group_id: str) -> dict[str, Any]:
        stored: RestoredGroup = await self._backend.call("stored_group", run_id, group_id)
        recorded = stored.to_group()
        live: int = await self._backend.call("live_version")
        versions = {span.version for trajectory in recorded.trajectories for span in trajectory.weight_versions}
        if not stored.is_finished or versions - {live}:
            had = f"versions {sorted(versions)}" if stored.is_finished else "an unfinished group"
            message = (
                f"group {group_id}: got {had}, expected version {live}, which is live; see python -m launch.replay"
            )
            raise ApiError(409, message, code="other_version")
        request = RolloutRequest(
            prompts=(stored.prompt,),
            n_samples_per_prompt=len(stored.trajectories),
            sampling=stored.sampling,
            run_seed=stored.run_seed,
            group_ids=(group_id,),
        )
        again = await self._generate(request)
        pairs = zip(recorded.trajectories, again.trajectories, strict=True)
        verdicts = [_verdict(one, other) for one, other in pairs]
        return {"version": live, "is_same": all(v["first_difference"] is None for v in verdicts), "samples": verdicts}

    async def _generate(self, request: RolloutRequest) -> Group:
        handle_id = uuid.uuid4().hex
        await self._backend.call("submit", request, self._backend.client_id, handle_id)
        try:
            while True:
                delivery: Delivery = await self._backend.call("next_groups", handle_id, 1, 60.0)
                if delivery.groups:
                    await self._backend.call("acknowledge", handle_id, request.group_ids)
                    return delivery.groups[0]
        except asyncio.CancelledError:
            await asyncio.shield(self._backend.call("abort", handle_id))
            raise


def _verdict(recorded: Trajectory, again: Trajectory) -> dict[str, Any]:
    return {
        "sample_index": recorded.sample_index,
        "num_tokens": len(recorded.token_ids),
        "first_difference": first_difference(recorded.token_ids, again.token_ids),
    }


def _run_id(given: str, caller: Caller) -> str:
    """A run as it is kept: a trainer's under its key, so that no other key's can be named."""
    return given if caller.key.role is Role.OPERATOR else f"{caller.key.key_id}/{given}"


def _check_owner(handle_id: str, caller: Caller) -> None:
    """Raise UnknownHandle for another caller's submission, as for one that never was."""
    owner, dash, _ = handle_id.partition("-")
    if not caller.owns(owner if dash else ""):
        raise UnknownHandle(handle_id)


async def _with(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """All lines; an error after the first one is the last line."""
    if first:
        yield first
    try:
        async for line in rest:
            yield line
    except LongrollError as error:
        yield api_error(error).to_json() + b"\n"
