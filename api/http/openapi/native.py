"""The operations of ``http/native.py`` and ``http/plan.py``."""

from __future__ import annotations

from typing import Any

from api.http.native import IMAGE_TYPES
from api.http.openapi.codes import ADMISSION, FETCH, RUN
from api.http.openapi.parts import (
    JSON,
    Answer,
    Body,
    Operation,
    Operations,
    Schema,
    array,
    flag,
    header,
    maybe,
    number,
    obj,
    ref,
    text,
    whole,
    words,
)
from api.http.openapi.parts import answer as of
from api.http.openapi.schemas import RESULT_EXAMPLE
from api.settings import Settings

STEPS = 10
FIRST: dict[str, Any] = {
    "modelInputs": {"prompt": "a red circle on a blue background", "num_inference_steps": STEPS, "seed": 7}
}
REQUESTS: dict[str, Any] = {
    "an image": FIRST,
    "another scheduler": {
        "modelInputs": {**FIRST["modelInputs"], "guidance_scale": 5},
        "callInputs": {"MODEL_ID": "demo/shapes", "SCHEDULER": "DDIMScheduler", "image_format": "WEBP"},
    },
    "watched": {**FIRST, "callInputs": {"streamEvents": True}},
    "for later": {**FIRST, "callInputs": {"async": True}},
    "two images": {"modelInputs": {**FIRST["modelInputs"], "num_images_per_prompt": 2, "seed": [1, 2]}},
}
KEY = header(
    "Idempotency-Key",
    text(pattern=r"^[\x21-\x7e]([\x20-\x7e]{0,198}[\x21-\x7e])?$", examples=["order-1"]),
    "Makes it safe to send a job for later again: the same key is the same job, for as long as the job is known.",
)
ACCEPTED_HEADERS: dict[str, Schema] = {"Location": text("where the job is")}
_FIRST_IMAGE = {"id": "$response.body#/id", "n": "0"}
_JOB = {"id": "$response.body#/id"}
LINKS = {
    "look": {"operationId": "getJob", "parameters": _JOB},
    "watch": {"operationId": "getJobEvents", "parameters": _JOB},
    "fetch": {"operationId": "getJobImage", "parameters": _FIRST_IMAGE},
    "peek": {"operationId": "getJobPreview", "parameters": _FIRST_IMAGE},
    "cancel": {"operationId": "cancelJob", "parameters": _JOB},
}


def accepted() -> Answer:
    """A job for later was taken in."""
    example = {"id": "15dfccd203f24d9f", "state": "IN_QUEUE", "queuePosition": 1}
    description = "The job is safe on the disk, and is run when it is its turn."
    return Answer(description, {JSON: ref("JobAccepted")}, ACCEPTED_HEADERS, {"waits": example}, LINKS)


def operations(settings: Settings) -> Operations:
    """Both of them."""
    result: Schema = ref("Result")
    if settings.legacy_status:
        result = {"anyOf": [result, ref("Error")]}
    lines = array(
        {"anyOf": [ref("StreamEvent"), result, ref("Error")]},
        description="A JSON object in each line, as things happen; the last one is the answer, or an error.",
    )
    images: dict[str, Schema] = {media_type: {} for media_type in IMAGE_TYPES}
    return {
        "POST /": Operation(
            id="generate",
            tag="Generate",
            summary="Generate images",
            description=(
                "Answered when the images are there. `Accept: image/png` and the like give the image itself, with "
                "`$meta` in the header `X-Meta`; `streamEvents` a line of JSON for everything that happens on the way; "
                "`async` the id of a job for later. A body that is a JSON string which holds the object is read too."
            ),
            parameters=(KEY,),
            body=Body({JSON: ref("Request")}, REQUESTS),
            answers={
                200: Answer(
                    "The images.",
                    {JSON: result, "application/x-ndjson": lines, **images},
                    {
                        "X-Meta": text("`$meta` as JSON, with an image itself"),
                        "X-Timings": text("`$timings` as JSON, with an image itself"),
                        "X-Mem-Usage": text("with an image itself"),
                    },
                    {"an image": RESULT_EXAMPLE},
                ),
                202: accepted(),
            },
            errors=(*ADMISSION, *FETCH, *RUN, "NOT_ACCEPTABLE"),
        ),
        "POST /plan": Operation(
            id="plan",
            tag="Generate",
            summary="Say what a request would take, without running it",
            description="The body is that of `POST /`. Nothing is fetched, and no weights are read.",
            body=Body({JSON: ref("Request")}, {"an image": FIRST}),
            answers={200: of("Whether it fits, how it would be placed, and what it waits for.", _plan(), fits=_FITS)},
            errors=(*ADMISSION, "SOURCE_DENIED", "ARCHIVE_UNSAFE", "TIMED_OUT", "WORKER_DIED"),
        ),
    }


_FITS = {
    "fits": True,
    "placement": "full",
    "tier": "device",
    "bytes": {"fetch": 0, "read": 0, "copy": 0, "model": 20582676},
    "seconds": {"fetch": 0.0, "read": 0.0, "copy": 0.0, "queue": 0.0},
    "MODEL_ID": "demo/shapes",
    "pipeline": "StableDiffusionPipeline",
}


def _plan() -> Schema:
    size, seconds = maybe(whole()), maybe(number())
    return obj(
        {
            "fits": {**maybe(flag()), "description": "null: not known before one like it has run"},
            "placement": maybe(text("how the model would be held")),
            "tier": words("device", "host", "disk", "remote", description="where the model is now"),
            "bytes": obj({"fetch": size, "read": size, "copy": size, "model": size}),
            "seconds": obj({"fetch": seconds, "read": seconds, "copy": seconds, "queue": seconds}),
            "MODEL_ID": text(),
            "pipeline": maybe(text()),
            "why": text("why it does not fit, or why that is not known"),
        },
        "why",
    )
