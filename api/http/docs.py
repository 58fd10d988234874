"""``GET /openapi.json`` and ``GET /docs``: what can be asked, for programs and for people.

The page is Swagger UI 5.35.0 as its makers publish it (``swagger_ui/``, Apache-2.0), served from here: nothing is
loaded from anywhere else, and its Content-Security-Policy sees to that.
"""

from __future__ import annotations

import asyncio
import functools
import gzip
import hashlib
from pathlib import Path
from typing import NamedTuple

import orjson
from sanic import Request, Sanic
from sanic.response import HTTPResponse, empty

from api.errors import ApiError
from api.http.openapi.document import document, routes

_FOLDER = Path(__file__).with_name("swagger_ui")
_TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
_FILES = sorted(file.name for file in _FOLDER.iterdir() if file.suffix in _TYPES)
_POLICY = "; ".join((
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self' 'unsafe-inline'",  # it lays itself out with style attributes
    "img-src 'self' data: blob:",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
))  # fmt: skip
_AS_IT_SAYS = {"X-Content-Type-Options": "nosniff"}
_PAGE = b"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>diffusers-api</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<noscript>This page needs JavaScript; the description itself is <a href="openapi.json">openapi.json</a>.</noscript>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""


class _Stored(NamedTuple):
    """Something that does not change while the server runs."""

    plain: bytes
    packed: bytes
    tag: str


def register(app: Sanic) -> None:
    """Add the routes."""
    app.add_route(openapi, "/openapi.json", methods=["GET"])
    app.add_route(page, "/docs", methods=["GET"])
    app.add_route(file, "/docs/<file:str>", methods=["GET"])

    @app.before_server_start
    async def describe(app: Sanic) -> None:  # when every route is there
        app.ctx.openapi = _store(orjson.dumps(document(app.ctx.service.settings, routes(app))))


async def openapi(request: Request) -> HTTPResponse:
    """The description of every route."""
    return _answer(request, request.app.ctx.openapi, "application/json")


async def page(_: Request) -> HTTPResponse:
    """A page to read it, and to try it."""
    headers = {
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return HTTPResponse(_PAGE, headers=headers, content_type="text/html; charset=utf-8")


async def file(request: Request, file: str) -> HTTPResponse:
    """What the page is made of."""
    if file not in _FILES:
        raise ApiError("NOT_FOUND", "The page has no such file.", requested=file, available=_FILES)
    return _answer(request, await asyncio.to_thread(_load, file), _TYPES[Path(file).suffix])


@functools.cache
def _load(name: str) -> _Stored:
    return _store((_FOLDER / name).read_bytes())


def _store(data: bytes) -> _Stored:
    return _Stored(data, gzip.compress(data, 6, mtime=0), f'"{hashlib.sha256(data).hexdigest()[:16]}"')


def _answer(request: Request, stored: _Stored, content_type: str) -> HTTPResponse:
    headers = {"ETag": stored.tag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
    if stored.tag in request.headers.get("if-none-match", ""):
        return empty(status=304, headers=headers)
    packed = "gzip" in request.headers.get("accept-encoding", "")
    if packed:
        headers["Content-Encoding"] = "gzip"
    body = stored.packed if packed else stored.plain
    return HTTPResponse(body, headers={**headers, **_AS_IT_SAYS}, content_type=content_type)
