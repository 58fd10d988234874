"""What the tables of operations are made of."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

Schema: TypeAlias = dict[str, Any]
"""JSON Schema, draft 2020-12."""
JSON = "application/json"


class Answer(msgspec.Struct, frozen=True):
    """What an operation answers, where it goes well.

    Attributes:
        description: what it is.
        content: schema by media type; none: no body.
        headers: those beside ``X-Request-Id``, with what they say.
        examples: values by name, of JSON.
        links: OpenAPI's, by name: what can be done with it.
    """

    description: str
    content: dict[str, Schema] = {}
    headers: dict[str, Schema] = {}
    examples: dict[str, Any] = {}
    links: dict[str, Any] = {}


class Body(msgspec.Struct, frozen=True):
    """What is sent with a request.

    Attributes:
        content: schema by media type, the usual one first.
        examples: values by name, of the first media type. The first one is what clients are made with.
        required: it cannot be left out.
    """

    content: dict[str, Schema]
    examples: dict[str, Any]
    required: bool = True


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path.

    Attributes:
        id: its name for programs, lowerCamelCase.
        tag: the group that it is shown in; a key of ``document.TAGS``.
        summary: a few words.
        description: the rest, as CommonMark.
        parameters: see ``path``, ``query`` and ``header``.
        body: what is sent.
        answers: by status.
        errors: codes of ``api.errors.CODES``; what every route may answer is added.
        open: it needs no key where others do.
        error: name of the schema of errors.
        deprecated: it is there for old clients.
    """

    id: str
    tag: str
    summary: str
    description: str = ""
    parameters: tuple[dict[str, Any], ...] = ()
    body: Body | None = None
    answers: dict[int, Answer]
    errors: tuple[str, ...] = ()
    open: bool = False
    error: str = "Error"
    deprecated: bool = False


Operations: TypeAlias = dict[str, Operation]
"""By method and path, such as ``GET /jobs/{id}``."""


def ref(name: str) -> Schema:
    """One of the schemas in ``schemas.SCHEMAS``."""
    return {"$ref": f"#/components/schemas/{name}"}


def body(schema: Schema, **examples: Any) -> Body:
    """A JSON body."""
    return Body({JSON: schema}, examples)


def answer(description: str, schema: Schema, **examples: Any) -> Answer:
    """A JSON answer."""
    return Answer(description, {JSON: schema}, examples=examples)


def obj(properties: dict[str, Schema], *optional: str, **more: Any) -> Schema:
    """An object that has these properties, all but the optional ones always."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, **({"required": required} if required else {}), **more}


def array(items: Schema, **more: Any) -> Schema:
    """A list."""
    return {"type": "array", "items": items, **more}


def text(description: str = "", **more: Any) -> Schema:
    """A string."""
    return {"type": "string", **({"description": description} if description else {}), **more}


def words(*among: str, description: str = "") -> Schema:
    """One of a few strings."""
    return text(description, enum=list(among))


def whole(description: str = "", minimum: int | None = 0, **more: Any) -> Schema:
    """A whole number."""
    limits = {} if minimum is None else {"minimum": minimum}
    return {"type": "integer", **limits, **({"description": description} if description else {}), **more}


def number(description: str = "", minimum: float | None = 0, **more: Any) -> Schema:
    """A number."""
    return {**whole(description, None, **more), "type": "number", **({} if minimum is None else {"minimum": minimum})}


def flag(description: str = "") -> Schema:
    """True or false."""
    return {"type": "boolean", **({"description": description} if description else {})}


def maybe(schema: Schema) -> Schema:
    """The same, or null."""
    if isinstance(schema.get("type"), str) and "enum" not in schema:
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def path(name: str, schema: Schema, description: str, example: Any) -> dict[str, Any]:
    """A part of the path."""
    return {
        "name": name, "in": "path", "required": True, "description": description, "schema": schema, "example": example,
    }  # fmt: skip


def query(name: str, schema: Schema, description: str) -> dict[str, Any]:
    """A parameter behind the question mark; an empty one is as if it had not been sent."""
    if schema.get("type") != "string" or "enum" in schema:
        schema = {"anyOf": [schema, {"type": "string", "maxLength": 0}]}
    return {"name": name, "in": "query", "description": description, "schema": schema}


def header(name: str, schema: Schema, description: str) -> dict[str, Any]:
    """A header of the request."""
    return {"name": name, "in": "header", "description": description, "schema": schema}
