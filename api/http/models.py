"""What can be served, and where its weights are now."""

from __future__ import annotations

import asyncio

from sanic import Request, Sanic
from sanic.response import HTTPResponse, json

from api.models.library import InstalledModel
from api.schema.catalogue import catalogue
from api.service.service import Service


def register(app: Sanic) -> None:
    """Add the routes."""
    app.add_route(list_models, "/models", methods=["GET"])


async def list_models(request: Request) -> HTTPResponse:
    """Every installed model."""
    service: Service = request.app.ctx.service
    models = await asyncio.to_thread(service.library.all)
    return json({"models": [_entry(service, model) for model in models]})


def _entry(service: Service, model: InstalledModel) -> dict[str, object]:
    prefix = f"{model.model_id}@{model.revision}:"
    resident = {
        key: size for w in service.dispatcher.workers for key, size in w.models.items() if key.startswith(prefix)
    }
    return {
        "MODEL_ID": model.model_id,
        "MODEL_REVISION": model.revision,
        "tier": "device" if resident else "disk",
        "bytes": {"disk": model.bytes, "device": sum(resident.values())},
        "class": model.class_name,
        "scheduler": model.scheduler,
        "pipelines": sorted(catalogue().tasks_of(model.class_name).values()),
        "default": model.model_id == service.settings.model_id,
    }
