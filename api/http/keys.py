"""Every request needs a key, where there are keys: it is looked at before the body is read and a route is found."""

from __future__ import annotations

import base64
import binascii
import logging

from sanic import Request, Sanic

from api.errors import ApiError
from api.http.cors import is_preflight
from api.service.service import Service

log = logging.getLogger("api.http")

OPEN = frozenset({"/health/live", "/health/ready", "/ping", "/healthcheck"})
"""What load balancers ask, who have no key."""


def register(app: Sanic) -> None:
    """Look at every request before it has a route: what is unknown asks for a key as well."""
    service: Service = app.ctx.service

    @app.after_server_start
    async def tell(_: Sanic) -> None:
        if not service.gate.keys:
            log.info("API_KEYS is not set: whoever reaches this server may use it")
            settings = service.settings
            limits = {"KEY_RATE_LIMIT": settings.key_rate_limit, "KEY_CONCURRENCY": settings.key_concurrency}
            if idle := [name for name, limit in limits.items() if any(limit.values())]:
                log.warning("nobody is limited by %s: there are no API_KEYS", ", ".join(idle))
        if weak := service.gate.keys.weak:
            log.warning("short keys can be guessed, make them anew with: openssl rand -hex 32 (%s)", ", ".join(weak))

    @app.signal("http.routing.before")
    async def look(request: Request) -> None:
        request.ctx.owner = ""
        if request.path in OPEN or is_preflight(request):
            return
        try:
            request.ctx.owner = service.gate.owner(key_of(request.headers.get("authorization")), request.client_ip)
        except ApiError:
            _do_not_read(request)
            raise

    @app.on_request
    async def insist(request: Request) -> None:
        # Sanic takes signals out of its code where the first app of a process has none: then it is looked at here.
        # What is no HTTP is answered before, and has no method.
        if not hasattr(request.ctx, "owner") and request.method != "NONE":
            await look(request)


def key_of(header: str | None) -> str | None:
    """The key in an ``Authorization`` header: of Bearer, the password of Basic, or the header itself.

    Sources: RFC 6750, RFC 7617; RunPod's own service takes a bare key as well, and some clients send it so.
    """
    scheme, _, rest = (header or "").strip().partition(" ")
    rest = rest.strip()
    if scheme.lower() == "bearer":
        return rest or None
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest, validate=True).decode().partition(":")[2] or None
        except (binascii.Error, ValueError):
            return None
    return scheme if scheme and not rest else None


def owner_of(request: Request) -> str:
    """The name of the key that a request came with, "" without keys."""
    return str(getattr(request.ctx, "owner", ""))


def sees_all(request: Request) -> bool:
    """Whether a request may know what is of other keys: that of an admin, and every one where there are no keys."""
    service: Service = request.app.ctx.service
    return not service.gate.keys or owner_of(request) in service.settings.admin_keys


def _do_not_read(request: Request) -> None:
    """Answer at once. A client that asks first whether to send its body is not told to go on.

    What another one sends all the same is read behind the answer, up to MAX_BODY, and dropped as it comes: a
    connection that is closed before would take the answer with it.
    """
    stream = request.stream
    if stream is not None and stream.expecting_continue:
        stream.expecting_continue, stream.request_body, stream.keep_alive = False, None, False
