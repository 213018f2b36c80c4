"""The gateway's routes for whoever runs the service: health, figures, weights.

Owns the rollback that is under way, one at a time. What a publication does is the service's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from actors.gateway_backend import Backend
from actors.gateway_http import ApiError, Gatekeeper
from actors.gateway_metrics import GatewayMetrics
from rollout.api import Rollback
from rollout.api_answers import ERRORS, HealthAnswer, Publication, Weights
from rollout.errors import InvalidRequest, LongrollError
from rollout.fleet import ServiceStats
from rollout.gateway.authorization import Caller
from rollout.gateway.keys import Role
from rollout.gateway.records import report_json
from rollout.sync.encoding import TensorPlan
from rollout.sync.manifest import torch_dtype
from rollout.weights_state import WeightsState

ANSWER_TIMEOUT_S = 10.0  # of whoever asks how the service is
RETRY_LATER = {"Retry-After": "5"}
TEXT = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationParts:
    """What the routes are made of.

    Attributes:
        weights_root: Directory below which rollbacks find weights.
        can_publish: Whether this process can publish weights: only through memory that it shares with the shards.
    """

    backend: Backend
    gatekeeper: Gatekeeper
    metrics: GatewayMetrics
    is_draining: Callable[[], bool]
    weights_root: Path
    can_publish: bool
    bucket_bytes: int


class OperationRoutes:
    """See the module."""

    def __init__(self, parts: OperationParts) -> None:
        self._parts, self._backend = parts, parts.backend
        self._publishing = asyncio.Lock()

    def router(self) -> APIRouter:
        """The routes."""
        operator = self._parts.gatekeeper.allow(Role.OPERATOR)
        trainer = self._parts.gatekeeper.allow(Role.TRAINER)
        routes = APIRouter(tags=["operations"])

        @routes.get("/health", responses={200: {"model": HealthAnswer}, 503: {"model": HealthAnswer}})
        async def health() -> Response:
            return await self._health()

        @routes.get("/metrics", responses=ERRORS | {200: {"content": {"text/plain": {}}}})
        async def metrics(caller: Caller = operator) -> Response:
            stats: ServiceStats | None = await self._ask("stats")
            return Response(self._parts.metrics.render(stats, self._backend.num_open), media_type=TEXT)

        @routes.get("/v1/weights", response_model=Weights, responses=ERRORS, tags=["weights"])
        async def weights(caller: Caller = trainer) -> Any:
            return await self._weights()

        @routes.post("/v1/weights/rollback", response_model=Publication, responses=ERRORS, tags=["weights"])
        async def rollback(body: Rollback, caller: Caller = operator) -> Any:
            return await self._rollback(body.directory)

        return routes

    async def _health(self) -> Response:
        if self._parts.is_draining():
            return JSONResponse({"status": "draining"}, 503, RETRY_LATER)
        version: int | None = await self._ask("live_version")
        if version is None:
            return JSONResponse({"status": "unavailable"}, 503, RETRY_LATER)
        return JSONResponse({"status": "ok", "live_version": version})

    async def _ask(self, method: str) -> Any:
        """What the service says, or None if it does not answer in time."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await self._backend.call(method)
        except (LongrollError, TimeoutError):
            return None

    async def _weights(self) -> dict[str, Any]:
        state: WeightsState = await self._backend.call("weights")
        stats: ServiceStats = await self._backend.call("stats")
        return {
            "live_version": state.live_version,
            "state": state.state,
            "num_published": state.num_published,
            "num_refused": state.num_refused,
            "shard_versions": {str(shard.rank): shard.version for shard in stats.shards},
            "recent": [report_json(report) for report in state.recent],
        }

    async def _rollback(self, directory: str) -> dict[str, Any]:
        if not self._parts.can_publish:
            message = "weights travel by another way than this host's memory: publish from the trainer"
            raise ApiError(501, message, "server_error", "not_implemented")
        if self._publishing.locked():
            raise ApiError(409, "a rollback is under way", code="conflict")
        async with self._publishing:
            folder = _below(self._parts.weights_root, directory)
            weights = await asyncio.to_thread(_load, folder, await self._backend.call("served_plans"))
            live: int = await self._backend.call("live_version")
            client = self._backend.publisher(self._parts.bucket_bytes)
            return report_json(await client.publish(live + 1, weights))


def _below(root: Path, directory: str) -> Path:
    """A directory of weights below `root`; links and dots are followed first. Raises InvalidRequest for any other."""
    expected = "a model directory below gateway.weights_root"
    if "\0" in directory:
        raise InvalidRequest("directory", "a name with NUL", expected)
    try:
        folder = (root / directory).resolve()
        is_fit = folder.is_relative_to(root.resolve()) and any(folder.glob("*.safetensors"))
    except OSError:
        is_fit = False
    if not is_fit:
        raise InvalidRequest("directory", directory, expected)
    return folder


def _load(folder: Path, plans: Mapping[str, TensorPlan]) -> dict[str, Any]:
    """All tensors of a directory, in the dtypes in which they are published."""
    from safetensors.torch import load_file

    weights = {
        name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    return {
        name: tensor.to(torch_dtype(plans[name].dtype)) if name in plans else tensor for name, tensor in weights.items()
    }
