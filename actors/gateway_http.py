"""The edge of the gateway: names of requests, their size, their errors, their log lines, and who may make them.

Owns what every request goes through before and after its route. Knows nothing of what routes do.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

from rollout.errors import EngineDead, InvalidRequest, LongrollError, QueueFull, ServiceLost, SyncRefused, UnknownHandle
from rollout.gateway.authorization import Caller, request_id_of
from rollout.gateway.choices import StreamDiverged
from rollout.gateway.idempotency import IdempotencyConflict
from rollout.gateway.keys import ApiKey, KeyFile, Role
from rollout.gateway.limits import RateLimiter
from rollout.journal.errors import JournalConflict

logger = logging.getLogger("longroll.gateway")
RETRY_AFTER_S = 1.0  # where nobody can tell
CLIENT_LEFT = 499
PUBLIC = ("/health", "/openapi.json", "/dashboard")
PUBLIC_FOLDER = "/dashboard/assets/"
HEADERS_READ = (b"authorization", b"content-length", b"x-request-id")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_BEARER = HTTPBearer(auto_error=False, description="API key", scheme_name="ApiKey")
Presented = Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]

STATUS_OF: dict[type[Exception], tuple[int, str, str | None]] = {
    InvalidRequest: (400, "invalid_request_error", None),
    UnknownHandle: (404, "invalid_request_error", "not_found"),
    IdempotencyConflict: (409, "invalid_request_error", "idempotency_conflict"),
    JournalConflict: (409, "invalid_request_error", "conflict"),
    SyncRefused: (409, "invalid_request_error", "sync_refused"),
    QueueFull: (429, "rate_limit_error", "overloaded"),
    StreamDiverged: (503, "server_error", "stream_diverged"),
    EngineDead: (503, "server_error", "no_engine"),
    ServiceLost: (503, "server_error", "service_lost"),
}
"""HTTP status, and the type and code of OpenAI's error object; looked up along an error's classes."""


class ApiError(Exception):
    """An answer that is an error in OpenAI's form.

    Args:
        status: HTTP status.
        message: For people.
        kind, code, param: As OpenAI's error object has them.
        retry_after_s: When to try again, for 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.retry_after_s = retry_after_s

    def to_json(self) -> bytes:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def to_response(self) -> Response:
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(self.to_json(), self.status, headers, "application/json")


def api_error(error: Exception) -> ApiError:
    """The answer to an error of the service. What nobody foresaw is not told to clients."""
    for kind in type(error).__mro__:
        if kind in STATUS_OF:
            status, name, code = STATUS_OF[kind]
            retry_after_s = getattr(error, "retry_after_s", None)
            if status in (429, 503) and retry_after_s is None:
                retry_after_s = RETRY_AFTER_S
            param = error.what if isinstance(error, InvalidRequest) else None
            return ApiError(status, str(error), name, code, param, retry_after_s)
    if isinstance(error, LongrollError):
        return ApiError(503, str(error), "server_error", "unavailable", retry_after_s=RETRY_AFTER_S)
    return ApiError(500, "internal error; the log has it under the request id", "server_error", "internal_error")


@dataclass(slots=True)
class Trace:
    """What is known of a request by its log line. Owned by `Edge`."""

    request_id: str
    key: ApiKey | None = None


class Gatekeeper:
    """Who may call what, and how often.

    Args:
        keys: The valid keys.
        limiter: Requests of each.
    """

    def __init__(self, keys: KeyFile, limiter: RateLimiter) -> None:
        self._keys, self._limiter = keys, limiter

    def admit(self, path: str, authorization: bytes | None) -> ApiKey | None:
        """The key of a request, before anything of its body is read; None where none is needed.

        Raises:
            ApiError: There is none, or it was used too often.
        """
        scheme, _, presented = (authorization or b"").decode("latin-1").partition(" ")
        key = self._keys.ring().find(presented.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            if path in PUBLIC or path.startswith(PUBLIC_FOLDER):
                return None
            raise ApiError(401, "no valid API key in the header Authorization: Bearer …", code="invalid_api_key")
        wait_s = self._limiter.take(key.key_id, time.monotonic())
        if wait_s is not None:
            raise ApiError(429, "too many requests with this key", "rate_limit_error", "rate_limit", None, wait_s)
        return key

    def allow(self, role: Role) -> Any:
        """A FastAPI dependency that gives the caller, who has at least this role."""

        async def check(request: Request, presented: Presented) -> Caller:
            trace: Trace = request.scope["longroll"]
            if trace.key is None:
                raise ApiError(401, "this needs an API key", code="invalid_api_key")
            if not trace.key.role.includes(role):
                message = f"this key has the role {trace.key.role.value}, expected {role.value}"
                raise ApiError(403, message, code="forbidden")
            return Caller(key=trace.key, request_id=trace.request_id)

        return Depends(check)


class Edge:
    """ASGI middleware: see the module.

    Args:
        app: What answers.
        gatekeeper: Lets callers in.
        max_body_bytes: Of a request.
        on_end: Told the route, method, status and seconds of every request.
    """

    def __init__(
        self,
        app: Any,
        gatekeeper: Gatekeeper,
        max_body_bytes: int,
        on_end: Callable[[str, str, int, float], None],
    ) -> None:
        self._app, self._gatekeeper, self._on_end = app, gatekeeper, on_end
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value for name, value in scope["headers"] if name in HEADERS_READ}
        presented = headers.get(b"x-request-id")
        trace = Trace(request_id_of(presented.decode("latin-1") if presented is not None else None))
        scope["longroll"] = trace
        began, status = time.monotonic(), 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                name = (b"x-request-id", trace.request_id.encode())
                message["headers"] = [*message.get("headers", ()), name]
            await send(message)

        try:
            trace.key = self._gatekeeper.admit(scope["path"], headers.get(b"authorization"))
            if _declared_bytes(headers.get(b"content-length")) > self._max_body_bytes:
                raise self._too_large()
            await self._app(scope, self._limited(receive), send_named)
        except ApiError as error:
            if status == 0:
                await error.to_response()(scope, receive, send_named)
        except Exception as error:  # a fault of ours: the client is told that, the log what it was
            logger.exception("request %s failed", trace.request_id)
            if status == 0:
                await api_error(error).to_response()(scope, receive, send_named)
        finally:
            self._note(scope, trace, status or CLIENT_LEFT, time.monotonic() - began)

    def _note(self, scope: Message, trace: Trace, status: int, took_s: float) -> None:
        route, key_id = getattr(scope.get("route"), "path", "unmatched"), trace.key and trace.key.key_id
        self._on_end(route, scope["method"], status, took_s)
        line = "%s %s %d %.1f ms key=%s request=%s"
        logger.info(line, scope["method"], route, status, took_s * 1000, key_id, trace.request_id)

    def _limited(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def receive_some() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise HTTPException(413, self._too_large().message)  # any other kind FastAPI turns into a 400
            return message

        return receive_some

    def _too_large(self) -> ApiError:
        return ApiError(413, f"request body: expected at most {self._max_body_bytes} bytes", code="body_too_large")


def _declared_bytes(value: bytes | None) -> int:
    return int(value) if value is not None and value.isdigit() else 0


def add_error_handlers(app: FastAPI) -> None:
    """Every error as OpenAI's error object."""

    async def on_api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.to_response()

    async def on_fault(request: Request, error: Exception) -> Response:
        return api_error(error).to_response()  # and `Edge`, which sees it too, writes it to the log

    async def on_longroll_error(request: Request, error: Exception) -> Response:
        return api_error(error).to_response()

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        faults = error.errors()
        first: Mapping[str, Any] = faults[0] if faults else {"loc": (), "msg": "invalid request"}
        place = ".".join(str(part) for part in first["loc"][1:])
        message = f"{place}: {first['msg']}" if place else str(first["msg"])
        return ApiError(400, message, param=place or None).to_response()

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
        answer = ApiError(error.status_code, str(error.detail), kind).to_response()
        answer.headers.update(error.headers or {})
        return answer

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(LongrollError, on_longroll_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_fault)
