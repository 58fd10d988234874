"""Checks ``modelInputs`` against what a pipeline accepts: names, types, ranges, limits."""

from __future__ import annotations

import math
import re
from typing import Any

import orjson

from api.errors import ApiError
from api.models.description import InstalledModel
from api.schema.catalogue import Input, nearest
from api.settings import Settings

ALIASES = {"init_image": "image", "input_image": "image"}
"""Old names of arguments. They mean the new name wherever the pipeline has it and not the old."""
MASKS = frozenset({"mask_image", "mask", "control_mask"})
"""Pictures of which only the brightness counts."""
OURS = frozenset({"seed", "callback_steps"})
"""Inputs that the server itself uses."""
MAX_SEED = 2**64 - 1
_MAX_WHOLE = 2**63
_MAX_DEPTH = 8
MAX_PROMPT = 20_000
_PROMPT = re.compile(r"(?:\w+_)?prompt(?:_\d)?")
MAX_PICTURES = 16
"""Pictures under one name."""

_DESCRIBED = {
    "string": "a string",
    "strings": "a list of strings",
    "integer": "a whole number",
    "integers": "a list of whole numbers",
    "number": "a number",
    "numbers": "a list of numbers",
    "boolean": "true or false",
    "object": "an object",
    "image": "an image (base64, or a URL with callInputs.is_url)",
    "images": "a list of images",
}
RANGES: dict[str, tuple[float, float]] = {
    "strength": (0, 1),
    "eta": (0, 1),
    "guidance_rescale": (0, 1),
    "guidance_scale": (-1000, 1000),
    "num_inference_steps": (1, math.inf),
    "num_images_per_prompt": (1, math.inf),
    "num_videos_per_prompt": (1, math.inf),
    "num_frames": (1, math.inf),
    "video_length": (1, math.inf),
    "decode_chunk_size": (1, math.inf),
    "frame_rate": (1, 240),
    "fps": (1, 240),
    "width": (1, math.inf),
    "height": (1, math.inf),
    "padding_mask_crop": (0, 10_000),
    "batch_size": (1, math.inf),
    "layers": (1, math.inf),
    "max_sequence_length": (1, 4096),
    "tokenizer_max_length": (1, 4096),
    "prompt_reps": (1, 100),
    "prompt_strength": (0, 10),
    "view_batch_size": (1, 64),
    "parallel": (1, 64),
    "scale_factor": (1, 1000),
    "max_input_image_size": (64, 4096),
}


SEVERAL = ("num_images_per_prompt", "num_videos_per_prompt", "batch_size", "layers")
"""What there are so many images, or videos, of."""
STEPS = (
    "num_inference_steps",
    "prior_num_inference_steps",
    "decoder_num_inference_steps",
    "super_res_num_inference_steps",
    "max_iter_to_alter",
    "jump_length",
    "jump_n_sample",
)
"""What a pipeline does so many times."""
FRAMES = ("num_frames", "video_length")
"""How many frames a video has."""
AREAS = {"max_area": 1, "resolution": 2, "output_resolution": 2}
"""What decides over an image's pixels in place of its width and height, and the power of it that they are."""
GROWS = {
    "LDMSuperResolutionPipeline": 4,
    "IFImg2ImgSuperResolutionPipeline": 4,
    "IFInpaintingSuperResolutionPipeline": 4,
    "IFSuperResolutionPipeline": 4,
    "StableDiffusionLatentUpscalePipeline": 2,
    "StableDiffusionUpscalePipeline": 4,
}
"""How many times wider than its picture an image is."""


def _invalid(name: str, message: str, value: Any = None) -> ApiError:
    return ApiError("INVALID_INPUTS", message, field=f"modelInputs.{name}", requested=value)


def _fits(value: Any, kind: str) -> bool:
    if kind == "string":
        return isinstance(value, str)
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "integer":
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return whole and not isinstance(value, bool) and -_MAX_WHOLE <= value <= MAX_SEED
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind == "object":
        return isinstance(value, dict) and _is_shallow(value, _MAX_DEPTH)
    if kind == "image":
        return isinstance(value, str)
    single = {"strings": "string", "integers": "integer", "numbers": "number", "images": "image"}[kind]
    return isinstance(value, list) and bool(value) and all(_fits(item, single) for item in value)


def _is_shallow(value: Any, depth: int) -> bool:
    """Whether an object is nested no deeper than anything of use; encoders give up on deep ones."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_shallow(item, depth - 1) for item in inner)


def _coerce(value: Any, types: tuple[str, ...]) -> Any:
    """Numbers as Python's pipelines want them: 20.0 is 20 where a whole number is asked for."""
    if "integer" in types and isinstance(value, float):
        return int(value)
    if "number" in types and "integer" not in types and isinstance(value, int):
        return float(value)
    return value


def rename_aliases(model_inputs: dict[str, Any], accepted: dict[str, Input]) -> dict[str, Any]:
    """Old argument names replaced by today's.

    Raises:
        ApiError: INVALID_INPUTS when both names are sent.
    """
    out: dict[str, Any] = {}
    for name, value in model_inputs.items():
        new = ALIASES.get(name, name)
        new = new if new in accepted and name not in accepted else name
        if new in out:
            raise _invalid(name, f"Sent twice, as {new} and as {name}.")
        out[new] = value
    return out


def check_inputs(model_inputs: dict[str, Any], accepted: dict[str, Input], pipeline: str) -> dict[str, Any]:
    """Check names and types of every input.

    Args:
        model_inputs: as the client sent them, aliases renamed.
        accepted: the pipeline's arguments.
        pipeline: its class name, for messages.

    Returns:
        The inputs without ``null`` values and without those in ``OURS``; images still as strings.

    Raises:
        ApiError: UNKNOWN_INPUT, INVALID_INPUTS or INVALID_CROSS_ATTENTION_KWARGS, with the field.
    """
    out: dict[str, Any] = {}
    for name, value in model_inputs.items():
        if name in OURS or (value is None and name in ("image", "mask_image", *ALIASES)):
            continue
        if name not in accepted:
            names = [*accepted, *OURS]
            message = f"{pipeline} has no such input.{nearest(name, names)}"
            raise ApiError("UNKNOWN_INPUT", message, field=f"modelInputs.{name}", available=sorted(names))
        if value is None:
            continue
        types = accepted[name].types
        if name == "cross_attention_kwargs":
            value = _cross_attention(value)
        if not any(_fits(value, kind) for kind in types):
            raise _invalid(name, f"Must be {' or '.join(_DESCRIBED[kind] for kind in types)}.", value)
        if accepted[name].is_picture and isinstance(value, list) and len(value) > MAX_PICTURES:
            raise ApiError("LIMIT_EXCEEDED", f"At most {MAX_PICTURES} images.", field=f"modelInputs.{name}")
        out[name] = _coerce(value, types)
    return out


def _cross_attention(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            value = None
    if not isinstance(value, dict):
        raise ApiError(
            "INVALID_CROSS_ATTENTION_KWARGS",
            "Must be an object, or a string that holds one as JSON.",
            field="modelInputs.cross_attention_kwargs",
        )
    return value


def default_of(name: str, spec: Input, settings: Settings) -> Any:
    """What holds where an input is not sent: the pipeline's default, as far as this server's limits allow it."""
    if name in STEPS and isinstance(spec.default, int):
        return min(spec.default, settings.max_steps)
    if name in FRAMES and isinstance(spec.default, int):
        return min(spec.default, settings.max_frames)
    if name in AREAS and isinstance(spec.default, int):
        return min(spec.default, math.floor(settings.max_pixels ** (1 / AREAS[name])))
    return spec.default


def sides(inputs: dict[str, Any], pictures: dict[str, Any], pipeline: str, settings: Settings) -> None:
    """Check the size of what a pipeline makes larger than its picture.

    Args:
        inputs: checked.
        pictures: decoded, by name.
        pipeline: a class.
        settings: the limits.

    Raises:
        ApiError: LIMIT_EXCEEDED.
    """
    factor, found = GROWS.get(pipeline), pictures.get("image")
    for picture in found if isinstance(found, list) else [found] if found else []:
        width, height = inputs.get("width") or picture.width, inputs.get("height") or picture.height
        if factor and width * height * factor**2 > settings.max_pixels:
            raise _limit("image", width * height * factor**2, "MAX_PIXELS", settings.max_pixels)


def check_values(inputs: dict[str, Any], accepted: dict[str, Input], model: InstalledModel, settings: Settings) -> None:
    """Check ranges, limits and what the model's configuration demands, once types are known.

    Args:
        inputs: what was sent, checked, and every default filled in.

    Raises:
        ApiError: INVALID_INPUTS, MISSING_INPUT or LIMIT_EXCEEDED, with the field.
    """
    _check_ranges(inputs, accepted)
    _check_clip_skip(inputs, model)
    _check_prompts(inputs, accepted)
    _check_steps(inputs, accepted, settings)
    check_size(inputs, model, settings)


def _check_ranges(inputs: dict[str, Any], accepted: dict[str, Input]) -> None:
    for name, (low, high) in RANGES.items():
        value = inputs.get(name)
        if value is not None and name in accepted and not low <= value <= high:
            wanted = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise _invalid(name, f"Must be {wanted}.", value)


def _check_clip_skip(inputs: dict[str, Any], model: InstalledModel) -> None:
    skip = inputs.get("clip_skip")
    most = max(0, model.text_layers - 1)
    if skip is not None and not 0 <= skip <= most:
        raise _invalid(
            "clip_skip", f"Must be between 0 and {most}: the text encoder has {model.text_layers} layers.", skip
        )


def _check_prompts(inputs: dict[str, Any], accepted: dict[str, Input]) -> None:
    """Lengths; and one negative prompt for many prompts becomes a list, as the pipelines want it."""
    prompt, negative = inputs.get("prompt"), inputs.get("negative_prompt")
    if "prompt" in accepted and prompt is None:
        raise ApiError("MISSING_INPUT", "A prompt is needed.", field="modelInputs.prompt")
    for name, spec in accepted.items():
        if spec.required and inputs.get(name) is None:
            what = "an image" if spec.is_picture else name
            raise ApiError("MISSING_INPUT", f"This pipeline needs {what}.", field=f"modelInputs.{name}")
    check_lengths(inputs)
    if isinstance(negative, str) and isinstance(prompt, list):
        inputs["negative_prompt"] = [negative] * len(prompt)
    elif isinstance(negative, list) and (not isinstance(prompt, list) or len(negative) != len(prompt)):
        raise _invalid("negative_prompt", "A list goes with a list of prompts of the same length.")


def is_prompt(name: str) -> bool:
    """Whether an input is called as a prompt is: ``prompt``, ``prompt_2``, ``negative_prompt``."""
    return _PROMPT.fullmatch(name) is not None


def check_lengths(inputs: dict[str, Any]) -> None:
    """Check how long the prompts are, before anything reads them.

    Raises:
        ApiError: LIMIT_EXCEEDED.
    """
    for name, value in inputs.items():
        texts = value if isinstance(value, list) else [value]
        if is_prompt(name) and any(isinstance(text, str) and len(text) > MAX_PROMPT for text in texts):
            raise ApiError("LIMIT_EXCEEDED", f"At most {MAX_PROMPT} characters.", field=f"modelInputs.{name}")


def _check_steps(inputs: dict[str, Any], accepted: dict[str, Input], settings: Settings) -> None:
    custom = [len(inputs[name]) for name in ("timesteps", "sigmas") if inputs.get(name)]
    steps = max(custom) if custom else inputs.get("num_inference_steps") or 0
    if custom and "num_inference_steps" in inputs:
        inputs["num_inference_steps"] = steps  # what really runs, for the limit and for $meta
    for name in STEPS:
        count = steps if name == "num_inference_steps" else inputs.get(name) or 0
        if count > settings.max_steps:
            raise _limit(name, count, "MAX_STEPS", settings.max_steps)
    strength = inputs.get("strength")
    if steps and "strength" in accepted and strength is not None and strength * steps < 1:
        raise _invalid("strength", f"Times num_inference_steps ({steps}) it must be at least 1.", strength)


def check_size(inputs: dict[str, Any], model: InstalledModel, settings: Settings) -> None:
    """Check width and height against the model and the limits.

    Raises:
        ApiError: INVALID_INPUTS or LIMIT_EXCEEDED, with the field.
    """
    for name in ("width", "height"):
        value = inputs.get(name)
        if value is not None and value % model.size_multiple:
            fitting = max(1, round(value / model.size_multiple)) * model.size_multiple
            raise _invalid(name, f"Must be divisible by {model.size_multiple} for this model, e.g. {fitting}.", value)
    for name, power in AREAS.items():
        side = inputs.get(name)
        if isinstance(side, int) and (side < 1 or side**power > settings.max_pixels):
            raise _limit(name, side**power, "MAX_PIXELS", settings.max_pixels)
    width, height = inputs.get("width"), inputs.get("height")
    if width and height and width * height > settings.max_pixels:
        raise _limit("width", width * height, "MAX_PIXELS", settings.max_pixels)
    if width and height and not 1 / 32 <= width / height <= 32:
        raise _invalid("width", "An image may be at most 32 times as long as it is wide.", [width, height])


def _limit(name: str, value: int, limit: str, allowed: int) -> ApiError:
    message = f"{value} is over this server's {limit} of {allowed}."
    return ApiError("LIMIT_EXCEEDED", message, field=f"modelInputs.{name}", requested=value)


def count_images(inputs: dict[str, Any], settings: Settings) -> int:
    """How many images a request makes.

    Raises:
        ApiError: LIMIT_EXCEEDED.
    """
    prompt = inputs.get("prompt")
    classes = inputs.get("class_labels")
    several = next((len(value) for value in (prompt, classes) if isinstance(value, list)), 1)
    count = several
    for name in SEVERAL:
        count *= inputs.get(name) or 1
    if count > settings.max_images:
        raise _limit("num_images_per_prompt", count, "MAX_IMAGES", settings.max_images)
    return count


def check_seed(seed: Any, images: int, draw: int) -> int | list[int]:
    """The seed of a request: what was sent, or ``draw``.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    if seed is None:
        return draw
    seeds = seed if isinstance(seed, list) else [seed]
    if not all(_fits(s, "integer") and 0 <= s <= MAX_SEED for s in seeds):
        raise _invalid("seed", f"Must be a whole number from 0 to {MAX_SEED}, or a list of them.", seed)
    if not isinstance(seed, list):
        return int(seed)
    if len(seeds) != images:
        raise _invalid("seed", f"A list of seeds has one for each image: {images}, not {len(seeds)}.", seed)
    return [int(s) for s in seeds]
