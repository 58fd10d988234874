"""The native dialect: ``POST /`` with ``modelInputs`` and ``callInputs``, as docker-diffusers-api has it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

import orjson
from sanic import Request, Sanic
from sanic.response import HTTPResponse

from api.errors import ApiError
from api.http.accept import accept, key_of
from api.http.errors import error_body, to_api_error
from api.http.keys import owner_of
from api.schema.generation import GenerationResult
from api.schema.images import IMAGE_FORMATS, format_name
from api.schema.videos import VIDEO_FORMATS
from api.service.admission import Admitted
from api.service.bodies import halves, result_body
from api.service.native_events import NativeEvents, tee
from api.service.service import Service
from api.service.webhooks_hook import Hook, telling

IMAGE_TYPES = {found.content_type: name for name, found in {**VIDEO_FORMATS, **IMAGE_FORMATS}.items()}
"""Media types of images, and of videos, to the names of their formats; WEBP is both."""
_OF_IMAGES = [found.content_type for found in IMAGE_FORMATS.values()]  # first: `image/*` is no wish for a GIF
OFFERS = ("application/json", *dict.fromkeys([*_OF_IMAGES, *IMAGE_TYPES]), "application/x-ndjson")
_HEADER_LIMIT = 4096
"""Bytes of ``$meta`` that fit in a response header; many clients take no more than 8 KiB in all."""


def register(app: Sanic) -> None:
    """Add the dialect's route."""
    app.add_route(generate, "/", methods=["POST"], name="native")


async def generate(request: Request) -> HTTPResponse | None:
    """Answer one native request."""
    service = request.app.ctx.service
    if key_of(request) is None:  # else it may be a job that is known
        service.dispatcher.check_room()
    model_inputs, call_inputs = parse_body(request.body)
    if call_inputs.get("async") in (True, 1):
        return await accept(request, model_inputs, call_inputs)
    wanted = wanted_type(request.headers.get("accept"))
    if wanted in IMAGE_TYPES:
        call_inputs = _with_format(call_inputs, wanted)
    hook = service.webhooks.hook(call_inputs, owner=owner_of(request))
    if call_inputs.get("streamEvents") in (True, 1):
        with service.limits.job(owner_of(request)):
            await _stream(request, model_inputs, call_inputs, hook)
        return None
    with service.limits.job(owner_of(request)):
        async with telling(hook):
            return await _answer(request, model_inputs, call_inputs, wanted, hook)


async def _answer(
    request: Request, model_inputs: dict[str, Any], call_inputs: dict[str, Any], wanted: str, hook: Hook | None
) -> HTTPResponse:
    service: Service = request.app.ctx.service
    admitted = await service.admit(request.ctx.id, model_inputs, call_inputs, hook)
    if wanted in IMAGE_TYPES and admitted.request.images > 1:
        message = f"{admitted.request.images} images do not fit in one {wanted}; accept application/json."
        raise ApiError("NOT_ACCEPTABLE", message, available=["application/json"])
    if wanted in IMAGE_TYPES and (admitted.request.output or admitted.destinations):
        message = f"Links, and what output asks for, do not fit in one {wanted}; accept application/json."
        raise ApiError("NOT_ACCEPTABLE", message, available=["application/json"])
    result = await _finish(request, admitted, hook, hook)
    if wanted in IMAGE_TYPES:
        return _bytes_response(result, wanted)
    return HTTPResponse(orjson.dumps(result_body(result)), content_type="application/json")


async def _finish(
    request: Request, admitted: Admitted, on_event: Callable[[Any], None] | None, hook: Hook | None
) -> GenerationResult:
    """Run a request; what its receiver was told is safe when its client gets the answer."""
    service: Service = request.app.ctx.service
    job = service.submit(admitted, on_event, owner_of(request))
    if hook is None:
        return await service.finish(job)
    hook.begin(admitted.options)
    result = await service.finish(job, on_upload=hook)
    await hook.stored()
    return result


def parse_body(body: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two halves of a native request. A JSON string that holds the JSON is accepted too.

    Raises:
        ApiError: INVALID_JSON, INVALID_INPUTS, UNKNOWN_INPUT.
    """
    return halves(parse_object(body))


def parse_object(body: bytes, example: str = '{"modelInputs": {…}, "callInputs": {…}}') -> dict[str, Any]:
    """A JSON object, or a JSON string that holds one.

    Args:
        body: as it came.
        example: of one, for the error.

    Raises:
        ApiError: INVALID_JSON.
    """
    try:
        data = orjson.loads(body)
        if isinstance(data, str):
            data = orjson.loads(data)
    except orjson.JSONDecodeError as fault:
        raise ApiError("INVALID_JSON", f"The body is not JSON: {fault}.") from None
    if not isinstance(data, dict):
        raise ApiError("INVALID_JSON", f"The body must be an object: {example}.")
    return data


def wanted_type(accept: str | None, offers: tuple[str, ...] = OFFERS) -> str:
    """Which of the types that we can answer in a client likes best (RFC 9110, 12.5.1); the first if it has no wish.

    Raises:
        ApiError: NOT_ACCEPTABLE when it likes none.
    """
    best, best_quality = "", 0.0
    for offer in offers:
        quality = _quality(offer, accept or "*/*")
        if quality > best_quality:
            best, best_quality = offer, quality
    if not best:
        raise ApiError("NOT_ACCEPTABLE", "The answer is of another type.", requested=accept, available=list(offers))
    return best


def _quality(offer: str, accept: str) -> float:
    """The quality of the most specific range of an ``Accept`` header that an offer falls in."""
    found = (-1, 0.0)
    for item in accept.lower().split(","):
        media_range, *parameters = (part.strip() for part in item.split(";"))
        specificity = {offer: 2, offer.split("/", maxsplit=1)[0] + "/*": 1, "*/*": 0}.get(media_range, -1)
        if specificity > found[0]:
            found = (specificity, _q_value(parameters))
    return found[1]


def _q_value(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            with contextlib.suppress(ValueError):
                return float(parameter[2:])
    return 1.0


def _with_format(call_inputs: dict[str, Any], wanted: str) -> dict[str, Any]:
    """The format that ``Accept`` asks for; an ``image_format`` or ``video_format`` that says otherwise is a mistake."""
    of_video = IMAGE_TYPES[wanted] not in IMAGE_FORMATS or call_inputs.get("video_format")
    option = "video_format" if of_video else "image_format"
    named = call_inputs.get(option)
    if named and (not isinstance(named, str) or format_name(named) != IMAGE_TYPES[wanted]):
        message = f"The Accept header asks for {wanted}; leave {option} out, or let it say the same."
        raise ApiError("INVALID_INPUTS", message, field=f"callInputs.{option}", requested=named)
    return {**call_inputs, option: IMAGE_TYPES[wanted].lower() if of_video else IMAGE_TYPES[wanted]}


def _bytes_response(result: GenerationResult, content_type: str) -> HTTPResponse:
    meta = json.dumps(result.meta)
    if len(meta) > _HEADER_LIMIT:
        short = {**result.meta, "modelInputs": {"seed": result.meta["modelInputs"].get("seed")}, "shortened": True}
        meta = json.dumps(short)
    headers = {"X-Meta": meta, "X-Timings": json.dumps(result.timings), "X-Mem-Usage": str(result.mem_usage)}
    return HTTPResponse(result.images[0], headers=headers, content_type=content_type)


_BEHIND = 50
"""Lines that a client has not read, beyond which it gets no previews: they are the large ones, and nobody sees them."""


_QUIET = 10.0
"""Seconds without a line, such as those of a request that waits for its turn, after which there is one all the same."""


class _Lines:
    """The events of one request, as they go into its stream."""

    def __init__(self, start_request_id: str | None, container_id: str) -> None:
        self.queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.begun = asyncio.Event()
        payload = {"startRequestId": start_request_id}
        self.events = NativeEvents(self._put, payload, container_id, lambda: self.queue.qsize() < _BEHIND)

    def _put(self, event: dict[str, Any]) -> None:
        self.begun.set()
        self.queue.put_nowait(event)


async def _stream(
    request: Request, model_inputs: dict[str, Any], call_inputs: dict[str, Any], hook: Hook | None
) -> None:
    named = call_inputs.get("startRequestId")
    service: Service = request.app.ctx.service
    lines = _Lines(named if isinstance(named, str) else None, service.settings.container_id)
    on_event = tee(lines.events, hook)
    admission = asyncio.create_task(service.admit(request.ctx.id, model_inputs, call_inputs, on_event))

    async def run() -> GenerationResult:
        async with telling(hook):
            admitted = await admission
            lines.events.callback_steps = admitted.options.get("callback_steps")
            return await _finish(request, admitted, on_event, hook)

    begun = asyncio.create_task(lines.begun.wait())
    job: asyncio.Task[GenerationResult] | None = None
    try:
        # what is wrong with a request is told by the status, unless its model had to be fetched first
        await asyncio.wait({admission, begun}, return_when=asyncio.FIRST_COMPLETED)
        if admission.done():
            admission.result()
        job = asyncio.create_task(run())
        job.add_done_callback(lambda _: lines.queue.put_nowait(None))
        response = await request.respond(content_type="application/x-ndjson")
        clock = asyncio.get_running_loop().time
        tick, sent = clock() + 1, clock()
        while True:
            line = None
            with contextlib.suppress(TimeoutError):
                line = await asyncio.wait_for(lines.queue.get(), tick - clock())
                if line is None:
                    break
            if line is None:
                tick += 1
                if (line := lines.events.progress) is None:
                    if clock() < sent + _QUIET:
                        continue
                    line = lines.events.quiet
            sent = clock()
            await response.send(orjson.dumps(line) + b"\n")
        try:
            last = result_body(job.result())
        except Exception as fault:  # the status line is gone: the error is the last line
            error = to_api_error(fault, request)
            service.watch.error(error.code)
            last = error_body(error, request.ctx.id)
        await response.send(orjson.dumps(last) + b"\n")
        await response.eof()
    finally:
        begun.cancel()
        admission.cancel()
        if job is not None:
            job.cancel()
