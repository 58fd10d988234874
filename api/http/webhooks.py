"""Webhooks that have not arrived: look at them, send them again."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import orjson
from sanic import Request, Sanic
from sanic.response import HTTPResponse

from api.errors import ApiError
from api.http.keys import owner_of, sees_all
from api.service.webhooks import Webhooks
from api.service.webhooks_outbox import STATES, Entry

_MOST_LISTED = 1000
_LISTED = 100


def register(app: Sanic) -> None:
    """Add the routes."""
    app.add_route(listed, "/webhooks", methods=["GET"])
    app.add_route(redeliver, "/webhooks/<id:str>/redeliver", methods=["POST"])


async def listed(request: Request) -> HTTPResponse:
    """Those that wait, and those that were given up, newest first; ``?state=``, ``?limit=``."""
    state = request.args.get("state")
    if state is not None and state not in STATES:
        message = f"Must be {' or '.join(STATES)}."
        raise ApiError("INVALID_INPUTS", message, field="state", requested=state, available=list(STATES))
    limit = request.args.get("limit", str(_LISTED))
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:20]) <= _MOST_LISTED):
        message = f"Must be a whole number from 1 to {_MOST_LISTED}."
        raise ApiError("INVALID_INPUTS", message, field="limit", requested=limit)
    found = await _webhooks(request).listed(state, _owner(request), int(limit))
    return _json({"webhooks": [_about(request, entry) for entry in found]})


async def redeliver(request: Request, id: str) -> HTTPResponse:
    """Send one that was given up again, as if it were new; one that waits, now."""
    return _json(_about(request, await _webhooks(request).redeliver(id, _owner(request))), status=202)


def _owner(request: Request) -> str | None:
    return None if sees_all(request) else owner_of(request)


def _about(request: Request, entry: Entry) -> dict[str, Any]:
    parts = urlsplit(entry.url)
    # the server's own receiver is the operator's: its path may be what it lets in by
    path = "" if entry.url == request.app.ctx.service.settings.send_url else parts.path
    body: dict[str, Any] = {
        "id": entry.id,
        "state": "waiting" if entry.given_up is None else "failed",
        "kind": entry.kind,
        "job": entry.job,
        # what follows may be a secret of the receiver's
        "url": f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}",
        "created": round(entry.created * 1000),
        "tries": entry.tries,
    }
    if entry.given_up is None:
        body["due"] = round(entry.due * 1000)
    else:
        body["givenUp"] = round(entry.given_up * 1000)
    if entry.error:
        body["error"] = entry.error
    return body


def _webhooks(request: Request) -> Webhooks:
    webhooks: Webhooks = request.app.ctx.service.webhooks
    return webhooks


def _json(body: dict[str, Any], status: int = 200) -> HTTPResponse:
    return HTTPResponse(orjson.dumps(body), status=status, content_type="application/json")
