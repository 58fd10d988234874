"""``GET /usage``: what a key has had of the server."""

from __future__ import annotations

from sanic import Request, Sanic
from sanic.response import HTTPResponse, json

from api.http.keys import owner_of
from api.service.service import Service


def register(app: Sanic) -> None:
    """Add the route."""
    app.add_route(usage, "/usage", methods=["GET"])


async def usage(request: Request) -> HTTPResponse:
    """Of the key that asks; of all of them, where it is one of ADMIN_KEYS."""
    service: Service = request.app.ctx.service
    owner = owner_of(request)
    owners = [owner]
    if owner in service.settings.admin_keys:
        counted = [used["owner"] for used in service.usage.snapshot()]
        owners = list(dict.fromkeys([*service.gate.keys.names, *counted]))
    found = [{**service.usage.of(name), "limits": service.limits.of(name)} for name in owners]
    return json({"usage": found, "since": round(service.usage.since * 1000)})
