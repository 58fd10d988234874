"""What a request would take, without running it."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import msgspec

from api.errors import ApiError
from api.models.refs import SourceRef
from api.schema.generation import GenerationRequest, Picture
from api.schema.messages import Plan, Planned
from api.service.workers import Worker

if TYPE_CHECKING:
    from api.service.service import Service


async def plan(service: Service, model_inputs: dict[str, Any], call_inputs: dict[str, Any]) -> dict[str, Any]:
    """Say whether a request fits, how, and what it waits for.

    Args:
        service: that would run it.
        model_inputs: the wire's ``modelInputs``.
        call_inputs: the wire's ``callInputs``.

    Raises:
        ApiError: what is wrong with it; NOT_READY.
    """
    ref, request = await service.plan(model_inputs, call_inputs)
    if request is None:
        return await _remote(service, ref)
    ready = [worker for worker in service.dispatcher.workers if worker.ready]
    if not ready:
        raise ApiError("NOT_READY", "No worker is ready yet; send the request again later.")
    answer = await _best(ready, request).ask(Plan(_without_pixels(request), secrets.token_hex(8)))
    if answer.plan is None:
        raise ApiError(answer.code, answer.message, field=answer.field)
    return _told(service, request, answer.plan)


def _best(ready: list[Worker], request: GenerationRequest) -> Worker:
    """The worker that would get it."""
    key = request.model.key
    return max(ready, key=lambda worker: (worker.has(key, "device"), worker.has(key, "host"), worker.free))


def _without_pixels(request: GenerationRequest) -> GenerationRequest:
    def empty(found: Picture | list[Picture]) -> Picture | list[Picture]:
        if isinstance(found, list):
            return [msgspec.structs.replace(picture, pixels=b"") for picture in found]
        return msgspec.structs.replace(found, pixels=b"")

    pictures = {name: empty(found) for name, found in request.pictures.items()}
    return msgspec.structs.replace(request, pictures=pictures, then=tuple(map(_without_pixels, request.then)))


def _told(service: Service, request: GenerationRequest, found: Planned) -> dict[str, Any]:
    body = {
        "fits": found.fits,
        "placement": found.placement,
        "tier": found.tier,
        "bytes": {"fetch": 0, "read": found.read, "copy": found.copy, "model": found.model},
        "seconds": {
            "fetch": 0.0,
            "read": _rounded(found.read_seconds),
            "copy": _rounded(found.copy_seconds),
            "queue": _rounded(service.dispatcher.wait),
        },
        "MODEL_ID": request.model.model_id,
        "pipeline": request.pipeline,
    }
    return {**body, "why": found.why} if found.why else body


async def _remote(service: Service, ref: SourceRef) -> dict[str, Any]:
    """Of a model that is not here: how large its source says it is, or what is left of it, where it is on its way."""
    moving = [t for t in service.fetcher.transfers() if t.model_id == ref.model_id and t.kind == "download"]
    left, why = None, ""
    if moving:
        left = moving[0].total - moving[0].done if moving[0].total is not None else None
    else:
        try:
            left = await service.fetcher.size(ref)
        except ApiError as error:
            why = error.message
    if left is None:
        why = why or "Its source does not say how large it is."
    body = {
        "fits": None,
        "placement": None,
        "tier": "remote",
        "bytes": {"fetch": left, "read": None, "copy": None, "model": None},
        "seconds": {
            "fetch": moving[0].eta if moving else None,
            "read": None,
            "copy": None,
            "queue": _rounded(service.dispatcher.wait),
        },
        "MODEL_ID": ref.model_id,
        "pipeline": None,
    }
    return {**body, "why": why} if why else body


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
