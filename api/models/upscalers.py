"""Upscalers: what a request asks for, and the ones that are known by a name."""

from __future__ import annotations

from typing import Any

import msgspec

from api.errors import ApiError
from api.models.adapters import FIELDS, UPSCALER, Asked, read_asked

FIELD = "callInputs.upscale"
_RELEASES = "https://github.com/xinntao/Real-ESRGAN/releases/download"
NAMED = {
    "RealESRGAN_x4plus": f"{_RELEASES}/v0.1.0/RealESRGAN_x4plus.pth"
    "#sha256=4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1",
    "RealESRGAN_x4plus_anime_6B": f"{_RELEASES}/v0.2.2.4/RealESRGAN_x4plus_anime_6B.pth"
    "#sha256=f872d837d3c90ed2e05227bed711af5671a6fd1c9f7d7e91c911a61f155e99da",
    "realesr-general-x4v3": f"{_RELEASES}/v0.2.5.0/realesr-general-x4v3.pth"
    "#sha256=8dc7edb9ac80ccdc30c3a5dca6616509367f05fbc184ad95b731f05bece96292",
}
"""Those that docker-diffusers-api knew, where their authors publish them."""

DEFAULT_TILE = 256
_TILES = (64, 2048)
"""Of what overlaps, less would be hardly more than the overlap."""
_SCALES = (1.0, 16.0)
_LONGEST = 8192
_PARTS = ("model", "scale", "tile", "sha256")
_FORMS = ["owner/repository/file.safetensors", "https://host/file.safetensors", "s3:///bucket/key", *NAMED]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "model": {"type": "string", "minLength": 1, "maxLength": _LONGEST},
        "scale": {"type": ["number", "null"], "minimum": _SCALES[0], "maximum": _SCALES[1]},
        "tile": {"type": ["integer", "null"], "minimum": _TILES[0], "maximum": _TILES[1]},
        "sha256": {"type": ["string", "null"], "pattern": "^([0-9a-fA-F]{64})?$"},
    },
    "additionalProperties": False,
}
"""What ``read_upscale`` takes, as JSON Schema."""


class AskedUpscale(msgspec.Struct, frozen=True):
    """How a request wants images to be made larger.

    Attributes:
        model: the upscaler; None: named elsewhere.
        scale: how many times wider and higher; None: as the upscaler makes them.
        tile: see ``schema.generation.Upscale``.
    """

    model: Asked | None
    scale: float | None
    tile: int


def read_upscale(value: Any, field: str = FIELD) -> AskedUpscale:
    """Read ``{"model": ADDRESS, "scale": …, "tile": …, "sha256": …}``.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    if not isinstance(value, dict) or value.keys() - set(_PARTS):
        message = 'Must be an object such as {"model": "owner/repository/file.safetensors", "scale": 4}.'
        raise ApiError("INVALID_INPUTS", message, field=field, available=list(_PARTS))
    said = {name: part for name, part in value.items() if part not in (None, "")}
    scale, tile = said.get("scale"), said.get("tile", DEFAULT_TILE)
    if scale is not None and not _is_within(scale, _SCALES):
        message = f"Must be a number from {_SCALES[0]:g} to {_SCALES[1]:g}: how many times wider and higher."
        raise ApiError("INVALID_INPUTS", message, field=f"{field}.scale", requested=scale)
    if not isinstance(tile, int) or not _is_within(tile, _TILES):
        message = f"Must be a whole number of pixels from {_TILES[0]} to {_TILES[1]}."
        raise ApiError("INVALID_INPUTS", message, field=f"{field}.tile", requested=tile)
    model = read_name(said["model"], FIELDS[UPSCALER], said.get("sha256", "")) if "model" in said else None
    if model is None and "sha256" in said:
        raise ApiError("INVALID_INPUTS", "It says what the model must be, and names none.", field=f"{field}.sha256")
    return AskedUpscale(model, None if scale is None else float(scale), tile)


def read_name(name: Any, field: str, sha256: str = "") -> Asked:
    """Read the name or address of an upscaler.

    Args:
        name: one of ``NAMED``, ``owner/repository/file.safetensors``, or a URL; ``#fname=``, ``#revision=``,
            ``#sha256=``.
        field: for errors.
        sha256: that the file must have; over the one in the name.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    plain = name.lower().replace("-", "_") if isinstance(name, str) else ""
    known = {each.lower().replace("-", "_"): address for each, address in NAMED.items()}
    (asked,) = read_asked(known.get(plain, name), UPSCALER, field) if not isinstance(name, list) else (None,)
    if asked is None or ("://" not in asked.address and asked.address.count("/") < 2 and not asked.fname):
        message = "Must name a file of weights: one in a repository, one at a URL, or a known upscaler."
        raise ApiError("INVALID_INPUTS", message, field=field, requested=str(name)[:200], available=_FORMS)
    if not sha256:
        return asked
    if not isinstance(sha256, str) or len(sha256) != 64 or set(sha256.lower()) - set("0123456789abcdef"):
        raise ApiError("INVALID_INPUTS", "Must be 64 hex digits.", field=f"{FIELD}.sha256")
    return msgspec.structs.replace(asked, sha256=sha256.lower())


def _is_within(value: Any, limits: tuple[float, float]) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return limits[0] <= value <= limits[1]
