"""Jobs for later over HTTP: send, look, watch, fetch, cancel."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import orjson
from sanic import Request, Sanic
from sanic.response import HTTPResponse, empty

from api.errors import ApiError
from api.http.accept import accept, brief, check_id
from api.http.keys import owner_of
from api.http.native import parse_object, wanted_type
from api.schema.videos import FILE_FORMATS
from api.service.bodies import halves, images_body, result_body
from api.service.entries import Entry
from api.service.intake import PRIORITIES
from api.service.jobs import TERMINAL
from api.service.later import Later
from api.service.ledger import Events
from api.service.reports import preview_links

_KEEP_ALIVE = 15.0
"""Seconds without an event after which a comment is sent, so that proxies do not take the connection for dead."""
_READERS = ("text/event-stream", "application/x-ndjson", "application/json")
_NAMES = {number: name for name, number in PRIORITIES.items()}
_TYPES = {found.extension: found.content_type for found in FILE_FORMATS.values()}
_MOST_LISTED = 1000


def register(app: Sanic) -> None:
    """Add the routes."""
    app.add_route(create, "/jobs", methods=["POST"])
    app.add_route(list_jobs, "/jobs", methods=["GET"])
    app.add_route(put, "/jobs/<id:str>", methods=["PUT"])
    app.add_route(look, "/jobs/<id:str>", methods=["GET"])
    app.add_route(cancel, "/jobs/<id:str>", methods=["DELETE"])
    app.add_route(events, "/jobs/<id:str>/events", methods=["GET"])
    app.add_route(image, "/jobs/<id:str>/images/<n:str>", methods=["GET"])
    app.add_route(preview, "/jobs/<id:str>/previews/<n:str>", methods=["GET"])


async def create(request: Request) -> HTTPResponse:
    """Accept a job: 202 once it is on the disk."""
    data = parse_object(request.body)
    priority = data.pop("priority", None)
    return await accept(request, *halves(data), priority)


async def put(request: Request, id: str) -> HTTPResponse:
    """Accept a job under an id that the client chose; sent again, it is the same job."""
    check_id(id)
    data = parse_object(request.body)
    priority = data.pop("priority", None)
    return await accept(request, *halves(data), priority, id)


async def list_jobs(request: Request) -> HTTPResponse:
    """The newest jobs."""
    limit = whole(request.args.get("limit"), "limit", 100, low=1, high=_MOST_LISTED)
    return _json({"jobs": [_about(entry) for entry in await _later(request).newest(limit, owner_of(request))]})


async def look(request: Request, id: str) -> HTTPResponse:
    """A job as it is now, with its result once it is COMPLETED."""
    later = _later(request)
    as_links = _images_as_links(request)
    entry = await later.ledger.get(id, owner_of(request))
    body = _about(entry)
    if entry.state not in TERMINAL:
        if progress := later.progress(id):
            body["progress"] = progress
        if preview := later.preview(id):
            links = preview_links(id, preview) if as_links else None
            body["preview"] = {"step": preview.step, "total": preview.total, **images_body(preview.images, links)}
    if entry.error is not None:
        body["$error"] = {**entry.error, "requestId": entry.request_id}
    if entry.result is not None:
        body["result"] = await _result(later, entry, as_links)
    return _json(body)


async def cancel(request: Request, id: str) -> HTTPResponse:
    """Cancel a job; one that is over stays as it is."""
    later = _later(request)
    await later.ledger.get(id, owner_of(request))
    return _json(_about(await later.cancel(id)))


async def image(request: Request, id: str, n: str) -> HTTPResponse:
    """One image of a job that is COMPLETED."""
    later = _later(request)
    entry = await later.ledger.get(id, owner_of(request))
    if entry.result is None or not entry.result.images:
        why = "they were uploaded" if entry.result else f"it is {entry.state.value}"
        message = f"The job has no images here: {why}."
        raise ApiError("NOT_FOUND", message, requested=n)
    number = _number(n, entry.result.images)
    data = await later.ledger.image(entry, number)
    # what a job gave never changes; how long it is kept, the server says
    headers = {"Cache-Control": "private, immutable, max-age=3600"}
    return HTTPResponse(data, headers=headers, content_type=_TYPES[entry.result.extension])


async def preview(request: Request, id: str, n: str) -> HTTPResponse:
    """One image of the newest preview of a job that runs; ``X-Step`` says after which step."""
    later = _later(request)
    entry = await later.ledger.get(id, owner_of(request))
    newest = later.preview(id) if entry.state not in TERMINAL else None
    if newest is None:
        message = f"The job has no preview: it is {entry.state.value}, and previews are kept only while it runs."
        raise ApiError("NOT_FOUND", message, requested=n)
    number = _number(n, len(newest.images))
    headers = {"Cache-Control": "no-store", "X-Step": str(newest.step)}
    return HTTPResponse(newest.images[number], headers=headers, content_type="image/jpeg")


async def events(request: Request, id: str) -> HTTPResponse | None:
    """The events of a job: server-sent ones, or lines of JSON, until it is over; or all there are now, as JSON.

    Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html
    """
    later = _later(request)
    wanted = wanted_type(request.headers.get("accept"), _READERS)
    first = whole(request.args.get("after"), "after", 0, low=0, high=2**62)
    after = whole(request.headers.get("last-event-id"), "Last-Event-ID", first, low=0, high=2**62)
    entry = await later.ledger.get(id, owner_of(request))
    if wanted == "application/json":
        told = [_event(seq, body) for seq, body in await later.ledger.events(id, after)]
        return _json({**brief(entry), "events": told})
    if wanted == "text/event-stream" and entry.state in TERMINAL and not await later.ledger.events(id, after):
        return empty()  # 204 tells an EventSource, which comes back after every end, that this is the end
    await _stream(request, later.ledger.follow(id, after), wanted)
    return None


async def _stream(request: Request, portions: AsyncIterator[Events], wanted: str) -> None:
    as_sse = wanted == "text/event-stream"
    loop = asyncio.get_running_loop()
    # Sanic cuts answers off after RESPONSE_TIMEOUT; one that ends before can be taken up again where it was
    end = loop.time() + max(1.0, request.app.config.RESPONSE_TIMEOUT - 30)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    response = await request.respond(headers=headers, content_type=wanted)
    following: asyncio.Future[Events] = asyncio.ensure_future(anext(portions))  # type: ignore[arg-type]
    try:
        while loop.time() < end:
            await asyncio.wait({following}, timeout=min(_KEEP_ALIVE, end - loop.time()))
            if not following.done():
                if as_sse:
                    await response.send(b": keep-alive\n\n")
                continue
            try:
                told = following.result()
            except (StopAsyncIteration, ApiError):  # over, or the server stops
                break
            await response.send(b"".join(_line(seq, body, as_sse) for seq, body in told))
            following = asyncio.ensure_future(anext(portions))  # type: ignore[arg-type]
        await response.eof()
    finally:
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, ApiError):
            await following


def _line(seq: int, body: dict[str, Any], as_sse: bool) -> bytes:
    data = orjson.dumps(_event(seq, body))
    return b"id: %d\ndata: %s\n\n" % (seq, data) if as_sse else data + b"\n"


def _event(seq: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"seq": seq, **body}


def _later(request: Request) -> Later:
    later: Later = request.app.ctx.service.later
    return later


def _about(entry: Entry) -> dict[str, Any]:
    body = {**brief(entry), "priority": _NAMES[entry.priority], "tries": entry.tries}
    times = {"created": entry.created, "started": entry.started, "finished": entry.finished}
    body.update({name: round(seconds * 1000) for name, seconds in times.items() if seconds is not None})
    timings = {}
    if entry.started is not None:
        timings["queued"] = round((entry.started - entry.created) * 1000)
        if entry.finished is not None:
            timings["running"] = round((entry.finished - entry.started) * 1000)
    return {**body, "timings": timings}


async def _result(later: Later, entry: Entry, as_links: bool) -> dict[str, Any]:
    assert entry.result is not None
    links = [f"/jobs/{entry.id}/images/{number}" for number in range(entry.result.images)] if as_links else None
    return result_body(await later.ledger.result(entry, with_images=not as_links), links)


def _images_as_links(request: Request) -> bool:
    asked = request.args.get("images", "base64")
    if asked not in ("base64", "url"):
        raise ApiError(
            "INVALID_INPUTS", "Must be base64 or url.", field="images", requested=asked, available=["base64", "url"]
        )
    return bool(asked == "url")


def _number(n: str, count: int) -> int:
    """Which of so many images a path names."""
    number = whole(n, "n", 0, low=0, high=2**62)
    if number >= count:
        raise ApiError("NOT_FOUND", "The job has no such image.", requested=number, available=list(range(count)))
    return number


def whole(text: str | None, field: str, default: int, *, low: int, high: int) -> int:
    """A whole number of a query, or of an address.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    if text is None or text == "":
        return default
    if not (text.isascii() and text.isdigit() and low <= int(text[:20]) <= high):
        raise ApiError("INVALID_INPUTS", f"Must be a whole number from {low} to {high}.", field=field, requested=text)
    return int(text)


def _json(body: dict[str, Any]) -> HTTPResponse:
    return HTTPResponse(orjson.dumps(body, default=str), content_type="application/json")
