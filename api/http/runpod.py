"""RunPod's serverless API v2 on the jobs for later: what its clients send, and what they expect.

The shapes are those of https://docs.runpod.io/serverless/endpoints/send-requests; the word in the address stands for
the endpoint, and tells queues apart.
"""

from __future__ import annotations

from typing import Any

import orjson
from sanic import Request, Sanic
from sanic.response import HTTPResponse

from api.errors import ApiError
from api.http.accept import check_id, key_of
from api.http.jobs import whole
from api.http.keys import owner_of
from api.http.native import parse_object
from api.service.bodies import images_body
from api.service.entries import Entry
from api.service.jobs import JobState
from api.service.later import Later
from api.service.policies import Asked, read_body
from api.service.runpod_input import in_input
from api.service.runpod_status import output_of, progress_of, status_of
from api.service.service import Service

_NOT_ENDPOINTS = frozenset({
    "assistants", "audio", "batches", "chat", "completions", "embeddings", "files", "fine_tuning", "images", "models",
    "moderations", "responses", "threads", "uploads", "vector_stores", "videos",
})  # fmt: skip
"""Words after ``/v1`` that another dialect has there."""
_WAIT = (1_000, 300_000)
"""Milliseconds for which a client may have ``runsync`` wait."""
_USUAL_WAIT = 90_000
_EXAMPLE = '{"input": {"prompt": …}}'
_STREAM_WAIT = 1.0
"""Seconds that a stream waits for something new: the client for JavaScript asks again at once."""


def register(app: Sanic) -> None:
    """Add the routes, under ``/v2`` and, as old clients have it, ``/v1``."""
    app.router.register_pattern("endpoint", _endpoint, r"[^/]+")
    both, post = ["GET", "POST"], ["POST"]
    for version in ("v1", "v2"):
        base = f"/{version}/<endpoint:{'endpoint' if version == 'v1' else 'str'}>"
        for handler, path, methods in (
            (run, "run", post),
            (run_sync, "runsync", post),
            (put, "jobs/<id:str>", ["PUT"]),
            (status, "status/<id:str>", both),
            (status_sync, "status-sync/<id:str>", both),
            (stream, "stream/<id:str>", both),
            (cancel, "cancel/<id:str>", both),
            (retry, "retry/<id:str>", post),
            (purge, "purge-queue", post),
            (health, "health", ["GET"]),
        ):
            name = f"runpod_{version}_{handler.__name__}"
            app.add_route(handler, f"{base}/{path}", methods=methods, name=name, ctx_runpod=True)


def _endpoint(word: str) -> str:
    if word in _NOT_ENDPOINTS:
        raise ValueError(word)
    return word


async def run(request: Request, endpoint: str) -> HTTPResponse:
    """Accept a job."""
    entry = await _accept(request, endpoint, sync=False)
    return _json({"id": entry.id, "status": entry.state.value})


async def run_sync(request: Request, endpoint: str) -> HTTPResponse:
    """Accept a job, and wait for its end, for so long; it goes on when the client does not."""
    seconds = _wait(request)
    entry = await _accept(request, endpoint, sync=True)
    return await _status(request, await _later(request).ledger.over(entry.id, seconds))


async def put(request: Request, endpoint: str, id: str) -> HTTPResponse:
    """As ``run``, under an id that the client chose; sent again, it is the same job."""
    check_id(id)
    entry = await _accept(request, endpoint, sync=False, job_id=id)
    return _json({"id": entry.id, "status": entry.state.value})


async def status(request: Request, endpoint: str, id: str) -> HTTPResponse:
    """A job as it is now."""
    return await _status(request, await _find(request, endpoint, id))


async def status_sync(request: Request, endpoint: str, id: str) -> HTTPResponse:
    """A job at its end, or as it is after so long."""
    seconds = _wait(request)
    await _find(request, endpoint, id)
    return await _status(request, await _later(request).ledger.over(id, seconds))


async def stream(request: Request, endpoint: str, id: str) -> HTTPResponse:
    """What no answer of this has told yet: steps and phases, the newest preview, at last the output.

    What is told here is told once, whoever asked, as on the platform; ``status`` tells the output whenever it is asked.
    """
    later = _later(request)
    await _find(request, endpoint, id)
    entry, events = await later.ledger.stream(id, _STREAM_WAIT)
    told = [_streamed(later, id, event) for event in events if event["type"] != "state"]
    news: list[dict[str, Any]] = [{"output": output} for output in told if output]
    if events and entry.state == JobState.COMPLETED:
        news.append({"output": await output_of(later.ledger, entry)})
    body = await status_of(later.ledger, entry._replace(result=None))
    if not events and entry.state == JobState.CANCELLED:
        # told before; the client for Python goes on asking for ever, as it does not take CANCELLED for an end here
        body |= {"status": JobState.FAILED.value, "error": "CANCELLED: The job was cancelled."}
    return _json({**body, "stream": news})


async def cancel(request: Request, endpoint: str, id: str) -> HTTPResponse:
    """End a job; one that is over stays as it is."""
    await _find(request, endpoint, id)
    entry = await _later(request).cancel(id)
    return _json({"id": entry.id, "status": entry.state.value})


async def retry(request: Request, endpoint: str, id: str) -> HTTPResponse:
    """Run a job once more that failed or ran out of time."""
    entry = await _find(request, endpoint, id)
    await _later(request).retry(entry)
    return _json({"id": id, "status": JobState.IN_QUEUE.value})


async def purge(request: Request, endpoint: str) -> HTTPResponse:
    """Cancel what waits at the endpoint."""
    return _json({"removed": await _later(request).purge(endpoint, owner_of(request)), "status": "completed"})


async def health(request: Request, endpoint: str) -> HTTPResponse:
    """How many jobs and workers there are, and what they are at."""
    states, retried = await _later(request).counts(endpoint, owner_of(request))
    workers = _service(request).dispatcher.workers
    ready = [worker for worker in workers if worker.ready]
    running = sum(bool(worker.running) for worker in ready)
    defunct = sum(worker.defunct for worker in workers)
    return _json(
        {
            "jobs": {
                "completed": states.get(JobState.COMPLETED, 0),
                "failed": states.get(JobState.FAILED, 0) + states.get(JobState.TIMED_OUT, 0),
                "inProgress": states.get(JobState.IN_PROGRESS, 0),
                "inQueue": states.get(JobState.IN_QUEUE, 0),
                "retried": retried,
            },
            "workers": {
                "idle": len(ready) - running,
                "initializing": len(workers) - len(ready) - defunct,
                "ready": len(ready),
                "running": running,
                "throttled": defunct,
            },
        }
    )


async def _accept(request: Request, endpoint: str, *, sync: bool, job_id: str | None = None) -> Entry:
    key = key_of(request)
    owner = owner_of(request)
    asked: Asked = read_body(parse_object(request.body, _EXAMPLE), owner=owner, endpoint=endpoint, sync=sync)
    try:
        return await _later(request).accept(
            request.ctx.id,
            asked.input.model_inputs,
            asked.input.call_inputs,
            asked.priority,
            key,
            job_id=job_id,
            terms=asked.terms,
            s3=asked.s3,
        )
    except ApiError as error:
        raise in_input(error, simple=asked.input.simple) from error.__cause__


async def _find(request: Request, endpoint: str, id: str) -> Entry:
    return await _later(request).ledger.get(id, owner_of(request), endpoint)


async def _status(request: Request, entry: Entry) -> HTTPResponse:
    later = _later(request)
    return _json(await status_of(later.ledger, entry, later.progress(entry.id)))


def _streamed(later: Later, id: str, event: dict[str, Any]) -> dict[str, Any] | None:
    """An event of a job for its stream; a preview with its picture, if it is still the newest."""
    if event.get("status") == "progress" and "step" in event:
        return {**event, **progress_of({key: event[key] for key in ("step", "total", "eta") if key in event})}
    if event.get("status") != "preview":
        return event
    newest = later.preview(id)
    if newest is None or newest.step != event["step"]:
        return None
    told = {key: value for key, value in event.items() if key != "image_urls"}
    return {**told, **images_body(newest.images)}


def _wait(request: Request) -> float:
    """Seconds that a client wants to wait for, within what one answer may take."""
    asked = whole(request.args.get("wait"), "wait", _USUAL_WAIT, low=_WAIT[0], high=_WAIT[1])
    return min(asked / 1000, max(1.0, request.app.config.RESPONSE_TIMEOUT - 30))


def _service(request: Request) -> Service:
    service: Service = request.app.ctx.service
    return service


def _later(request: Request) -> Later:
    return _service(request).later


def _json(body: dict[str, Any]) -> HTTPResponse:
    return HTTPResponse(orjson.dumps(body, default=str), content_type="application/json")
