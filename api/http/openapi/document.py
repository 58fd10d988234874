"""Puts the tables of operations together: one OpenAPI 3.1 document (https://spec.openapis.org/oas/v3.1.1)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from sanic import Sanic

from api import __version__
from api.errors import CODES
from api.http.openapi import docs, health, inputs, jobs, metrics, models, native, runpod, usage, webhooks
from api.http.openapi.parts import JSON, Answer, Operation, Operations, Schema, ref, text, whole
from api.http.openapi.schemas import ERROR_EXAMPLE, SCHEMAS
from api.settings import Settings

VERSION = "3.1.1"
TABLES = (native, jobs, runpod, webhooks, models, usage, health, metrics, docs)
TAGS = {
    "Generate": "A request, and its images as the answer.",
    "Jobs for later": "Sent now, run when it is their turn, looked at when the client likes.",
    "RunPod": "Jobs for later as RunPod's serverless API has them: its clients work as they are.",
    "Webhooks": "Those that have not arrived.",
    "Models": "What there is, what it accepts, and where it is.",
    "Keys": "What they have had, and what they may.",
    "Health": "For load balancers and people.",
    "Documents": "This description.",
}
_EVERYWHERE = ("HEADERS_TOO_LARGE", "INTERNAL_ERROR")
_WITH_KEYS = ("UNAUTHORIZED", "TOO_MANY_WRONG_KEYS")
_BEGINNING = ("RATE_LIMITED", "TOO_MANY_JOBS")
"""Where there are keys, of what begins a job: that is, what may find the queue full."""
_SECURITY: list[dict[str, list[str]]] = [{"bearer": []}, {"basic": []}]
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key of API_KEYS."},
    "basic": {"type": "http", "scheme": "basic", "description": "A key of API_KEYS as the password, any user name."},
}
_HEADERS = {
    "X-Request-Id": {"description": "What the server's log knows the request by.", "schema": text()},
    "WWW-Authenticate": {"description": "How a key is sent: `Bearer` or `Basic`.", "schema": text()},
    "Retry-After": {"description": "Seconds after which trying again makes sense.", "schema": whole(minimum=1)},
}
_DESCRIPTION = """\
One container that serves diffusers models and switches between them per request.

Errors have a true HTTP status and say what to change: `{"$error": {"code", "message", …}}`. Every answer has the header
`X-Request-Id`; a client may choose it. Where as many connections are open as the server takes, each request is answered
with a 503 `TOO_MANY_CONNECTIONS`.
"""


def routes(app: Sanic) -> set[str]:
    """Every method and path that the app answers, as OpenAPI writes them; ``OPTIONS`` is CORS's, and left out."""
    found = set()
    for route in app.router.routes:
        path = re.sub(r"<(\w+)(?::\w+)?>", r"{\1}", f"/{route.path}")
        found |= {f"{method} {path}" for method in route.methods - {"OPTIONS"}}
    return found


def operations(settings: Settings, served: Iterable[str] = ()) -> Operations:
    """Every operation that is described, by method and path.

    Args:
        settings: what depends on them is described as it is on this server.
        served: see ``routes``. Where ``HEAD`` is among them, it is described as the ``GET`` of its path.
    """
    found: Operations = {}
    for table in TABLES:
        described = table.operations(settings)
        assert not found.keys() & described.keys(), found.keys() & described.keys()
        found |= described
    heads = {route: found[get] for route in served if (get := route.replace("HEAD ", "GET ")) != route and get in found}
    return found | {route: _head(operation) for route, operation in heads.items()}


def document(settings: Settings, served: Iterable[str]) -> dict[str, Any]:
    """The whole description.

    Args:
        settings: the limits of this server, and whether it asks for keys.
        served: see ``routes``.
    """
    paths: dict[str, Any] = {}
    used = []
    for route, operation in operations(settings, sorted(served)).items():
        method, path = route.split(" ")
        paths.setdefault(path, {})[method.lower()] = _operation(operation, settings)
        used.append(operation.tag)
    return {
        "openapi": VERSION,
        "info": {
            "title": "diffusers-api",
            "version": __version__,
            "description": _DESCRIPTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": meaning} for name, meaning in TAGS.items() if name in used],
        "security": [*([] if _needs_key(settings) else [{}]), *_SECURITY],
        "paths": paths,
        "components": {
            "schemas": {**inputs.schemas(settings), **SCHEMAS, **runpod.schemas(settings)},
            "headers": _HEADERS,
            "securitySchemes": _SCHEMES,
        },
    }


def _needs_key(settings: Settings) -> bool:
    return bool(settings.api_keys)


def _head(operation: Operation) -> Operation:
    answers = {status: Answer(found.description) for status, found in operation.answers.items()}
    return Operation(
        id=f"{operation.id}Head",
        tag=operation.tag,
        summary=f"{operation.summary} (without the body)",
        parameters=operation.parameters,
        answers=answers,
        open=operation.open,
    )


def _operation(found: Operation, settings: Settings) -> dict[str, Any]:
    said: dict[str, Any] = {"operationId": found.id, "tags": [found.tag], "summary": found.summary}
    if found.description:
        said["description"] = found.description
    if found.parameters:
        said["parameters"] = list(found.parameters)
    if found.body:
        content: dict[str, Any] = {kind: {"schema": schema} for kind, schema in found.body.content.items()}
        next(iter(content.values()))["examples"] = _examples(found.body.examples)
        said["requestBody"] = {"required": found.body.required, "content": content}
    said["responses"] = {str(status): _answer(answer) for status, answer in found.answers.items()}
    for status, codes in sorted(_by_status(found, settings).items()):
        said["responses"][str(status)] = _error(codes, found)
    if found.open:
        said["security"] = []
    if found.deprecated:
        said["deprecated"] = True
    return said


def _by_status(found: Operation, settings: Settings) -> dict[int, list[str]]:
    """The codes of an operation's errors, by status."""
    codes = dict.fromkeys((*found.errors, *_EVERYWHERE))
    if _needs_key(settings) and not found.open:
        codes |= dict.fromkeys((*_WITH_KEYS, *(_BEGINNING if "QUEUE_FULL" in codes else ())))
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(CODES[code][0], []).append(code)
    return by_status


def _answer(answer: Answer) -> dict[str, Any]:
    headers: dict[str, Any] = {"X-Request-Id": {"$ref": "#/components/headers/X-Request-Id"}}
    headers |= {name: {"schema": schema} for name, schema in answer.headers.items()}
    said: dict[str, Any] = {"description": answer.description, "headers": headers}
    if answer.content:
        said["content"] = {kind: {"schema": schema} if schema else {} for kind, schema in answer.content.items()}
        if answer.examples:
            said["content"][JSON]["examples"] = _examples(answer.examples)
    if answer.links:
        said["links"] = answer.links
    return said


def _error(codes: list[str], found: Operation) -> dict[str, Any]:
    headers = ["X-Request-Id"]
    if {"QUEUE_FULL", "NOT_READY", "TOO_MANY_WRONG_KEYS"} & {*codes}:
        headers.append("Retry-After")
    if "UNAUTHORIZED" in codes:
        headers.append("WWW-Authenticate")
    only: Schema = {"properties": {"$error": {"properties": {"code": {"enum": codes}}}}}
    example: dict[str, Any] = {
        "$error": {"code": codes[0], "message": CODES[codes[0]][1], "requestId": "3f0c9a1be2d47c55"}
    }
    if "INVALID_INPUTS" in codes:
        example = ERROR_EXAMPLE
    if found.error != "Error":
        said = example["$error"]
        example = {"error": f"{said['code']}: {said['message']}", **example}
    content = {"schema": {"allOf": [ref(found.error), only]}, "example": example}
    return {
        "description": "  \n".join(f"`{code}`: {CODES[code][1]}" for code in codes),
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in headers},
        "content": {JSON: content},
    }


def _examples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: {"value": value} for name, value in values.items()}
