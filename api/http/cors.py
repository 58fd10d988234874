"""Which web pages may read the answers: cross-origin resource sharing (https://fetch.spec.whatwg.org/#http-cors-protocol)."""

from __future__ import annotations

from sanic import Request, Sanic
from sanic.response import HTTPResponse, empty

from api.settings import Settings

_EXPOSED = "X-Meta, X-Timings, X-Mem-Usage, X-Request-Id, X-Step, Retry-After, Location, WWW-Authenticate, *"
"""Headers of answers that a page may read; ``*`` is all of them, for browsers that know it."""
_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE"
_HEADERS = "Authorization, *"
"""Headers that a page may send: ``*`` is every other one, but not ``Authorization``, which must be named."""
_SECONDS = "600"
"""For which a browser need not ask again."""


def register(app: Sanic) -> None:
    """Answer preflights, and say on every answer, errors and streams too, who may read it."""
    allowed = origins(app.ctx.service.settings)
    app.ctx.origins = allowed
    if not allowed:
        return

    @app.on_request
    async def preflight(request: Request) -> HTTPResponse | None:
        if not is_preflight(request):
            return None
        headers = {
            "Access-Control-Allow-Methods": _METHODS,
            "Access-Control-Allow-Headers": _HEADERS,
            "Access-Control-Max-Age": _SECONDS,
        }
        return empty(status=204, headers=headers)

    @app.on_response
    async def share(request: Request, response: HTTPResponse) -> None:
        if origin := _allowed_origin(request):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED
        if "*" not in allowed:  # also where this one may not: a cache must not give it to one that may
            varies = response.headers.get("Vary")
            response.headers["Vary"] = f"{varies}, Origin" if varies else "Origin"


def origins(settings: Settings) -> frozenset[str]:
    """The origins whose pages may read answers; ``*`` is all of them.

    Pages send keys themselves, and no cookies: a page that has no key cannot use that of its visitor.
    """
    if settings.cors_origins:
        return frozenset(origin.lower().rstrip("/") for origin in settings.cors_origins if origin != "none")
    return frozenset() if settings.api_keys else frozenset({"*"})


def is_preflight(request: Request) -> bool:
    """Whether a browser asks if a page may send a request, as it may: it does so without the page's key."""
    asks = request.method == "OPTIONS" and "access-control-request-method" in request.headers
    return asks and _allowed_origin(request) is not None


def _allowed_origin(request: Request) -> str | None:
    allowed: frozenset[str] = request.app.ctx.origins
    origin = request.headers.get("origin")
    if origin is None:
        return None
    if "*" in allowed:
        return "*"
    return str(origin) if origin.lower() in allowed else None
