"""The gateway as a Ray Serve deployment: replicas that listen on one port themselves.

Serve starts replicas, looks after them and scales them; requests do not go through its proxies, since there each piece
of a stream is a message between two processes more, which on small steps costs as much as the engine. Replicas of one
node share the port (SO_REUSEPORT).

Owns the socket, the HTTP server and their end. What is served is `actors.gateway_app`'s.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from functools import partial
from typing import Any

import ray
import uvicorn
from ray import serve

from actors.gateway_app import GatewayApp, GatewayOptions
from actors.gateway_backend import Backend
from actors.gateway_tokenizer import Tokenizer
from rollout.errors import LongrollError
from rollout.fleet import CONTROLLER_NAME

logger = logging.getLogger("longroll.gateway")
KEEP_ALIVE_S = 75
BACKLOG = 2048
DRAIN_POLL_S = 0.05
SERVE_ENVIRONMENT = {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5"}  # its default of 0.1 is for fleets that scale fast
STOP_GRACE_S = 5.0
STOP_TIMEOUT_S = 30.0  # for Serve itself
STOP_POLL_S = 0.2


class Gateway:
    """One replica.

    Args:
        options: What it is told.
    """

    async def __init__(self, options: GatewayOptions) -> None:  # type: ignore[misc]
        config = options.gateway
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        self._drain_timeout_s = config.drain_timeout_s
        find = partial(ray.get_actor, CONTROLLER_NAME, namespace=options.namespace)
        self._backend = Backend(find(), find, config.coalesce_ms / 1000, config.max_open_choices)
        tokenizer = await asyncio.to_thread(Tokenizer, options.model)
        self._app = GatewayApp(options, self._backend, tokenizer)
        self._socket = _listen(config.host, config.port)
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._app.asgi,  # type: ignore[arg-type]
                lifespan="off",
                ws="none",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(STOP_GRACE_S),
            )
        )
        self._serving = asyncio.create_task(self._server.serve([self._socket]))

    async def address(self) -> tuple[str, int]:
        """Host and port that it listens on."""
        host, port = self._socket.getsockname()[:2]
        return host, port

    async def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that raises."""
        if self._serving.done():
            raise RuntimeError("the HTTP server has ended")

    async def __del__(self) -> None:  # type: ignore[misc]
        """Called by Serve before it ends a replica: no more completions are taken, and those under way may end."""
        self._app.is_draining = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._drain_timeout_s
        while self._backend.num_open and loop.time() < deadline:
            await asyncio.sleep(DRAIN_POLL_S)
        logger.info("stopping; %d completions are given up", self._backend.num_open)
        self._server.should_exit = True
        await self._backend.close()
        await asyncio.wait({self._serving}, timeout=STOP_GRACE_S)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket that other replicas on this node may share. Raises LongrollError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise LongrollError(f"gateway.host, port: got {host}:{port} ({error}), expected an address to be had") from None
    listening.listen(BACKLOG)
    listening.setblocking(False)
    return listening


class RunningGateway:
    """A gateway that was started; `stop` ends it.

    Args:
        handle: Serve's handle of the deployment.
        options: What it was told.
    """

    def __init__(self, handle: Any, options: GatewayOptions) -> None:
        self._application, self._drain_timeout_s = options.application, options.gateway.drain_timeout_s
        host, port = handle.address.remote().result()
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def stop(self) -> None:
        """Drain and end all replicas, and Serve if nothing else runs on it."""
        serve.delete(self._application, _blocking=False)
        deadline = time.monotonic() + self._drain_timeout_s + STOP_TIMEOUT_S
        while self._application in serve.status().applications and time.monotonic() < deadline:
            time.sleep(STOP_POLL_S)
        if set(serve.status().applications) <= {self._application}:
            serve.shutdown()


def _place(num_replicas: int) -> dict[str, float]:
    """A single replica is found where it was started from; several go wherever there is room."""
    return {f"node:{ray.util.get_node_ip_address()}": 0.001} if num_replicas == 1 else {}


def start_gateway(options: GatewayOptions) -> RunningGateway:
    """Start the gateway of a service that runs on the cluster which this process has joined.

    Raises:
        LongrollError: A replica could not start.
    """
    serve.start(
        proxy_location="Disabled",
        controller_options={"runtime_env": {"env_vars": SERVE_ENVIRONMENT}},
        logging_config={"enable_access_log": False},
    )
    deployment = serve.deployment(
        Gateway,
        name="gateway",
        num_replicas=options.gateway.num_replicas,
        max_ongoing_requests=64,
        graceful_shutdown_timeout_s=options.gateway.drain_timeout_s + 2 * STOP_GRACE_S,
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={"num_cpus": 0, "resources": _place(options.gateway.num_replicas)},
    )
    try:
        handle = serve.run(deployment.bind(options), name=options.application, route_prefix=None)
    except RuntimeError as error:
        serve.delete(options.application)
        raise LongrollError(f"gateway: got {error}, expected it to start") from error
    return RunningGateway(handle, options)
