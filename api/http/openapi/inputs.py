"""``modelInputs`` and ``callInputs`` as JSON Schema, from the tables that requests are checked against."""

from __future__ import annotations

from typing import Any

from api.http.openapi.parts import Schema, maybe, obj, ref, words
from api.service.describe import schema_of_all
from api.service.intake import PRIORITIES
from api.service.options import LATER, OPTIONS
from api.settings import Settings

NOT_SENT: Schema = {"enum": [None, ""], "description": "The same as if it had not been sent."}
_EMPTY: list[Any] = [None, "", False, 0, [], {}]


def schemas(settings: Settings) -> dict[str, Schema]:
    """The two halves of a request, and the whole of it.

    Args:
        settings: the limits of this server.
    """
    inputs = schema_of_all(settings)
    inputs["description"] = (
        "What the pipeline gets: the arguments of its `__call__`, and `seed`. Which of them there are depends on the "
        "model and on the pipeline: `GET /models/{model_id}/schema` tells those of one model."
    )
    halves = {"modelInputs": ref("ModelInputs"), "callInputs": maybe(ref("CallInputs"))}
    priority = maybe(words(*PRIORITIES, description="within one, the oldest goes first"))
    return {
        "ModelInputs": inputs,
        "CallInputs": _call_inputs(),
        "Request": obj(halves, "callInputs", additionalProperties=False),
        "JobRequest": obj({**halves, "priority": priority}, "callInputs", "priority", additionalProperties=False),
    }


def options(*left_out: str) -> dict[str, Schema]:
    """Each of the ``callInputs``."""
    return {name: _option(name) for name in OPTIONS if name not in left_out}


def _call_inputs() -> Schema:
    later = {name: {"enum": _EMPTY, "description": f"Not offered: {why}."} for name, why in LATER.items()}
    description = "How to run it. A name that is not here is refused with the nearest one that is."
    properties = {**options(), **later}
    return {"type": "object", "properties": properties, "additionalProperties": False, "description": description}


def _option(name: str) -> Schema:
    option = OPTIONS[name]
    said: dict[str, Any] = {
        "description": f"{option.meaning[0].upper()}{option.meaning[1:]}. Default: {option.default}.",
        "examples": [option.example],
    }
    schema = dict(option.schema)
    if schema.get("type") == "string" and "enum" not in schema:
        return {**schema, "type": ["string", "null"], **said}
    return {"anyOf": [*schema.pop("anyOf", [schema]), NOT_SENT], **said}
