"""Turns every exception into the one error body, in one place."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import traceback
from typing import Any

import orjson
from sanic import Request
from sanic.exceptions import (
    BadRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    RequestCancelled,
    RequestTimeout,
    SanicException,
    ServiceUnavailable,
)
from sanic.handlers import ErrorHandler
from sanic.response import HTTPResponse

from api.errors import ApiError

log = logging.getLogger("api.http")

_RUNPOD = re.compile(
    r"/v2/|/v1/[^/]+/(?:run|runsync|jobs|status|status-sync|stream|cancel|retry|purge-queue|health)(?:/|$)"
)
"""Addresses of RunPod's routes, for what is said before there is a route: that there is none, or no key."""

_TRUE_STATUS = frozenset({"UNAUTHORIZED", "TOO_MANY_WRONG_KEYS"})
"""Also with LEGACY_STATUS: the old system had no keys, and who has none must not take the answer for one."""


def error_body(error: ApiError, request_id: str) -> dict[str, Any]:
    """The ``{"$error": …}`` object of an error."""
    cause = error.__cause__
    body = {**error.body(), "requestId": request_id}
    if cause is not None and log.isEnabledFor(logging.DEBUG):
        body["stack"] = "".join(traceback.format_exception(cause))
    return {"$error": body}


def error_response(error: ApiError, request: Request) -> HTTPResponse:
    """An error as HTTP."""
    request.ctx.error = error.code
    request.app.ctx.service.watch.error(error.code)
    legacy = request.path == "/" and request.app.ctx.service.settings.legacy_status and error.code not in _TRUE_STATUS
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    if error.code == "METHOD_NOT_ALLOWED":
        headers["Allow"] = ", ".join(error.available or [])
    body = error_body(error, getattr(request.ctx, "id", ""))
    if getattr(request.route.ctx, "runpod", False) if request.route else _RUNPOD.match(request.path):
        # the key that clients of RunPod know
        body = {"error": ": ".join(part for part in (error.code, error.field, error.message) if part), **body}
    response = HTTPResponse(
        _encoded(body),
        status=200 if legacy else error.status,
        headers=headers,
        content_type="application/json",
    )
    if error.code == "UNAUTHORIZED":
        for scheme in ("Bearer", "Basic"):
            response.headers.add("WWW-Authenticate", f'{scheme} realm="diffusers-api"')
    return response


def _encoded(body: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(body, default=str)
    except orjson.JSONEncodeError:  # half a character, out of a header that is no UTF-8
        return json.dumps(body, default=str, ensure_ascii=False).encode("utf-8", "replace")


def to_api_error(exception: Exception, request: Request) -> ApiError:
    """What a client is told about any exception."""
    if isinstance(exception, ApiError):
        return exception
    if isinstance(exception, NotFound):
        return ApiError("NOT_FOUND", f"There is no {request.path} here; generate with POST /.")
    if isinstance(exception, MethodNotAllowed):
        allowed = sorted(str(m) for m in exception.headers.get("Allow", "").split(", ") if m)
        return ApiError("METHOD_NOT_ALLOWED", f"{request.path} does not take {request.method}.", available=allowed)
    if isinstance(exception, PayloadTooLarge) and "header" in str(exception):
        limit = request.app.config.REQUEST_MAX_HEADER_SIZE
        return ApiError("HEADERS_TOO_LARGE", f"The address and the headers are longer than {limit} bytes together.")
    if isinstance(exception, PayloadTooLarge):
        limit = request.app.config.REQUEST_MAX_SIZE
        return ApiError("BODY_TOO_LARGE", f"The request is larger than MAX_BODY of {limit} bytes.")
    if isinstance(exception, RequestTimeout):
        return ApiError("TIMED_OUT", "The request did not arrive in time.")
    if isinstance(exception, RequestCancelled):
        return ApiError("CANCELLED", "The client went away.")
    if isinstance(exception, ServiceUnavailable):
        return ApiError("NOT_READY", "The server did not answer in time.")
    if isinstance(exception, BadRequest) or (
        isinstance(exception, SanicException) and 400 <= exception.status_code < 500
    ):
        return ApiError("INVALID_INPUTS", str(exception) or "The request is not valid HTTP.")
    return ApiError("INTERNAL_ERROR", "Something went wrong in the server; its log has the request id.")


class Handler(ErrorHandler):
    """Sanic's hook for exceptions."""

    def default(self, request: Request | None, exception: Exception) -> HTTPResponse:  # type: ignore[override]
        """Answer any exception with our error body."""
        if request is None:
            return HTTPResponse(status=400)
        error = to_api_error(exception, request)
        if not isinstance(exception, ApiError | asyncio.CancelledError) and error.code == "INTERNAL_ERROR":
            log.error("unexpected", exc_info=exception, extra={"request_id": getattr(request.ctx, "id", None)})
            error.__cause__ = exception
        return error_response(error, request)
