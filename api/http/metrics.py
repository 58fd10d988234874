"""What monitoring reads: ``GET /metrics``."""

from __future__ import annotations

from sanic import Request, Sanic
from sanic.response import HTTPResponse

from api.http.keys import owner_of, sees_all
from api.service.service import Service


def register(app: Sanic) -> None:
    """Add the route."""
    app.add_route(metrics, "/metrics", methods=["GET"])


async def metrics(request: Request) -> HTTPResponse:
    """All metrics, in Prometheus' text format, or as OpenMetrics where ``Accept`` asks for it.

    https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    service: Service = request.app.ctx.service
    assert service.watch.metrics
    await service.watch.metrics.look()
    owner = None if sees_all(request) else owner_of(request)
    body, content_type = service.watch.metrics.exposition(request.headers.get("accept", ""), owner)
    return HTTPResponse(body, content_type=content_type)
