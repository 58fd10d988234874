"""The operations of ``http/models.py`` and ``http/schedulers.py``."""

from __future__ import annotations

from typing import Any

from api.http.openapi.codes import ADMISSION, FETCH, NAMING
from api.http.openapi.inputs import options
from api.http.openapi.parts import (
    JSON,
    Body,
    Operation,
    Operations,
    Schema,
    array,
    flag,
    maybe,
    obj,
    path,
    query,
    ref,
    text,
    whole,
    words,
)
from api.http.openapi.parts import answer as of
from api.settings import Settings

_NAMES = ("MODEL_ID", "HF_MODEL_ID", "MODEL_REVISION", "MODEL_PRECISION", "MODEL_URL", "CHECKPOINT_URL")
_TIER = words("device", "host", "disk", description="the highest one that has all of it")
_RESIDENCE: dict[str, Schema] = {
    "tier": _TIER,
    "leases": whole("jobs that hold it"),
    "last_used": maybe(whole("milliseconds since 1970")),
    "pinned": maybe(text("the tier that it is pinned to")),
}
_MEMORY = array(
    obj(
        {
            "worker": text(),
            "device": obj({"bytes": whole(), "limit": whole(), "peak": whole()}),
            "host": obj({"bytes": whole(), "limit": whole()}),
        }
    ),
    description="how full each worker's memory is",
)
_HOST = maybe(
    obj(
        {"held": whole("of what a worker has"), "kept": whole("of what none has now"), "limit": whole()},
        description="bytes of the host's memory that several workers share, each part counted once",
    )
)
_MODEL = obj(
    {
        "MODEL_ID": text(),
        "MODEL_REVISION": text(),
        **_RESIDENCE,
        "installed": flag("its files are on the volume"),
        "key": maybe(text("its folder there")),
        "source": maybe(text("where it came from")),
        "bytes": obj({"disk": whole(), "host": whole(), "device": whole()}),
        "class": maybe(text("the pipeline class that it was saved as")),
        "part": maybe(text()),
        "scheduler": maybe(text()),
        "pipelines": array(text(), description="that it can be run with"),
        "default": flag("what holds where a request names none"),
    }
)
_UPSCALER = obj(
    {
        "model": text("as `upscale.model` takes it"),
        "sha256": text(),
        "source": maybe(text("where it came from")),
        **_RESIDENCE,
        "bytes": obj({"disk": whole(), "host": whole(), "device": whole()}),
    }
)
_HELD = obj({**_RESIDENCE, "bytes": obj({"host": whole(), "device": whole()}), "memory": _MEMORY})
_ROOM = [{"worker": "cpu", "device": {"bytes": 0, "limit": 2**33, "peak": 0}, "host": {"bytes": 0, "limit": 2**33}}]
_HELD_EXAMPLE = {
    "tier": "device",
    "bytes": {"host": 20582676, "device": 20582676},
    "leases": 0,
    "last_used": 1795286408609,
    "pinned": None,
    "memory": _ROOM,
}
_MODEL_EXAMPLE = {
    "MODEL_ID": "demo/shapes", "MODEL_REVISION": "015eddedad3c", "tier": "disk",
    "bytes": {"disk": 10332422, "host": 0, "device": 0}, "leases": 0, "last_used": None, "pinned": None,
    "installed": True, "key": None, "source": None, "class": "StableDiffusionPipeline", "part": None,
    "scheduler": "DPMSolverMultistepScheduler", "pipelines": ["StableDiffusionPipeline"], "default": True,
}  # fmt: skip


def operations(_: Settings) -> Operations:
    """All of them."""
    named = _named()
    listing = obj(
        {
            "models": array(_MODEL), "upscalers": array(_UPSCALER), "transfers": array(ref("Transfer")),
            "memory": _MEMORY, "host": _HOST,
        }
    )  # fmt: skip
    listed = {"models": [_MODEL_EXAMPLE], "upscalers": [], "transfers": [], "memory": _ROOM, "host": None}
    return {
        "GET /models": Operation(
            id="listModels",
            tag="Models",
            summary="Every model that is here",
            answers={200: of("Where their weights are, what comes, and how full the memory is.", listing, one=listed)},
        ),
        "GET /models/{model_id}/schema": Operation(
            id="getModelSchema",
            tag="Models",
            summary="What a model accepts",
            description="Its `modelInputs` as JSON Schema, its pipelines, schedulers and sizes.",
            parameters=(
                path("model_id", text(minLength=1), "as `MODEL_ID`; its slash may be sent as `%2F`", "demo/shapes"),
                query("PIPELINE", text(maxLength=200), "one of its pipelines, where it is not the one for texts alone"),
                query("MODEL_REVISION", text(maxLength=200), "which revision"),
                query("SCHEDULER", text(maxLength=200), "to be told whether the model can be run with it"),
            ),
            answers={200: of("What it accepts.", _accepts(), shapes=_ACCEPTS_EXAMPLE)},
            errors=(*ADMISSION, *FETCH),
        ),
        "POST /models/load": Operation(
            id="loadModel",
            tag="Models",
            summary="Bring a model into memory",
            description="Answered when it is there: fetched first, where it is not here.",
            body=Body(
                {JSON: _body(words("device", "host"), {"pin": flag("it is not evicted from there")})},
                {"to the device": {"MODEL_ID": "demo/shapes"}, "pinned": {"MODEL_ID": "demo/shapes", "pin": True}},
            ),
            answers={200: of("Where it is now.", _HELD, device=_HELD_EXAMPLE)},
            errors=(*ADMISSION, *FETCH, "OUT_OF_MEMORY", "WORKER_DIED"),
        ),
        "POST /models/unload": Operation(
            id="unloadModel",
            tag="Models",
            summary="Have a model leave memory",
            description="What jobs still use leaves when they are done. `host` keeps it in the host's memory.",
            body=Body(
                {JSON: _body(words("disk", "host"), {})}, {"all of it": {"MODEL_ID": "demo/shapes"}}, required=False
            ),
            answers={200: of("What is left of it.", _HELD, gone={**_HELD_EXAMPLE, "tier": "disk"})},
            errors=("INVALID_JSON", "BODY_TOO_LARGE", *NAMING, "NOT_READY", "TIMED_OUT", "WORKER_DIED"),
        ),
        "GET /schedulers": Operation(
            id="listSchedulers",
            tag="Models",
            summary="What can be asked for as SCHEDULER",
            description="With a `MODEL_ID` each says whether it suits that model.",
            parameters=tuple(query(name, named[name], str(named[name]["description"])) for name in _NAMES),
            answers={
                200: of("Every scheduler class: its names, its arguments, what it needs.", _schedulers(), one=_DDIM)
            },
            errors=NAMING,
        ),
    }


def _named() -> dict[str, Schema]:
    found = options()
    return {name: {**found[name], "type": "string"} for name in _NAMES}


def _body(tiers: Schema, more: dict[str, Schema]) -> Schema:
    properties = {"callInputs": maybe(ref("CallInputs")), "tier": maybe(tiers), **more, **options()}
    return {"type": "object", "properties": properties}


_ARGUMENT = obj({"types": array(text()), "default": {}, "choices": array({})}, "choices")
_DDIM = {
    "schedulers": [
        {
            "name": "DDIMScheduler",
            "aliases": ["DDIM"],
            "library": None,
            "installed": True,
            "args": {"steps_offset": {"types": ["integer"], "default": 0}},
        }
    ]
}


def _schedulers() -> Schema:
    scheduler = obj(
        {
            "name": text("the class"),
            "aliases": array(text(), description="other names that are taken"),
            "library": maybe(text("what it needs beside diffusers")),
            "installed": flag("whether that is there"),
            "compatible": flag("the model can be run with it"),
            "suits": flag("it is made for such models"),
            "reason": maybe(text("why not")),
            "args": {"type": "object", "additionalProperties": _ARGUMENT},
        },
        "compatible", "suits", "reason",
    )  # fmt: skip
    return obj(
        {"MODEL_ID": text(), "SCHEDULER": text("its own"), "schedulers": array(scheduler)}, "MODEL_ID", "SCHEDULER"
    )


_ACCEPTS_EXAMPLE: dict[str, Any] = {
    "MODEL_ID": "demo/shapes",
    "MODEL_REVISION": "015eddedad3c",
    "class": "StableDiffusionPipeline",
    "pipeline": "StableDiffusionPipeline",
    "makes": "image",
    "pipelines": ["StableDiffusionPipeline"],
    "auto": {"AutoPipelineForText2Image": "StableDiffusionPipeline"},
    "scheduler": "DPMSolverMultistepScheduler",
    "schedulers": ["DDIMScheduler"],
    "size": {"multiple": 8, "default": 64, "max_pixels": 4194304},
    "modelInputs": {"type": "object", "properties": {"prompt": {"type": "string"}}, "required": ["prompt"]},
}


def _accepts() -> Schema:
    size = {"multiple": whole(minimum=1), "default": maybe(whole()), "max_pixels": whole()}
    return obj(
        {
            "MODEL_ID": text(),
            "MODEL_REVISION": text(),
            "class": text("the pipeline class that it was saved as"),
            "pipeline": text("the one that the inputs are of"),
            "makes": words("image", "video"),
            "pipelines": array(text()),
            "auto": {"type": "object", "additionalProperties": text(), "description": "what the AutoPipelines mean"},
            "scheduler": maybe(text()),
            "schedulers": array(text()),
            "size": obj(size),
            "modelInputs": {"type": "object", "description": "JSON Schema, draft 2020-12"},
        }
    )
