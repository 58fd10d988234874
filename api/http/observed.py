"""The Sanic app whose requests are traced from their first byte to their last."""

from __future__ import annotations

import re
from typing import Any

from sanic import Request, Sanic
from sanic.exceptions import BadURL

from api.service.watch import Watch

_CLOSED = 499
"""Status where the client went away before there was an answer; as nginx has it."""
_PARAMETER = re.compile(r"<(?:__\w+__)?(\w+)(?::[^>]+)?>")


_PROBES = frozenset({"/healthcheck", "/ping", "/metrics"})


def is_probe(request: Request) -> bool:
    """Whether a request comes again and again, of machines that watch: nobody reads of each."""
    return request.path in _PROBES or request.path.startswith("/health/")


def route_of(request: Request) -> str | None:
    """The pattern of a request's route, such as ``/jobs/{id}``; None where there is none."""
    return _PARAMETER.sub(r"{\1}", request.uri_template) if request.route else None


class Asked(Request):
    """As Sanic's; what is no HTTP is answered also where its address cannot be read."""

    __slots__ = ()

    def __init__(self, url_bytes: bytes, headers: Any, version: str, method: str, *more: Any, **given: Any) -> None:
        try:
            super().__init__(url_bytes, headers, version, method, *more, **given)
        except BadURL:
            if method != "NONE":
                raise
            # Sanic makes one to answer an error with, of the address that was the error
            super().__init__(b"*", headers, version, method, *more, **given)


class Observed(Sanic):
    """As Sanic; a stream's request is over when its last line is sent."""

    async def handle_request(self, request: Request) -> None:
        """Answer one request, within its span where requests are traced."""
        watch: Watch = self.ctx.service.watch
        if watch.tracing is None or is_probe(request):
            await super().handle_request(request)
            return
        with watch.tracing.request(request.method, request.headers) as span:
            try:
                await super().handle_request(request)
            finally:
                known = {name: getattr(request.ctx, name, "") for name in ("id", "owner", "error")}
                status = getattr(request.ctx, "status", _CLOSED)
                watch.tracing.answered(span, request.method, route_of(request), status, **known)
