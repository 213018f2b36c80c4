"""The dashboard over HTTP: one page, its style and scripts, and the feed that it polls.

Owns the routes, their headers and what a query may ask for. Who may see the feed is decided by whoever mounts the
router; the page itself tells nothing and is served to anybody. Knows nothing of what is in a feed.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request, Response

from rollout.errors import LongrollError
from rollout.feed import MAX_ID, Feed, FeedQuery, LaneOrder

FindFeed = Callable[[FeedQuery], Awaitable[Feed]]
FOLDER = Path(__file__).with_name("dashboard_page")
PAGE = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
MAX_CELL = 100_000
COMPRESSION = 1  # of 1 to 9: a feed shrinks to about a tenth, and is made anew every second


def router(find_feed: FindFeed, *, feed_dependencies: Sequence[Any] = ()) -> APIRouter:
    """Routes /dashboard, /dashboard/feed and /dashboard/assets/….

    Args:
        find_feed: Asks the service. A LongrollError that it raises is answered with 503 and its message.
        feed_dependencies: FastAPI dependencies of the feed, such as the check of a key; the page has none, and asks
            its viewer for a key when the feed answers 401 or 403.
    """
    routes = APIRouter(prefix="/dashboard", tags=["dashboard"])

    @routes.get("", include_in_schema=False)
    async def page(request: Request) -> Response:
        return _file(PAGE, request)

    @routes.get("/assets/{name}", include_in_schema=False)
    async def asset(name: str, request: Request) -> Response:
        return _file(name, request)

    @routes.get("/feed", dependencies=list(feed_dependencies), summary="What the dashboard shows, as JSON")
    async def feed(
        request: Request,
        order: LaneOrder = LaneOrder.LONGEST,
        find: Annotated[str, Query(max_length=MAX_ID)] = "",
        cell: Annotated[int | None, Query(ge=0, le=MAX_CELL)] = None,
    ) -> Response:
        try:
            found = await find_feed(FeedQuery(order=order, find=find, cell=cell))
        except LongrollError as error:
            raise HTTPException(status_code=503, detail=str(error), headers={"Retry-After": "5"}) from error
        content = found.to_json()
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Vary": "Accept-Encoding"}
        if "gzip" in request.headers.get("accept-encoding", ""):
            content, headers["Content-Encoding"] = gzip.compress(content, COMPRESSION), "gzip"
        return Response(content, media_type="application/json", headers=headers)

    return routes


@cache
def _files() -> dict[str, tuple[bytes, str, str]]:
    """Every file of the page by name, with its media type and tag. Only these can be asked for."""
    found = {}
    for path in FOLDER.iterdir():
        if path.suffix in MEDIA_TYPES:
            content = path.read_bytes()
            tag = hashlib.blake2b(content, digest_size=12).hexdigest()
            found[path.name] = (content, MEDIA_TYPES[path.suffix], f'"{tag}"')
    return found


def _file(name: str, request: Request) -> Response:
    known = _files().get(name)
    if known is None:
        raise HTTPException(status_code=404, detail="no such file")
    content, media_type, tag = known
    headers = HEADERS | {"ETag": tag, "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)
