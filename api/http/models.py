"""What can be served, and where its weights are now."""

from __future__ import annotations

import asyncio

import msgspec
from sanic import Request, Sanic
from sanic.response import HTTPResponse, json

from api.models.description import InstalledModel
from api.schema.catalogue import catalogue
from api.service.service import Service


def register(app: Sanic) -> None:
    """Add the routes."""
    app.add_route(list_models, "/models", methods=["GET"])


async def list_models(request: Request) -> HTTPResponse:
    """Every model that is here, and every one that is on its way."""
    service: Service = request.app.ctx.service
    models = await asyncio.to_thread(service.library.all)
    transfers = [msgspec.to_builtins(transfer) for transfer in service.fetcher.transfers()]
    return json({"models": [_entry(service, model) for model in models], "transfers": transfers})


def _entry(service: Service, model: InstalledModel) -> dict[str, object]:
    prefix = f"{model.folder}@{model.revision}:"
    resident = {
        key: size for w in service.dispatcher.workers for key, size in w.models.items() if key.startswith(prefix)
    }
    return {
        "MODEL_ID": model.model_id,
        "MODEL_REVISION": model.revision,
        "key": model.key or None,
        "source": model.source or None,
        "tier": "device" if resident else "disk",
        "bytes": {"disk": model.bytes, "device": sum(resident.values())},
        "class": model.class_name,
        "scheduler": model.scheduler,
        "pipelines": sorted(catalogue().tasks_of(model.class_name).values()),
        "default": model.model_id == service.settings.model_id,
    }
