"""``GET /schedulers``: what can be asked for as SCHEDULER, and with which arguments."""

from __future__ import annotations

import asyncio

from sanic import Request, Sanic
from sanic.response import HTTPResponse, json

from api.errors import ApiError
from api.service.options import check_options
from api.service.schedulers import listing
from api.service.service import Service


def register(app: Sanic) -> None:
    """Add the route."""
    app.add_route(list_schedulers, "/schedulers", methods=["GET"])


async def list_schedulers(request: Request) -> HTTPResponse:
    """Every scheduler class; with ``MODEL_ID`` (or ``MODEL_URL`` and the like) whether it suits that model."""
    service: Service = request.app.ctx.service
    options = check_options({name: request.args.get(name) for name in request.args})
    if not options:
        return json({"schedulers": listing()})
    ref = service.source_ref(options)
    model = service.library.recall(ref) or await asyncio.to_thread(service.library.find, ref)
    if model is None:
        message = f'"{ref.model_id}" is not here yet; load it, or send it a request, and ask again.'
        raise ApiError("MODEL_MISMATCH", message, field="MODEL_ID", available=service.library.names())
    return json({"MODEL_ID": model.model_id, "SCHEDULER": model.scheduler, "schedulers": listing(model)})
