"""The operations of ``http/jobs.py``."""

from __future__ import annotations

from api.http.openapi.codes import ADMISSION
from api.http.openapi.native import FIRST, KEY, accepted
from api.http.openapi.parts import (
    JSON,
    Answer,
    Body,
    Operation,
    Operations,
    Schema,
    array,
    header,
    maybe,
    number,
    obj,
    path,
    query,
    ref,
    text,
    whole,
    words,
)
from api.http.openapi.parts import answer as of
from api.http.openapi.schemas import ABOUT, JOB_EXAMPLE, STATE, UNTIL_THEN
from api.schema.videos import FILE_FORMATS
from api.settings import Settings

_ID = path("id", text(minLength=1), "what `POST /jobs` answered", "15dfccd203f24d9f")
OWN_ID = path("id", text(pattern="^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$"), "such as a UUID", "my-own-id")
_NUMBER = path("n", text(pattern="^[0-9]{1,18}$"), "the number of the image, from 0", "0")
_EVENT = obj(
    {
        "seq": whole("its number among the events of the job", 1),
        "type": words("state", "download", "extract", "convert", "upload", "loadModel", "inference", "upscale"),
        "state": STATE,
        "status": words("start", "progress", "preview", "done"),
        "time": whole("milliseconds since 1970"),
        "step": whole(),
        "total": maybe(whole()),
        "eta": maybe(number("seconds to go")),
        "image_urls": array(text()),
    },
    "state", "status", "step", "total", "eta", "image_urls",
    additionalProperties=True,
)  # fmt: skip
_SENT = obj(
    {"id": text("its number"), "data": text("JSON", contentMediaType=JSON, contentSchema=_EVENT)},
    description="One event. Comments come between them, so that the connection is not taken for dead.",
)
_EVENT_EXAMPLE = {"seq": 1, "type": "state", "state": "IN_QUEUE", "time": 1795286406268}


def operations(_: Settings) -> Operations:
    """All of them."""
    listed = obj({"jobs": array(obj(ABOUT, *UNTIL_THEN))})
    pictures: dict[str, Schema] = {found.content_type: {} for found in FILE_FORMATS.values()}
    events = obj(
        {"id": text(), "state": STATE, "queuePosition": whole(minimum=1), "events": array(_EVENT)}, "queuePosition"
    )
    told = {"id": JOB_EXAMPLE["id"], "state": "IN_QUEUE", "queuePosition": 1, "events": [_EVENT_EXAMPLE]}
    cancelled = {name: value for name, value in JOB_EXAMPLE.items() if name != "progress"} | {"state": "CANCELLED"}
    as_links = query("images", words("base64", "url"), "`url`: results and previews hold links in place of the images")
    return {
        "POST /jobs": Operation(
            id="createJob",
            tag="Jobs for later",
            summary="Send a job for later",
            description="The body is that of `POST /`, and `priority`. What can be said against it is said at once.",
            parameters=(KEY,),
            body=Body({JSON: ref("JobRequest")}, {"urgent": {**FIRST, "priority": "high"}, "an image": FIRST}),
            answers={202: accepted()},
            errors=(*ADMISSION, "QUEUE_FULL", "DISK_FULL"),
        ),
        "PUT /jobs/{id}": Operation(
            id="putJob",
            tag="Jobs for later",
            summary="Send a job for later under an id of your own",
            description="Sent again, it is the same job: the way to send it safely without a header.",
            parameters=(OWN_ID, KEY),
            body=Body({JSON: ref("JobRequest")}, {"an image": FIRST}),
            answers={202: accepted()},
            errors=(*ADMISSION, "QUEUE_FULL", "DISK_FULL"),
        ),
        "GET /jobs": Operation(
            id="listJobs",
            tag="Jobs for later",
            summary="The newest jobs",
            parameters=(query("limit", whole(minimum=1, maximum=1000, default=100), "how many"),),
            answers={200: of("The newest first.", listed, one={"jobs": [cancelled]})},
            errors=("INVALID_INPUTS",),
        ),
        "GET /jobs/{id}": Operation(
            id="getJob",
            tag="Jobs for later",
            summary="Look at a job",
            parameters=(_ID, as_links),
            answers={200: of("As it is now, with its result once it is there.", ref("Job"), runs=JOB_EXAMPLE)},
            errors=("INVALID_INPUTS", "NO_SUCH_JOB"),
        ),
        "DELETE /jobs/{id}": Operation(
            id="cancelJob",
            tag="Jobs for later",
            summary="Cancel a job",
            parameters=(_ID,),
            answers={200: of("As it is now. One that was over stays as it was.", ref("Job"), cancelled=cancelled)},
            errors=("NO_SUCH_JOB", "NOT_READY"),
        ),
        "GET /jobs/{id}/events": Operation(
            id="getJobEvents",
            tag="Jobs for later",
            summary="Watch a job",
            description=(
                "Server-sent events, unless `Accept` asks for lines of JSON (`application/x-ndjson`) or for all events "
                "that there are now (`application/json`). Ends when the job is over."
            ),
            parameters=(
                _ID,
                query("after", text(pattern="^[0-9]{0,18}$"), "the number of the last event that is known"),
                header("Last-Event-ID", text(pattern="^[0-9]{0,18}$"), "the same, as an `EventSource` sends it"),
            ),
            answers={
                200: Answer(
                    "What happens, in order.",
                    {"text/event-stream": _SENT, "application/x-ndjson": array(_EVENT), JSON: events},
                    {"Cache-Control": text()},
                    {"waits": told},
                ),
                204: Answer("It is over, and all of its events are known."),
            },
            errors=("INVALID_INPUTS", "NO_SUCH_JOB", "NOT_ACCEPTABLE", "NOT_READY"),
        ),
        "GET /jobs/{id}/images/{n}": Operation(
            id="getJobImage",
            tag="Jobs for later",
            summary="Fetch an image",
            parameters=(_ID, _NUMBER),
            answers={200: Answer("The image.", pictures, {"Cache-Control": text()})},
            errors=("INVALID_INPUTS", "NO_SUCH_JOB", "NOT_FOUND"),
        ),
        "GET /jobs/{id}/previews/{n}": Operation(
            id="getJobPreview",
            tag="Jobs for later",
            summary="Fetch the newest preview of an image",
            parameters=(_ID, _NUMBER),
            answers={
                200: Answer(
                    "The preview.", {"image/jpeg": {}}, {"Cache-Control": text(), "X-Step": text("after which step")}
                )
            },
            errors=("INVALID_INPUTS", "NO_SUCH_JOB", "NOT_FOUND"),
        ),
    }
