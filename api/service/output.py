"""What a request wants to get: the format of its images, what is written into them, and what comes beside them."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

from api.errors import ApiError
from api.schema.catalogue import nearest
from api.schema.generation import OUTPUTS
from api.schema.images import IMAGE_FORMATS, format_name


class Encoding(NamedTuple):
    """How images are encoded."""

    format: str
    quality: int
    lossless: bool


def choose_encoding(options: dict[str, Any]) -> Encoding:
    """The images' format, its quality, and whether every pixel is kept.

    Raises:
        ApiError: INVALID_INPUTS; NOT_SUPPORTED where the format's codec is not installed.
    """
    asked = options.get("image_format", "PNG")
    name = format_name(asked)
    if name not in IMAGE_FORMATS:
        message = f"Not an image format that this server writes.{nearest(name, IMAGE_FORMATS)}"
        available = [each for each in IMAGE_FORMATS if _is_installed(each)]
        raise ApiError("INVALID_INPUTS", message, field="callInputs.image_format", requested=asked, available=available)
    if not _is_installed(name):
        message = 'JPEG XL needs a codec that is not installed here: pip install "diffusers-api[jxl]".'
        raise ApiError("NOT_SUPPORTED", message, field="callInputs.image_format", requested=asked)
    lossless = options.get("lossless", False)
    if lossless and not IMAGE_FORMATS[name].lossless:
        can = [each for each, found in IMAGE_FORMATS.items() if found.lossless and _is_installed(each)]
        message = f"{name} cannot keep every pixel as this server writes it."
        raise ApiError("INVALID_INPUTS", message, field="callInputs.lossless", requested=True, available=can)
    return Encoding(name, options.get("image_quality", 95), lossless)


def _is_installed(name: str) -> bool:
    module = IMAGE_FORMATS[name].module
    return not module or importlib.util.find_spec(module) is not None


def check_output(options: dict[str, Any], accepted: dict[str, Any], pipeline: str) -> tuple[str, ...]:
    """What comes beside the images.

    Args:
        options: checked ``callInputs``.
        accepted: the inputs of the pipeline.
        pipeline: its class.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    wanted = tuple(word for word in OUTPUTS[1:] if word in options.get("output", ()))
    if "mask" in wanted and "mask_image" not in accepted:
        message = f"{pipeline} takes no mask; it is inpainting that uses one."
        raise ApiError("INVALID_INPUTS", message, field="callInputs.output", requested="mask")
    return wanted
