"""What is in the workers' memory, and how a client has it changed."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

from api.errors import ApiError
from api.schema.messages import Answer, Held, Load, Unload
from api.service.options import check_options
from api.service.workers import Worker

if TYPE_CHECKING:
    from api.service.service import Service

TIERS = ("device", "host")
"""Where a model can be loaded to; the fastest one first."""


def held(workers: list[Worker], prefix: str) -> list[Held]:
    """A model in the memory of every worker.

    Args:
        workers: to look at.
        prefix: of the model's keys: its folder and revision, and perhaps its precision.
    """
    return [model for worker in workers for key, model in worker.models.items() if key.startswith(prefix)]


async def load(service: Service, body: dict[str, Any]) -> str:
    """Bring a model into the memory of every worker, after fetching it where need be.

    Args:
        service: whose workers.
        body: ``callInputs`` that name the model; ``tier``: ``device`` or ``host``; ``pin``: keep it there.

    Returns:
        Its key.

    Raises:
        ApiError: INVALID_INPUTS, NOT_READY, TIMED_OUT, OUT_OF_MEMORY; what is wrong with the model.
    """
    options, tier = _read(body, TIERS, "device")
    pin = options.pop("pin", False)
    if not isinstance(pin, bool):
        raise ApiError("INVALID_INPUTS", "Must be true or false.", field="pin", requested=pin)
    ref = service.source_ref(check_options(options))
    ready = _ready(service)
    async with _patience(service, "The model is not in memory yet: it is still being fetched or loaded."):
        found = await asyncio.to_thread(service.library.find, ref) or (await service.fetcher.ensure(ref)).model
        with service.fetcher.hold(found):
            model = service.model_ref(found, ref)
            asked = [worker.ask(Load(model, secrets.token_hex(8), tier, pin)) for worker in ready]
            _check(await asyncio.gather(*asked))
    return model.key


async def unload(service: Service, body: dict[str, Any]) -> str:
    """Have a model leave the workers' memory: at once, or when the jobs are done that use it.

    Args:
        service: whose workers.
        body: ``callInputs`` that name the model, in every precision unless one is named; ``tier``: where it stays:
            ``disk``, or ``host``.

    Returns:
        What its keys begin with.

    Raises:
        ApiError: INVALID_INPUTS; MODEL_NOT_FOUND.
    """
    options, tier = _read(body, ("host", "disk"), "disk")
    ref = service.source_ref(check_options(options))
    found = await asyncio.to_thread(service.library.find, ref)
    if found is None:
        known = sorted({model.ref.model_id for model in held(service.dispatcher.workers, "")})
        message = f"{ref.model_id} is not here; nothing of it can be in memory."
        raise ApiError("MODEL_NOT_FOUND", message, field="MODEL_ID", requested=ref.model_id, available=known)
    key = service.model_ref(found, ref).key
    prefix = key if "MODEL_PRECISION" in options else key.rpartition(":")[0] + ":"
    asked = [
        worker.ask(Unload(key, secrets.token_hex(8), tier))
        for worker in service.dispatcher.workers
        for key in worker.models
        if key.startswith(prefix)
    ]
    async with _patience(service, "The worker does not answer; watch GET /models."):
        _check(await asyncio.gather(*asked))
    return prefix


def _read(body: dict[str, Any], tiers: tuple[str, ...], default: str) -> tuple[dict[str, Any], str]:
    """The ``callInputs`` of a body, which may stand in it by that name, and the tier."""
    nested = body.get("callInputs") or {}
    if not isinstance(nested, dict):
        raise ApiError("INVALID_INPUTS", "Must be an object.", field="callInputs")
    options = {**{name: value for name, value in body.items() if name != "callInputs"}, **nested}
    tier = options.pop("tier", None) or default
    if tier not in tiers:
        message = f"Must be one of {', '.join(tiers)}."
        raise ApiError("INVALID_INPUTS", message, field="tier", requested=tier, available=list(tiers))
    return options, tier


def _ready(service: Service) -> list[Worker]:
    ready = [worker for worker in service.dispatcher.workers if worker.ready]
    if not ready:
        raise ApiError("NOT_READY", "No worker is ready yet; send the request again later.")
    return ready


def _check(answers: list[Answer]) -> None:
    for answer in answers:
        if answer.code:
            raise ApiError(answer.code, answer.message)


class _patience:
    """REQUEST_TIMEOUT, with an error that says what goes on."""

    def __init__(self, service: Service, message: str) -> None:
        self._timeout = asyncio.timeout(service.settings.request_timeout)
        self._message = message

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *exception: Any) -> None:
        try:
            await self._timeout.__aexit__(*exception)
        except TimeoutError:
            raise ApiError("TIMED_OUT", f"{self._message} Look at GET /models, or send it again.") from None
