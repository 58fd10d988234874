"""Takes jobs in for later: what ``POST /jobs`` and ``callInputs.async`` share."""

from __future__ import annotations

import re
from typing import Any

import orjson
from sanic import Request
from sanic.response import HTTPResponse

from api.errors import ApiError
from api.http.keys import owner_of
from api.schema.catalogue import nearest
from api.service.entries import Entry, Terms
from api.service.intake import PRIORITIES
from api.service.service import Service

_KEY = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,198}[\x21-\x7e])?")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


async def accept(
    request: Request,
    model_inputs: dict[str, Any],
    call_inputs: dict[str, Any],
    priority: Any = None,
    job_id: str | None = None,
) -> HTTPResponse:
    """Take a native request in, and answer with the job's id.

    The header ``Idempotency-Key`` (draft-ietf-httpapi-idempotency-key-header) makes it safe to send it again, and so
    does an id that the client chose.

    Raises:
        ApiError: what can be said against it at once.
    """
    service: Service = request.app.ctx.service
    key = key_of(request)
    priority = "normal" if priority is None else priority
    if not isinstance(priority, str) or priority not in PRIORITIES:
        message = f"Must be low, normal or high.{nearest(priority, PRIORITIES) if isinstance(priority, str) else ''}"
        raise ApiError("INVALID_INPUTS", message, field="priority", requested=priority, available=list(PRIORITIES))
    kept = {name: value for name, value in call_inputs.items() if name != "async"}
    terms = Terms(owner=owner_of(request))
    entry = await service.later.accept(request.ctx.id, model_inputs, kept, priority, key, job_id=job_id, terms=terms)
    body = orjson.dumps(brief(entry))
    return HTTPResponse(body, status=202, headers={"Location": f"/jobs/{entry.id}"}, content_type="application/json")


def key_of(request: Request) -> str | None:
    """The ``Idempotency-Key`` of a request.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    key: str | None = request.headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        message = "Must be 1 to 200 printable ASCII characters."
        raise ApiError("INVALID_INPUTS", message, field="Idempotency-Key", requested=key)
    return key


def check_id(job_id: str) -> None:
    """Whether an id that a client chose can be one: it names files.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    if not _ID.fullmatch(job_id):
        message = "Must be 1 to 100 letters, digits, - and _, the first of them no sign; a UUID does well."
        raise ApiError("INVALID_INPUTS", message, field="id", requested=job_id)


def brief(entry: Entry) -> dict[str, Any]:
    """A job in a line."""
    body: dict[str, Any] = {"id": entry.id, "state": entry.state.value}
    if entry.position is not None:
        body["queuePosition"] = entry.position
    return body
