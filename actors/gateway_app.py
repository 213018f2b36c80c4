"""The gateway's FastAPI application: all routes behind one edge.

Owns nothing but their being put together. Knows nothing of processes or sockets.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from actors import dashboard
from actors.gateway_backend import Backend
from actors.gateway_http import Edge, Gatekeeper, add_error_handlers
from actors.gateway_metrics import GatewayMetrics
from actors.gateway_openai import OpenAiParts, OpenAiRoutes
from actors.gateway_operations import OperationParts, OperationRoutes
from actors.gateway_rollouts import RolloutParts, RolloutRoutes
from actors.gateway_tokenizer import Tokenizer
from rollout.config import ModelConfig, SyncConfig
from rollout.feed import FeedQuery
from rollout.gateway.idempotency import IdempotencyStore
from rollout.gateway.keys import KeyFile, Role
from rollout.gateway.limits import RateLimiter
from rollout.gateway_config import GatewayConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """What a gateway is told.

    Attributes:
        gateway, model, sync: Sections of the configuration.
        model_name: That clients give.
        keys_file: Hashes of the API keys.
        namespace: Of the service in Ray.
        application: Name in Ray Serve; two gateways of one cluster need two.
    """

    gateway: GatewayConfig
    model: ModelConfig
    sync: SyncConfig
    model_name: str
    keys_file: str
    namespace: str
    application: str = "longroll-gateway"


class GatewayApp:
    """The application and what it is made of.

    Args:
        options: What it is told.
        backend: The service.
        tokenizer: The model's.
    """

    def __init__(self, options: GatewayOptions, backend: Backend, tokenizer: Tokenizer) -> None:
        config = options.gateway
        self._backend, self._tokenizer, self._options = backend, tokenizer, options
        self._metrics = GatewayMetrics()
        limiter = RateLimiter(config.requests_per_s, config.burst_requests)
        self._gatekeeper = Gatekeeper(KeyFile(Path(options.keys_file)), limiter)
        self.is_draining = False
        self._api = FastAPI(title="Longroll", version="1", docs_url=None, redoc_url=None)
        add_error_handlers(self._api)
        self._add_routes()
        self.asgi = Edge(self._api, self._gatekeeper, config.max_body_bytes, self._metrics.on_request)

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        return self._api.openapi()

    def _add_routes(self) -> None:
        config, sync = self._options.gateway, self._options.sync
        openai = OpenAiParts(
            backend=self._backend,
            tokenizer=self._tokenizer,
            config=config,
            gatekeeper=self._gatekeeper,
            metrics=self._metrics,
            answers=IdempotencyStore(config.idempotency_ttl_s, config.idempotency_bytes),
            model_name=self._options.model_name,
            created=int(time.time()),
            is_draining=lambda: self.is_draining,
        )
        rollouts = RolloutParts(
            backend=self._backend, tokenizer=self._tokenizer, config=config, gatekeeper=self._gatekeeper
        )
        operations = OperationParts(
            backend=self._backend,
            gatekeeper=self._gatekeeper,
            metrics=self._metrics,
            is_draining=lambda: self.is_draining,
            weights_root=Path(config.weights_root or self._options.model.path),
            can_publish=sync.transport == "shared_memory",
            bucket_bytes=sync.bucket_bytes,
        )
        self._api.include_router(OpenAiRoutes(openai).router())
        self._api.include_router(RolloutRoutes(rollouts).router())
        self._api.include_router(OperationRoutes(operations).router())

        async def find_feed(query: FeedQuery) -> Any:
            return await self._backend.call("feed", query)

        operator = self._gatekeeper.allow(Role.OPERATOR)
        self._api.include_router(dashboard.router(find_feed, feed_dependencies=[operator]))
