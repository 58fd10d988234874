"""``POST /plan``: what a request would take; its body is that of ``POST /``."""

from __future__ import annotations

from sanic import Request, Sanic
from sanic.response import HTTPResponse, json

from api.http.native import parse_body
from api.service.plan import plan as plan_for


def register(app: Sanic) -> None:
    """Add the route."""
    app.add_route(plan, "/plan", methods=["POST"])


async def plan(request: Request) -> HTTPResponse:
    """Say whether a request fits, how, and what it waits for; no weights are fetched and nothing is run."""
    return json(await plan_for(request.app.ctx.service, *parse_body(request.body)))
