"""The dashboard of a service that runs without a gateway: ``python -m launch.dashboard namespace=longroll``.

Owns the options, the key, and the server on this machine. The gateway serves the same page; this is for training runs
that have none. It only looks: it makes no client, and its end is nobody's concern.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import ray
import uvicorn
from fastapi import Depends, FastAPI, Header, HTTPException

from actors.dashboard import FindFeed, router
from launch.arguments import split_arguments
from rollout.errors import InvalidRequest, ServiceLost
from rollout.feed import Feed, FeedQuery
from rollout.fleet import CONTROLLER_NAME
from rollout.remote import client_error

ANSWER_TIMEOUT_S = 8.0  # below the page's own patience, so that it learns what is wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class DashboardOptions:
    """What to look at, and where.

    Attributes:
        address: Of the Ray cluster; "auto" finds the one on this machine.
        namespace: Of the service, as in cluster.namespace.
        host: Address that is listened on; anything but this machine's own lets others reach it, who still need the key.
        port: Its port.
    """

    address: str = "auto"
    namespace: str = "longroll"
    host: str = "127.0.0.1"
    port: int = 8901


def find_feed_in(namespace: str) -> FindFeed:
    """Asks whatever controller has the service's name now, so that one that is made anew is found again."""

    async def find_feed(query: FeedQuery) -> Feed:
        try:
            controller = ray.get_actor(CONTROLLER_NAME, namespace=namespace)
        except ValueError:
            raise ServiceLost(f"no service runs in namespace {namespace!r}") from None
        try:
            feed: Feed = await asyncio.wait_for(controller.feed.remote(query), ANSWER_TIMEOUT_S)
        except TimeoutError:
            raise ServiceLost(f"its controller gave no answer within {ANSWER_TIMEOUT_S:g} s") from None
        except Exception as error:  # every error is passed on, in its own class
            raise client_error(error) from None
        return feed

    return find_feed


def check_of(key: str) -> Callable[..., Awaitable[None]]:
    """A FastAPI dependency that lets holders of the key through."""

    async def check(authorization: str | None = Header(default=None)) -> None:
        kind, _, given = (authorization or "").partition(" ")
        is_right = secrets.compare_digest(given.encode(), key.encode())
        if kind.lower() != "bearer" or not is_right:
            raise HTTPException(401, "no key, or another one", {"WWW-Authenticate": "Bearer"})

    return check


def application(find_feed: FindFeed, key: str) -> FastAPI:
    """The page, and the feed behind the key."""
    app = FastAPI(title="Longroll", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(router(find_feed, feed_dependencies=[Depends(check_of(key))]))
    return app


def main(arguments: Sequence[str]) -> int:
    try:
        options, rest = split_arguments(DashboardOptions, arguments)
        if rest:
            raise InvalidRequest("argument", rest[0], "one of address, namespace, host, port")
    except InvalidRequest as error:
        print(f"launch.dashboard: {error}", file=sys.stderr)
        return 2
    try:
        ray.init(address=options.address, namespace=options.namespace, logging_level=logging.WARNING)
    except ConnectionError as error:
        print(f"launch.dashboard: {error}", file=sys.stderr)
        return 1
    key = secrets.token_urlsafe(24)
    print(f"http://{options.host}:{options.port}/dashboard\nkey, for as long as this runs: {key}", flush=True)
    uvicorn.run(
        application(find_feed_in(options.namespace), key), host=options.host, port=options.port, log_level="warning"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
