"""Builds the Sanic app from its parts."""

from __future__ import annotations

import logging
import re
import secrets
import time

from sanic import Request, Sanic
from sanic.response import HTTPResponse

from api.http import (
    cors,
    docs,
    errors,
    health,
    jobs,
    keys,
    metrics,
    models,
    native,
    plan,
    runpod,
    schedulers,
    usage,
    webhooks,
)
from api.http.observed import Asked, Observed, is_probe, route_of
from api.service.service import Service

log = logging.getLogger("api.http")

_CLIENT_ID = re.compile(r"[\w.:-]{1,100}", re.ASCII)


def build_app(service: Service, name: str = "diffusers-api") -> Sanic:
    """The app, with every route and the service's life bound to the server's.

    Args:
        service: not started yet; it starts with the server and stops with it.
        name: Sanic keeps apps in a registry by name.
    """
    settings = service.settings
    app = Observed(name, configure_logging=False, error_handler=errors.Handler(), request_class=Asked)
    app.config.update(
        {
            "REQUEST_MAX_SIZE": settings.max_body,
            "REQUEST_TIMEOUT": 60,
            "RESPONSE_TIMEOUT": int(settings.request_timeout) + 60,
            "KEEP_ALIVE_TIMEOUT": 75,
            "GRACEFUL_SHUTDOWN_TIMEOUT": 2.0,
            "FALLBACK_ERROR_FORMAT": "json",
            "ACCESS_LOG": False,
            "OAS": False,
            "AUTO_EXTEND": False,
            "MOTD": False,
            "PROXIES_COUNT": settings.proxies_count or None,
            "REAL_IP_HEADER": settings.real_ip_header or None,
            "REQUEST_MAX_HEADER_SIZE": 8192,
        }
    )
    app.ctx.service = service

    @app.before_server_start
    async def start(_: Sanic) -> None:
        service.start()

    @app.before_server_stop
    async def stop(_: Sanic) -> None:
        await service.stop()

    @app.on_request
    async def begin(request: Request) -> None:
        request.ctx.began = time.perf_counter()
        sent = request.headers.get("x-request-id", "")
        request.ctx.id = sent if _CLIENT_ID.fullmatch(sent) else secrets.token_hex(8)

    @app.on_response
    async def end(request: Request, response: HTTPResponse) -> None:
        request_id = getattr(request.ctx, "id", None) or secrets.token_hex(8)
        response.headers["X-Request-Id"] = request_id
        request.ctx.status = response.status
        took = (time.perf_counter() - getattr(request.ctx, "began", time.perf_counter())) * 1000
        log.log(
            logging.DEBUG if is_probe(request) else logging.INFO,
            "%s %s %d in %.1f ms",
            request.method,
            request.path,
            response.status,
            took,
            extra={"request_id": request_id, "owner": getattr(request.ctx, "owner", None)},
        )
        service.watch.answered(request.method, route_of(request), response.status, took / 1000)

    parts = (
        keys, cors, native, plan, jobs, runpod, health, metrics, models, schedulers, usage, webhooks, docs,
    )  # fmt: skip
    for part in parts:
        part.register(app)
    return app
