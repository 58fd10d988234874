"""Takes jobs in for later: what ``POST /jobs`` and ``callInputs.async`` share."""

from __future__ import annotations

import re
from typing import Any

import orjson
from sanic import Request
from sanic.response import HTTPResponse

from api.errors import ApiError
from api.schema.catalogue import nearest
from api.service.later import PRIORITIES
from api.service.service import Service
from api.service.store import Entry

_KEY = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,198}[\x21-\x7e])?")


async def accept(
    request: Request, model_inputs: dict[str, Any], call_inputs: dict[str, Any], priority: Any = None
) -> HTTPResponse:
    """Take a native request in, and answer with the job's id.

    The header ``Idempotency-Key`` (draft-ietf-httpapi-idempotency-key-header) makes it safe to send it again.

    Raises:
        ApiError: what can be said against it at once.
    """
    service: Service = request.app.ctx.service
    key = request.headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        message = "Must be 1 to 200 printable ASCII characters."
        raise ApiError("INVALID_INPUTS", message, field="Idempotency-Key", requested=key)
    priority = "normal" if priority is None else priority
    if not isinstance(priority, str) or priority not in PRIORITIES:
        message = f"Must be low, normal or high.{nearest(priority, PRIORITIES) if isinstance(priority, str) else ''}"
        raise ApiError("INVALID_INPUTS", message, field="priority", requested=priority, available=list(PRIORITIES))
    kept = {name: value for name, value in call_inputs.items() if name != "async"}
    entry = await service.later.accept(request.ctx.id, model_inputs, kept, priority, key)
    body = orjson.dumps(brief(entry))
    return HTTPResponse(body, status=202, headers={"Location": f"/jobs/{entry.id}"}, content_type="application/json")


def brief(entry: Entry) -> dict[str, Any]:
    """A job in a line."""
    body: dict[str, Any] = {"id": entry.id, "state": entry.state.value}
    if entry.position is not None:
        body["queuePosition"] = entry.position
    return body
