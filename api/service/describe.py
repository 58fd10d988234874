"""What requests may say to a model: the inputs of a pipeline as JSON Schema, and what there is to choose from."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from api.errors import ApiError
from api.models.community import Community, community, is_community
from api.models.description import InstalledModel
from api.schema.catalogue import AUTO, Input, catalogue
from api.service import inputs as checks
from api.service.choices import check_community, choose_method, choose_pipeline
from api.service.fitting import misfit, pipelines_of
from api.service.options import check_options
from api.service.schedulers import choose_scheduler, suitable
from api.settings import Settings

if TYPE_CHECKING:
    from api.service.service import Service

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_IMAGE = {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/*"}
_SINGLE: dict[str, dict[str, Any]] = {
    "string": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "object": {"type": "object"},
    "image": _IMAGE,
}
_LISTS = {"strings": "string", "integers": "integer", "numbers": "number", "images": "image"}


async def describe_inputs(service: Service, call_inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a model accepts: inputs, pipelines, schedulers and sizes.

    Args:
        service: whose library and limits.
        call_inputs: what names the model, and ``PIPELINE`` where it is not the one that texts alone choose.

    Raises:
        ApiError: what is wrong with them; MODEL_MISMATCH: the model is not here.
    """
    options = check_options(dict(call_inputs))
    ref = service.source_ref(options)
    model = await asyncio.to_thread(service.library.find, ref)
    if model is None and service.fetcher.is_local(ref):
        model = (await service.fetcher.ensure(ref)).model  # no network: it says what there is
    if model is None:
        message = f"{ref.model_id} is not here. A request for it, or POST /models/load, brings it."
        raise ApiError("MODEL_MISMATCH", message, field="callInputs.MODEL_ID", available=service.library.names())
    named = options.get("PIPELINE", "")
    code = await asyncio.to_thread(community, named, service.settings) if is_community(named) else None
    return description(model, options, service.settings, code)


def description(
    model: InstalledModel, options: Mapping[str, Any], settings: Settings, code: Community | None = None
) -> dict[str, Any]:
    """The answer of ``GET /models/{id}/schema``.

    Args:
        model: what its configuration says of it.
        options: checked ``callInputs``.
        settings: the limits, and what holds where nothing is asked for.
        code: the community pipeline that was asked for.

    Raises:
        ApiError: NO_SUCH_PIPELINE, PIPELINE_NOT_SUPPORTED, NO_SUCH_SCHEDULER, INVALID_SCHEDULER, INVALID_INPUTS.
    """
    if code:
        check_community(model, code)
        pipeline = code.name
    else:
        _, pipeline = choose_pipeline(dict(options), {}, model, settings.pipeline)
    method = choose_method(dict(options), pipeline, code)
    accepted = code.methods[method] if code else catalogue().pipelines[pipeline]
    tasks = {task: name for task, name in catalogue().tasks_of(model.class_name).items() if not misfit(model, name)}
    return {
        "MODEL_ID": model.model_id,
        "MODEL_REVISION": model.revision,
        "class": model.class_name,
        "pipeline": pipeline,
        "makes": "video" if pipeline in catalogue().videos else "image",
        "pipelines": pipelines_of(model),
        "auto": {auto: tasks[task] for auto, task in AUTO.items() if task in tasks},
        "scheduler": choose_scheduler(dict(options), model, settings.scheduler).name or None,
        "schedulers": suitable(model),
        "size": {"multiple": model.size_multiple, "default": model.default_size, "max_pixels": settings.max_pixels},
        "modelInputs": schema_of(pipeline, accepted, model, settings),
    }


def schema_of(
    pipeline: str, accepted: Mapping[str, Input], model: InstalledModel, settings: Settings
) -> dict[str, Any]:
    """``modelInputs`` of a pipeline as JSON Schema (draft 2020-12).

    It does not hold what depends on several inputs: a list of seeds is as long as there are images, and the like.
    """
    properties = {name: _property(name, spec, model, settings) for name, spec in accepted.items()}
    for old, new in checks.ALIASES.items():
        if new in accepted and old not in accepted:
            properties[old] = {**properties[new], "deprecated": True, "description": f"The same as {new}."}
    properties.update(_ours())
    required = [name for name, spec in accepted.items() if spec.required and name not in checks.ALIASES.values()]
    schema: dict[str, Any] = {
        "$schema": DIALECT,
        "title": pipeline,
        "type": "object",
        "properties": properties,
        "required": sorted({*required, *({"prompt"} & accepted.keys())}),
        "additionalProperties": False,
    }
    if "image" in accepted and accepted["image"].required:
        schema["anyOf"] = [{"required": [name]} for name in ("image", *checks.ALIASES) if name in properties]
    return schema


def schema_of_all(settings: Settings) -> dict[str, Any]:
    """``modelInputs`` of every pipeline together, as JSON Schema.

    Each pipeline takes some of them; which, and in which sizes, depends on the model.
    """
    specs: dict[str, list[Input]] = {}
    for accepted in catalogue().pipelines.values():
        for name, spec in accepted.items():
            specs.setdefault(name, []).append(spec)
    properties: dict[str, Any] = {name: {"anyOf": [form, {"type": "null"}]} for name, form in _ours().items()}
    for name, found in sorted(specs.items(), key=lambda item: (-len(item[1]), item[0])):
        kinds = dict.fromkeys(kind for spec in found for kind in spec.types)
        forms = [*_forms(name, tuple(kinds), None, settings), {"type": "null"}]
        takers = f"{len(found)} of {len(catalogue().pipelines)} pipelines take it."
        properties[name] = {"anyOf": forms, "description": takers}
    for old, new in checks.ALIASES.items():
        properties.setdefault(old, {**properties[new], "deprecated": True, "description": f"The same as {new}."})
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _ours() -> dict[str, Any]:
    seed = {"type": "integer", "minimum": 0, "maximum": checks.MAX_SEED}
    return {
        "seed": {"anyOf": [seed, {"type": "array", "items": seed, "minItems": 1}]},
        "callback_steps": {"type": "integer", "minimum": 1},
    }


def _property(name: str, spec: Input, model: InstalledModel, settings: Settings) -> dict[str, Any]:
    forms = _forms(name, spec.types, model, settings)
    found: dict[str, Any] = forms[0] if len(forms) == 1 else {"anyOf": forms}
    default = checks.default_of(name, spec, settings)
    if default is None and name in ("width", "height"):
        default = model.default_size
    return {**found, "default": default} if default is not None else dict(found)


def _forms(name: str, kinds: tuple[str, ...], model: InstalledModel | None, settings: Settings) -> list[dict[str, Any]]:
    limits = _limits(name, model, settings)
    forms = [_form(kind, limits) for kind in kinds]
    if name == "cross_attention_kwargs":
        forms.append({"type": "string", "contentMediaType": "application/json"})
    return forms


def _form(kind: str, limits: dict[str, Any]) -> dict[str, Any]:
    if kind in _LISTS:
        most = {"maxItems": checks.MAX_PICTURES} if kind == "images" else {}
        return {"type": "array", "items": _form(_LISTS[kind], limits), "minItems": 1, **most}
    numeric = kind in ("integer", "number")
    kept = {key: value for key, value in limits.items() if (key == "maxLength") != numeric}
    return {**_SINGLE[kind], **(kept if numeric or kind == "string" else {})}


def _limits(name: str, model: InstalledModel | None, settings: Settings) -> dict[str, Any]:
    """What a value may be, by what requests are checked against; without a model, what holds for every one."""
    low, high = checks.RANGES.get(name, (-math.inf, math.inf))
    found: dict[str, Any] = {}
    if name in checks.STEPS:
        high = min(high, settings.max_steps)
    if name in checks.SEVERAL:
        high = min(high, settings.max_images)
    if name in checks.FRAMES:
        high = min(high, settings.max_frames)
    if name in checks.AREAS:
        low, high = 1, math.floor(settings.max_pixels ** (1 / checks.AREAS[name]))
    if name == "clip_skip":
        low, high = 0, max(0, model.text_layers - 1) if model else math.inf
    if name in ("width", "height"):
        low = model.size_multiple if model else 1
        # the other side is a 32nd of it at least
        high = math.isqrt(32 * settings.max_pixels) // low * low
        found |= {"multipleOf": low} if model else {}
    if checks.is_prompt(name):
        found["maxLength"] = checks.MAX_PROMPT
    if low > -math.inf:
        found["minimum"] = low
    if high < math.inf:
        found["maximum"] = high
    return found
