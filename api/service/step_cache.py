"""Whether and how a request has steps of its denoiser skipped."""

from __future__ import annotations

from typing import Any

from api.errors import ApiError
from api.schema.generation import STEP_CACHES, StepCache

_BOTH = STEP_CACHES
PIPELINES: dict[str, tuple[str, ...]] = {
    "CogView4Pipeline": ("first_block",),
    "Flux2KleinInpaintPipeline": ("taylorseer",),
    "Flux2KleinPipeline": ("taylorseer",),
    "FluxPipeline": _BOTH,
    "HunyuanImagePipeline": _BOTH,
    "QwenImageEditInpaintPipeline": _BOTH,
    "QwenImageEditPipeline": _BOTH,
    "QwenImageEditPlusPipeline": _BOTH,
    "QwenImageImg2ImgPipeline": _BOTH,
    "QwenImageInpaintPipeline": _BOTH,
    "QwenImagePipeline": _BOTH,
}
"""The kinds that work, of each pipeline that tells a cache which of its calls is with the prompt and which without. In
diffusers 0.42 the blocks of FLUX.2 are not what its first-block cache takes them for, nor CogView4's what TaylorSeer
looks for; a test asks the installed version."""

_NUMBERS = {"first_block": "threshold", "taylorseer": "interval"}
_MOST = {"first_block": 1.0, "taylorseer": 100}
DEFAULTS = {"first_block": 0.08, "taylorseer": 5}
SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "boolean"},
        {
            "type": "object",
            "properties": {
                "kind": {"const": "first_block"},
                "threshold": {"type": "number", "minimum": 0, "maximum": 1},
            },
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "kind": {"const": "taylorseer"},
                "interval": {"type": "integer", "minimum": 1, "maximum": 100},
            },
            "required": ["kind"],
            "additionalProperties": False,
        },
    ]
}


def read_step_cache(value: Any, field: str, meaning: str) -> StepCache | None:
    """The option as it was sent; None: none.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    if value is False:
        return None
    if value is True:
        value = {}
    if not isinstance(value, dict):
        raise _invalid(field, f"Must be true, or an object of kind and threshold or interval: {meaning}.", value)
    kind = value.get("kind", STEP_CACHES[0])
    if kind not in STEP_CACHES:
        message = f"Must be one of {', '.join(STEP_CACHES)}."
        raise ApiError("INVALID_INPUTS", message, field=f"{field}.kind", requested=kind, available=list(STEP_CACHES))
    name, most = _NUMBERS[kind], _MOST[kind]
    if unknown := sorted(set(value) - {"kind", name}):
        message = f"{kind} takes no such thing; it takes {name}."
        raise ApiError("INVALID_INPUTS", message, field=f"{field}.{unknown[0]}", available=["kind", name])
    number = value.get(name, DEFAULTS[kind])
    kinds = int if name == "interval" else int | float
    least = 1 if name == "interval" else 0
    if not isinstance(number, kinds) or isinstance(number, bool) or not least <= number <= most:
        what = "a whole number" if name == "interval" else "a number"
        raise _invalid(f"{field}.{name}", f"Must be {what} from {least} to {most:g}.", number)
    return StepCache(kind, float(number))


def check_step_cache(options: dict[str, Any], pipeline: str) -> None:
    """See that a pipeline can do with it.

    Raises:
        ApiError: NOT_SUPPORTED.
    """
    cache: StepCache | None = options.get("step_cache")
    kinds = PIPELINES.get(pipeline, ())
    if cache is None or cache.kind in kinds:
        return
    if kinds:
        message = f"{cache.kind} does not work with {pipeline}; {' and '.join(kinds)} does."
        field, requested = "callInputs.step_cache.kind", cache.kind
        raise ApiError("NOT_SUPPORTED", message, field=field, requested=requested, available=list(kinds))
    message = (
        f"{pipeline} has no steps that can be skipped: diffusers can for some families of transformers, and for no "
        "UNet. Leave step_cache out."
    )
    raise ApiError("NOT_SUPPORTED", message, field="callInputs.step_cache", available=list(PIPELINES))


def _invalid(field: str, message: str, value: Any) -> ApiError:
    return ApiError("INVALID_INPUTS", message, field=field, requested=value)
