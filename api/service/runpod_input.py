"""RunPod's ``input`` as modelInputs and callInputs, and a result as its ``output``; knows of no HTTP.

Two forms of ``input`` are taken: that of the native dialect, ``{"modelInputs": …, "callInputs": …}``, whose output is
the native response; and the simple one, ``{"prompt": …, …}``, with every input side by side, whose output is
``{"image": …, "seed": …}``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from api.errors import ApiError
from api.service.bodies import KEYS, halves
from api.service.options import LATER, OPTIONS

_HOW_ANSWERED = ("async", "streamEvents")
"""Options that say how the answer comes: of a job that is what its routes are for."""
_AS_THEY_ARE = ("image_url", "image_urls", "video_url", "video_urls", "nsfw_content_detected")
_FILES = ("image_base64", "images_base64", "video_base64", "videos_base64")
_FIELD = "input"


class RunpodInput(NamedTuple):
    """What a job is to do.

    Attributes:
        model_inputs: as the native ``modelInputs``.
        call_inputs: as the native ``callInputs``.
        simple: whether it was the simple form; the output is written in the same.
    """

    model_inputs: dict[str, Any]
    call_inputs: dict[str, Any]
    simple: bool


def read_input(input: object) -> RunpodInput:
    """Tell the two forms apart, and take them apart. What the inputs hold is checked by admission.

    Raises:
        ApiError: MISSING_INPUT, INVALID_INPUTS, UNKNOWN_INPUT, with the field from ``input`` on.
    """
    if input is None or input == {}:
        message = 'There are no inputs: send {"input": {"prompt": …}}.'
        raise ApiError("MISSING_INPUT", message, field=_FIELD)
    if not isinstance(input, dict):
        raise ApiError("INVALID_INPUTS", 'Must be an object such as {"prompt": …}.', field=_FIELD, requested=input)
    if set(input) == {_FIELD}:
        message = 'It is wrapped twice: send {"input": {"prompt": …}}. Some clients put "input" around by themselves.'
        raise ApiError("INVALID_INPUTS", message, field="input.input")
    simple = not any(key in input for key in KEYS)
    if simple:
        model_inputs, call_inputs = _apart(input)
    else:
        try:
            model_inputs, call_inputs = halves(input)
        except ApiError as error:
            error.field = f"{_FIELD}.{error.field}"
            raise
    kept = {name: value for name, value in call_inputs.items() if name not in _HOW_ANSWERED}
    return RunpodInput(model_inputs, kept, simple)


def write_output(result_body: dict[str, Any], simple: bool) -> dict[str, Any]:
    """The ``output`` of a job that is COMPLETED.

    Args:
        result_body: as ``bodies.result_body`` makes it.
        simple: the form of the input.
    """
    if not simple:
        return result_body
    meta = result_body["$meta"]
    output: dict[str, Any] = {}
    for name, value in result_body.items():
        if name in _FILES:
            output[name.removesuffix("_base64")] = value
        elif name in _AS_THEY_ARE or name.endswith("_base64"):
            output[name] = value
    output["seed"] = meta.get("modelInputs", {}).get("seed")
    return {**output, "meta": meta, "timings": result_body["$timings"]}


def write_error(error: dict[str, Any], simple: bool) -> str:
    """The ``error`` of a job that failed: a sentence or two, with the code and the field.

    Args:
        error: as ``ApiError.body`` makes it.
        simple: the form of the input.
    """
    field = field_in_input(error["field"], simple=simple) if error.get("field") else ""
    return ": ".join(part for part in (error["code"], field, error["message"]) if part)


def in_input(error: ApiError, *, simple: bool) -> ApiError:
    """The same error, its field named as the client of RunPod's routes knows it."""
    if error.field:
        error.field = field_in_input(error.field, simple=simple)
    return error


def field_in_input(field: str, *, simple: bool) -> str:
    """``modelInputs.width`` as ``input.modelInputs.width``, or in the simple form as ``input.width``."""
    half, _, rest = field.partition(".")
    if half not in KEYS:
        return field
    return ".".join(part for part in (_FIELD, rest if simple else field) if part)


def _apart(input: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The halves of the simple form: options are known by their names, all else is for the pipeline."""
    model_inputs, call_inputs = {}, {}
    for name, value in input.items():
        if name in OPTIONS or name in LATER:
            call_inputs[name] = value
        elif name.upper() in OPTIONS:
            message = f'Unknown input. Did you mean "{name.upper()}"?'
            raise ApiError("UNKNOWN_INPUT", message, field=f"{_FIELD}.{name[:200]}")
        else:
            model_inputs[name] = value
    return model_inputs, call_inputs
