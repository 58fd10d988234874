"""Is it alive, and can it work: the routes that load balancers and people ask."""

from __future__ import annotations

import msgspec
from sanic import Request, Sanic
from sanic.response import HTTPResponse, empty, json

from api.http.health_port import ping_status
from api.service.dispatch import Dispatcher
from api.service.service import Service

_ABLE = frozenset({"READY", "BUSY"})


def register(app: Sanic) -> None:
    """Add the routes."""
    app.add_route(healthcheck, "/healthcheck", methods=["GET", "HEAD"])
    app.add_route(live, "/health/live", methods=["GET", "HEAD"])
    app.add_route(ready, "/health/ready", methods=["GET", "HEAD"])
    app.add_route(ping, "/ping", methods=["GET", "HEAD"])


def _dispatcher(request: Request) -> Dispatcher:
    dispatcher: Dispatcher = request.app.ctx.service.dispatcher
    return dispatcher


async def healthcheck(request: Request) -> HTTPResponse:
    """The old system's health check."""
    dispatcher = _dispatcher(request)
    gpu = any(
        (worker.info.device if worker.info else worker.device).startswith("cuda") for worker in dispatcher.workers
    )
    sick = dispatcher.state == "DEFUNCT"
    return json({"state": "unhealthy" if sick else "healthy", "gpu": gpu}, status=503 if sick else 200)


async def live(_: Request) -> HTTPResponse:
    """200 while the process lives."""
    return json({"state": "LIVE"})


async def ready(request: Request) -> HTTPResponse:
    """200 when a worker can run jobs."""
    dispatcher = _dispatcher(request)
    service: Service = request.app.ctx.service
    # where there are keys, what clients have fetched is not for those who have none; GET /models tells the others
    transfers = [] if service.gate.keys else service.fetcher.transfers()
    body = {**_status(request), "transfers": [msgspec.to_builtins(transfer) for transfer in transfers]}
    return json(body, status=200 if dispatcher.state in _ABLE else 503)


async def ping(request: Request) -> HTTPResponse:
    """As ``ready``, but 204 while starting, as RunPod's load balancer wants it."""
    status = ping_status(_dispatcher(request).state)
    return empty(status=204) if status == 204 else json(_status(request), status=status)


def _status(request: Request) -> dict[str, object]:
    dispatcher = _dispatcher(request)
    return {
        "state": dispatcher.state,
        "queue": dispatcher.queued + request.app.ctx.service.later.waiting,
        "workers": [
            {
                "device": worker.info.device if worker.info else worker.device,
                "name": worker.info.device_name if worker.info else None,
                "ready": worker.ready,
                "busy": bool(worker.running),
                "running": len(worker.running),
                "restarts": worker.restarts,
            }
            for worker in dispatcher.workers
        ],
    }
