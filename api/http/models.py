"""What can be served, where its weights are now, and how to move them."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any
from urllib.parse import unquote

import msgspec
from sanic import Request, Sanic
from sanic.response import HTTPResponse, json

from api.http.native import parse_object
from api.models.description import InstalledModel
from api.schema.generation import ModelRef
from api.schema.messages import Held
from api.service import memory, upscaling
from api.service.describe import describe_inputs
from api.service.fitting import pipelines_of
from api.service.service import Service

_TIERS = ("device", "host", "disk")


def register(app: Sanic) -> None:
    """Add the routes."""
    app.add_route(list_models, "/models", methods=["GET"])
    app.add_route(schema, "/models/<model_id:path>/schema", methods=["GET"])
    app.add_route(load, "/models/load", methods=["POST"])
    app.add_route(unload, "/models/unload", methods=["POST"])


async def list_models(request: Request) -> HTTPResponse:
    """Every model that is here, in memory only or on its way; how full the memory is."""
    service: Service = request.app.ctx.service
    models = await asyncio.to_thread(service.library.all)
    others = await memory.not_listed(service, models)
    transfers = [msgspec.to_builtins(transfer) for transfer in service.fetcher.transfers()]
    entries = [_entry(service, model) for model in (*models, *others)]
    found = await asyncio.to_thread(upscaling.listed, service.library, service.dispatcher.workers)
    upscalers = [_upscaler(service, each) for each in found]
    used = {"memory": _memory(service), "host": _host(service)}
    return json({"models": entries, "upscalers": upscalers, "transfers": transfers, **used})


async def schema(request: Request, model_id: str) -> HTTPResponse:
    """What requests may say to a model; ``callInputs`` that are texts may be given as the query."""
    query = {name: values[-1] for name, values in request.args.items()}
    return json(await describe_inputs(request.app.ctx.service, {**query, "MODEL_ID": unquote(model_id)}))


async def load(request: Request) -> HTTPResponse:
    """Bring a model into memory; answered when it is there."""
    service: Service = request.app.ctx.service
    held = await memory.load(service, parse_object(request.body))
    return json({**_residence(service, held), "memory": _memory(service)})


async def unload(request: Request) -> HTTPResponse:
    """Have a model leave memory; what jobs still use leaves when they are done."""
    service: Service = request.app.ctx.service
    held = await memory.unload(service, parse_object(request.body or b"{}"))
    return json({**_residence(service, held), "memory": _memory(service)})


def _host(service: Service) -> dict[str, int] | None:
    """Bytes of the host's memory that workers share, each part counted once; None: they share none."""
    keeper = service.dispatcher.keeper
    return asdict(keeper.use()) if keeper else None


def _memory(service: Service) -> list[dict[str, object]]:
    """Bytes by worker and tier, what models share counted once."""
    return [
        {
            "worker": worker.info.device if worker.info else worker.device,
            "device": {"bytes": found.device, "limit": found.device_limit, "peak": found.device_peak},
            "host": {"bytes": found.host, "limit": found.host_limit},
        }
        for worker in service.dispatcher.workers
        if (found := worker.memory)
    ]


def _residence(service: Service, found: list[Held]) -> dict[str, Any]:
    """Where a model's weights are: its highest tier on any worker, bytes on all; what they share counts once."""
    used = max((held.used for held in found), default=0.0)
    hosts = [held.host for held in found]
    host = max(hosts, default=0) if service.dispatcher.keeper else sum(hosts)
    return {
        "tier": min((held.tier for held in found), key=_TIERS.index, default="disk"),
        "bytes": {"host": host, "device": sum(held.device for held in found)},
        "leases": sum(held.leases for held in found),
        "last_used": round(used * 1000) if used else None,
        "pinned": next((held.pin for held in found if held.pin), None),
    }


def _entry(service: Service, model: InstalledModel | ModelRef) -> dict[str, object]:
    files = str(model.folder), model.revision
    residence = _residence(service, memory.held(service.dispatcher.workers, lambda ref: memory.files_of(ref) == files))
    return {
        "MODEL_ID": model.model_id,
        "MODEL_REVISION": model.revision,
        **residence,
        **(_on_disk(service, model, residence) if isinstance(model, InstalledModel) else _gone(residence)),
    }


def _upscaler(service: Service, found: dict[str, Any]) -> dict[str, object]:
    files = str(found["path"]), found["sha256"]
    residence = _residence(service, memory.held(service.dispatcher.workers, lambda ref: memory.files_of(ref) == files))
    told = {name: found[name] for name in ("model", "sha256", "source")}
    return {**told, **residence, "bytes": {"disk": found["disk"], **residence["bytes"]}}


def _on_disk(service: Service, model: InstalledModel, residence: dict[str, Any]) -> dict[str, object]:
    return {
        "installed": True,
        "key": model.key or None,
        "source": model.source or None,
        "bytes": {"disk": model.bytes, **residence["bytes"]},
        "class": model.class_name or None,
        "part": model.part or None,
        "scheduler": model.scheduler or None,
        "pipelines": pipelines_of(model),
        "default": model.model_id == service.settings.model_id,
    }


def _gone(residence: dict[str, Any]) -> dict[str, object]:
    """Of files that were removed or replaced nothing is known but what they are in memory."""
    unknown = dict.fromkeys(("key", "source", "class", "part", "scheduler"))
    return {
        "installed": False,
        **unknown,
        "bytes": {"disk": 0, **residence["bytes"]},
        "pipelines": [],
        "default": False,
    }
