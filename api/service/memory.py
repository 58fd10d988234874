"""What is in the workers' memory, and how a client has it changed."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from api.errors import ApiError
from api.models.description import InstalledModel
from api.schema.generation import ModelRef
from api.schema.messages import Answer, Held, Load, Unload
from api.service.options import check_options
from api.service.workers import Worker

if TYPE_CHECKING:
    from api.service.service import Service

_BEST_FIRST = ("device", "host", "disk")
TIERS = ("device", "host")
"""Where a model can be loaded to; the fastest one first."""


def held(workers: list[Worker], means: Callable[[ModelRef], bool]) -> list[Held]:
    """A model in the memory of every worker, with and without what requests add to it as one.

    Args:
        workers: to look at.
        means: whether it is that model.
    """
    return [model for worker in workers for model in _as_one(worker.models.values()) if means(model.ref)]


def _as_one(models: Iterable[Held]) -> list[Held]:
    """Models in a worker's memory; what is shared by one with and one without additions is counted once."""
    found: dict[str, Held] = {}
    for one in models:
        ref = msgspec.structs.replace(one.ref, additions=())
        other = found.get(ref.key)
        if other is None:
            found[ref.key] = msgspec.structs.replace(one, ref=ref)
            continue
        found[ref.key] = Held(
            ref,
            min(one.tier, other.tier, key=_BEST_FIRST.index),
            max(one.device, other.device),
            max(one.host, other.host),
            one.leases + other.leases,
            one.pin or other.pin,
            max(one.used, other.used),
        )
    return list(found.values())


async def not_listed(service: Service, listed: list[InstalledModel]) -> list[ModelRef | InstalledModel]:
    """The models in memory that ``Library.all`` does not list, one entry for all precisions.

    Those of which the files were removed or replaced since are ``ModelRef``s: that is all that is known of them.

    Args:
        service: whose workers and library.
        listed: what the library lists.
    """
    known = {(str(model.folder), model.revision) for model in listed}
    loaded = {files_of(model.ref): model.ref for model in held(service.dispatcher.workers, lambda ref: True)}
    others = [ref for files, ref in loaded.items() if files not in known and not ref.is_upscaler]
    library = service.library
    return await asyncio.to_thread(lambda: [library.recognize(Path(ref.folder), ref.revision) or ref for ref in others])


def files_of(ref: ModelRef) -> tuple[str, str]:
    """What names a model's files: their folder, and which of those that were there."""
    return ref.folder, ref.revision


async def load(service: Service, body: dict[str, Any]) -> list[Held]:
    """Bring a model into the memory of every worker, after fetching it where need be.

    Args:
        service: whose workers.
        body: ``callInputs`` that name the model; ``tier``: ``device`` or ``host``; ``pin``: keep it there.

    Returns:
        It, in the memory of every worker.

    Raises:
        ApiError: INVALID_INPUTS, NOT_READY, TIMED_OUT, OUT_OF_MEMORY; what is wrong with the model.
    """
    options, tier = _read(body, TIERS, "device")
    pin = options.pop("pin", False)
    if not isinstance(pin, bool):
        raise ApiError("INVALID_INPUTS", "Must be true or false.", field="pin", requested=pin)
    options = check_options(options)
    ref = service.source_ref(options)
    ready = _ready(service)
    async with _patience(service, "The model is not in memory yet: it is still being fetched or loaded."):
        found = await asyncio.to_thread(service.library.find, ref) or (await service.fetcher.ensure(ref)).model
        with service.fetcher.hold(found.folder):
            model = service.model_ref(found, ref, options)
            asked = [worker.ask(Load(model, secrets.token_hex(8), tier, pin)) for worker in ready]
            _check(await asyncio.gather(*asked))
    return held(service.dispatcher.workers, lambda ref: ref.key == model.key)


async def unload(service: Service, body: dict[str, Any]) -> list[Held]:
    """Have a model leave the workers' memory: at once, or when the jobs are done that use it.

    What counts is what was loaded: its files may have been replaced or removed since.

    Args:
        service: whose workers.
        body: ``callInputs`` that name the model, in every revision and precision unless one is named; ``tier``: where
            it stays: ``disk``, or ``host``.

    Returns:
        What of it is still there.

    Raises:
        ApiError: INVALID_INPUTS; MODEL_NOT_FOUND, MODEL_BROKEN: nothing of it is in memory.
    """
    options, tier = _read(body, ("host", "disk"), "disk")
    options = check_options(options)
    ref, workers = service.source_ref(options), service.dispatcher.workers
    precision = service.precision_of(ref) if "MODEL_PRECISION" in options else ""
    found, fault = None, _unknown(ref.model_id, workers)
    try:
        found = await asyncio.to_thread(service.library.find, ref)
    except ApiError as error:
        fault = error
    folder, revision = (str(found.folder), found.revision if ref.revision else "") if found else ("", "")

    def means(model: ModelRef) -> bool:
        named = model.model_id == ref.model_id and ref.revision in ("", model.revision)
        same = model.folder == folder and revision in ("", model.revision)
        return (named or same) and precision in ("", model.precision)

    forgotten = [worker.forget(means, tier) for worker in workers]
    if found is None and not held(workers, means) and not any(forgotten):
        raise fault
    # also what is only on its way there
    named = {service.model_ref(found, ref, options).key} if found else set[str]()
    asked = [
        worker.ask(Unload(key, secrets.token_hex(8), tier))
        for worker, coming in zip(workers, forgotten, strict=True)
        if worker.ready
        for key in {key for key, model in worker.models.items() if means(model.ref)} | coming | named
    ]
    async with _patience(service, "The worker does not answer; watch GET /models."):
        _check(await asyncio.gather(*asked))
    return held(workers, means)


def _unknown(model_id: str, workers: list[Worker]) -> ApiError:
    known = sorted({model.ref.model_id for model in held(workers, lambda ref: True)})
    message = f"{model_id} is not here, and nothing of it is in memory."
    return ApiError("MODEL_NOT_FOUND", message, field="MODEL_ID", requested=model_id, available=known)


def _read(body: dict[str, Any], tiers: tuple[str, ...], default: str) -> tuple[dict[str, Any], str]:
    """The ``callInputs`` of a body, which may stand in it by that name, and the tier."""
    nested = {} if body.get("callInputs") is None else body["callInputs"]
    if not isinstance(nested, dict):
        raise ApiError("INVALID_INPUTS", "Must be an object.", field="callInputs")
    options = {**{name: value for name, value in body.items() if name != "callInputs"}, **nested}
    tier = options.pop("tier", None)
    tier = default if tier is None else tier
    if tier not in tiers:
        message = f"Must be one of {', '.join(tiers)}."
        raise ApiError("INVALID_INPUTS", message, field="tier", requested=tier, available=list(tiers))
    return options, tier


def _ready(service: Service) -> list[Worker]:
    if service.dispatcher.draining:
        raise ApiError("NOT_READY", "The server is shutting down.")
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
