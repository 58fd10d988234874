"""The operations of ``http/runpod.py``, under ``/v2`` and, for old clients, ``/v1``."""

from __future__ import annotations

from typing import Any

import msgspec

from api.http.openapi.codes import ADMISSION
from api.http.openapi.inputs import options
from api.http.openapi.jobs import OWN_ID
from api.http.openapi.native import FIRST, KEY
from api.http.openapi.parts import (
    JSON,
    Answer,
    Body,
    Operation,
    Operations,
    Schema,
    array,
    flag,
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
from api.http.openapi.schemas import ERROR, PIXEL, STATE
from api.service.describe import schema_of_all
from api.settings import Settings

_WEEK = 7 * 86_400_000
_ENDPOINT = path("endpoint", text(minLength=1), "any word; each has its own jobs", "shapes")
_ID = path("id", text(minLength=1), "what `run` answered", "15dfccd203f24d9f")
_OWN = {**OWN_ID, "example": "my-own-runpod-id"}
_WAIT = query("wait", whole(minimum=1000, maximum=300_000, default=90_000), "milliseconds to wait for the job's end")
_SEND = (*ADMISSION, "QUEUE_FULL", "DISK_FULL")
_FIND = ("NO_SUCH_JOB", "NOT_READY")

_OUTPUT: Schema = {"type": "object", "description": "progress; at the end the answer, in the form of the input"}
_STATUS = {
    "id": text(),
    "status": STATE,
    "delayTime": whole("milliseconds that it waited"),
    "executionTime": whole("milliseconds that it ran"),
    "workerId": text("which device ran it"),
    "output": _OUTPUT,
    "error": text("why it failed"),
}
_LATER = ("delayTime", "executionTime", "workerId", "output", "error")
_EXAMPLE: dict[str, Any] = {
    "id": "15dfccd203f24d9f", "status": "COMPLETED", "delayTime": 4, "executionTime": 412, "workerId": "cpu",
    "output": {"image": PIXEL, "seed": 1, "meta": {"MODEL_ID": "demo/shapes"}, "timings": {"inference": 400}},
}  # fmt: skip
_BRIEF = obj({"id": text(), "status": STATE})
_ACCEPTED = {"id": "15dfccd203f24d9f", "status": "IN_QUEUE"}
_LINKED = {"id": "$response.body#/id", "endpoint": "$request.path.endpoint"}
_LINKS = {
    f"{name}{way}": {"operationId": f"runpod{name}{way}", "parameters": _LINKED}
    for name in ("Status", "StatusSync", "Stream", "Cancel")
    for way in ("", "Post")
}
_HEALTH = obj(
    {
        "jobs": obj({name: whole() for name in ("completed", "failed", "inProgress", "inQueue", "retried")}),
        "workers": obj({name: whole() for name in ("idle", "initializing", "ready", "running", "throttled")}),
    }
)
_HEALTHY = {
    "jobs": {"completed": 1, "failed": 0, "inProgress": 0, "inQueue": 0, "retried": 0},
    "workers": {"idle": 1, "initializing": 0, "ready": 1, "running": 0, "throttled": 0},
}
_SIMPLE = {"input": {"prompt": "a red circle on a blue background", "num_inference_steps": 10, "seed": 7}}
_BODIES = {
    "simple": _SIMPLE,
    "native": {"input": FIRST},
    "with a policy": {**_SIMPLE, "policy": {"executionTimeout": 60_000, "ttl": 3_600_000, "lowPriority": True}},
}


def schemas(settings: Settings) -> dict[str, Schema]:
    """What only these routes have.

    Args:
        settings: the limits of this server.
    """
    named = {"ModelInputs": schema_of_all(settings)["properties"], "CallInputs": options()}
    inputs = {
        name: {"$ref": f"#/components/schemas/{half}/properties/{name}"} for half in named for name in named[half]
    }
    return {
        "RunpodSimpleInput": {
            "type": "object",
            "properties": inputs,
            "additionalProperties": False,
            "minProperties": 1,
            "description": "`modelInputs` and `callInputs` side by side.",
        },
        "RunpodRequest": _request(),
        "RunpodStatus": obj(_STATUS, *_LATER),
        "RunpodError": obj({"error": text("the same as a sentence"), **ERROR["properties"]}),
    }


def _request() -> Schema:
    least = {"executionTimeout": 5_000, "ttl": 10_000}
    times = {name: maybe(number("milliseconds", low, maximum=_WEEK)) for name, low in least.items()}
    policy = {**times, "lowPriority": maybe(flag())}
    keys = {
        name: text(minLength=1, maxLength=1024) for name in ("accessId", "accessSecret", "bucketName", "endpointUrl")
    }
    s3 = {**keys, "objectPath": maybe(text("a folder in the bucket", maxLength=1024))}
    return obj(
        {
            "input": {"anyOf": [ref("Request"), ref("RunpodSimpleInput")]},
            "webhook": maybe(text("where the job's end is told to", maxLength=8192)),
            "policy": maybe(obj(policy, *policy, additionalProperties=False)),
            "s3Config": maybe(obj(s3, "objectPath", additionalProperties=False, description="where the images go")),
        },
        "webhook", "policy", "s3Config",
        additionalProperties=False,
    )  # fmt: skip


def operations(_: Settings) -> Operations:
    """All of them; those of ``/v1`` are the same."""
    found: Operations = {}
    for route, operation in _second_version().items():
        method, rest = route.split(" ")
        old = msgspec.structs.replace(operation, id=f"{operation.id}V1", deprecated=True)
        found |= {f"{method} /v2/{{endpoint}}/{rest}": operation, f"{method} /v1/{{endpoint}}/{rest}": old}
    return found


def _second_version() -> Operations:
    send = Body({JSON: ref("RunpodRequest")}, _BODIES)
    again = Body({JSON: ref("RunpodRequest")}, {"simple": _SIMPLE})
    accepted = Answer("It is safe on the disk.", {JSON: _BRIEF}, examples={"waits": _ACCEPTED}, links=_LINKS)
    status = of("The job.", ref("RunpodStatus"), completed=_EXAMPLE)
    streamed = obj({**_STATUS, "stream": array(obj({"output": _OUTPUT}))}, *_LATER)
    cancelled = of("The job.", _BRIEF, cancelled={**_ACCEPTED, "status": "CANCELLED"})
    purged = obj({"removed": whole(), "status": words("completed")})
    nothing = {"id": _ACCEPTED["id"], "status": "IN_PROGRESS", "delayTime": 4, "stream": []}
    found = {
        "POST run": _of("Run", "Send a job", accepted, _SEND, (_ENDPOINT, KEY), send),
        "POST runsync": _of(
            "RunSync", "Send a job, and wait for its end", status, (*_SEND, "NO_SUCH_JOB"), (_ENDPOINT, _WAIT, KEY),
            again,
        ),
        "PUT jobs/{id}": _of(
            "Put", "Send a job under an id of your own", accepted, _SEND, (_ENDPOINT, _OWN, KEY), again
        ),
        "GET health": _of("Health", "Count jobs and workers", of("By what they are at.", _HEALTH, idle=_HEALTHY)),
    }  # fmt: skip
    either = {
        "status/{id}": _of("Status", "Look at a job", status, _FIND, (_ENDPOINT, _ID)),
        "status-sync/{id}": _of(
            "StatusSync", "Wait for a job's end", status, ("INVALID_INPUTS", *_FIND), (_ENDPOINT, _ID, _WAIT)
        ),
        "stream/{id}": _of(
            "Stream", "What no answer has told yet", of("Steps, previews, the output.", streamed, nothing=nothing),
            _FIND, (_ENDPOINT, _ID),
        ),
        "cancel/{id}": _of("Cancel", "Cancel a job", cancelled, _FIND, (_ENDPOINT, _ID)),
    }  # fmt: skip
    for rest, operation in either.items():
        by_post = msgspec.structs.replace(operation, id=f"{operation.id}Post", summary=f"{operation.summary}, by POST")
        found |= {f"GET {rest}": operation, f"POST {rest}": by_post}
    return {
        **found,
        "POST retry/{id}": _of(
            "Retry", "Run a job once more that failed", of("It waits again.", _BRIEF, waits=_ACCEPTED),
            ("INVALID_INPUTS", *_FIND, "QUEUE_FULL", "DISK_FULL"), (_ENDPOINT, _ID),
        ),
        "POST purge-queue": _of(
            "PurgeQueue", "Cancel what waits",
            of("How many jobs were cancelled.", purged, three={"removed": 3, "status": "completed"}),
            ("NOT_READY", "DISK_FULL"),
        ),
    }  # fmt: skip


def _of(
    name: str,
    summary: str,
    answer: Answer,
    errors: tuple[str, ...] = (),
    parameters: tuple[dict[str, Any], ...] = (_ENDPOINT,),
    body: Body | None = None,
) -> Operation:
    return Operation(
        id=f"runpod{name}",
        tag="RunPod",
        summary=summary,
        parameters=parameters,
        body=body,
        answers={200: answer},
        errors=errors,
        error="RunpodError",
    )
