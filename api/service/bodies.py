"""Requests and results as the native dialect has them in JSON; other ways in take and give the same objects."""

from __future__ import annotations

from typing import Any

import pybase64

from api.errors import ApiError
from api.schema.catalogue import nearest
from api.schema.generation import GenerationResult
from api.schema.videos import kind_of

KEYS = ("modelInputs", "callInputs")


def halves(data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``modelInputs`` and ``callInputs`` of a native request.

    Raises:
        ApiError: INVALID_INPUTS, UNKNOWN_INPUT, MISSING_INPUT.
    """
    for key in data:
        if key == "input" and KEYS[0] not in data:
            message = "That is the body of RunPod's routes: POST it to /v2/any/runsync, or to /v2/any/run for later."
            raise ApiError("UNKNOWN_INPUT", message, field=key, available=list(KEYS))
        if key not in KEYS:
            hint = nearest(key, KEYS) or f' Inputs such as "{key[:40]}" belong inside "modelInputs".'
            raise ApiError("UNKNOWN_INPUT", f"Unknown key.{hint}", field=key[:200], available=list(KEYS))
    found = []
    for key in KEYS:
        half = data.get(key)
        if half is None:
            half = {}
        if not isinstance(half, dict):
            raise ApiError("INVALID_INPUTS", "Must be an object.", field=key)
        found.append(half)
    if "modelInputs" not in data:
        raise ApiError("MISSING_INPUT", 'There are no inputs: send {"modelInputs": {"prompt": …}}.', field=KEYS[0])
    return found[0], found[1]


def result_body(result: GenerationResult, links: list[str] | None = None) -> dict[str, Any]:
    """A result as the native dialect writes it.

    Args:
        links: where the images are, to be told instead of the images.
    """
    kind = kind_of(result.meta)
    images = _uploaded(result.urls, kind) if result.urls else images_body(result.images, links, kind)
    body: dict[str, Any] = {"$meta": result.meta, **images}
    body.update({f"{name}_base64": pybase64.b64encode_as_string(extra) for name, extra in result.extras.items()})
    if result.nsfw is not None:
        body["nsfw_content_detected"] = result.nsfw
    body["$timings"] = result.timings
    body["$mem_usage"] = result.mem_usage
    return body


def _uploaded(urls: list[str], kind: str) -> dict[str, Any]:
    return {f"{kind}_url": urls[0]} if len(urls) == 1 else {f"{kind}_urls": urls}


def images_body(images: list[bytes], links: list[str] | None = None, kind: str = "image") -> dict[str, Any]:
    """Images, or videos, as the native dialect writes them: one, or several, or where they are."""
    if links is not None:
        return {f"{kind}_urls": links}
    encoded = [pybase64.b64encode_as_string(image) for image in images]
    return {f"{kind}_base64": encoded[0]} if len(encoded) == 1 else {f"{kind}s_base64": encoded}
