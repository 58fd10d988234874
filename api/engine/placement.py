"""How a request's model is held so that it fits, and what comes next where it does not.

``full``: as it is. ``sliced``: the autoencoder takes one image at a time, which changes nothing but the order of sums.
``tiled``: it takes each image in overlapping tiles that are blended, which changes pixels near the seams.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable
from typing import Any

from torch import nn

from api.engine.loader import LoadedModel
from api.engine.views import clone
from api.schema.generation import GenerationRequest

log = logging.getLogger("api.engine")

_CODECS = ("encode", "decode")
"""Methods that the rungs below ``full`` make smaller; for want of memory elsewhere none of them helps."""
_REMEMBERED = 4096
"""Sizes of which is known that they do not fit: sizes are the clients' choice."""


class Ladder:
    """Chooses placements, by what a request asks for and by what did not fit a job that had the device for itself.

    What was learned in the company of other jobs would have the load of the moment decide over pixels; what was learned
    alone is true of this device, and is kept as long as the worker lives.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._too_high: dict[Hashable, str] = {}
        """By what is asked for: the lowest placement that did not suffice."""

    def start(self, model: LoadedModel, request: GenerationRequest) -> str:
        """The placement to begin with."""
        known = rungs(model, request)
        if request.low_vram:
            return known[-1]
        with self._lock:
            failed = self._too_high.get(_kind(model, request))
        if failed is None:
            return known[0]
        below = known[known.index(failed) + 1 :] if failed in known else []
        return below[0] if below else known[-1]

    def lower(self, model: LoadedModel, request: GenerationRequest, placement: str, short_at: str) -> str | None:
        """What to try after a placement did not suffice, though the job had the device for itself.

        Args:
            model: which model.
            request: what was asked for.
            placement: that did not suffice.
            short_at: the method of a module that memory ended in; empty: in none.

        Returns:
            None: there is nothing that would help.
        """
        below = rungs(model, request)
        below = below[below.index(placement) + 1 :]
        if short_at not in _CODECS or not below:
            return None
        with self._lock:
            self._too_high.pop(kind := _kind(model, request), None)
            self._too_high[kind] = placement
            if len(self._too_high) > _REMEMBERED:
                del self._too_high[next(iter(self._too_high))]
        log.warning(
            "%s of %s at %s does not fit as %s: %s from now on",
            short_at,
            model.ref.model_id,
            "x".join(map(str, size_of(request))) or "its own size",
            placement,
            below[0],
        )
        return below[0]


def rungs(model: LoadedModel, request: GenerationRequest) -> list[str]:
    """The placements that differ for a request, the one that takes most memory first."""
    found = ["full"]
    if request.offload == "none":
        return found
    parts = _autoencoders(model.components).values()
    if request.images > 1 and any(isinstance(getattr(part, "use_slicing", None), bool) for part in parts):
        found.append("sliced")
    if any(_tiles(part, size_of(request)) for part in parts):
        found.append("tiled")
    return found


def placed(model: LoadedModel, components: dict[str, Any], attention: str, placement: str) -> dict[str, Any]:
    """A model's components under a placement: others over the same weights, never the shared ones switched.

    Args:
        model: that the components are of; it keeps what was made for it.
        components: with the attention that the job uses.
        attention: its name.
        placement: from ``rungs``.
    """
    if placement == "full":
        return components
    name = f"{placement}/{attention}"
    if name not in model.variants:
        own = {key: clone(part) for key, part in _autoencoders(components).items()}
        for part in own.values():
            if hasattr(part, "use_slicing"):
                part.use_slicing = True
            if placement == "tiled" and hasattr(part, "use_tiling"):
                part.use_tiling = True
        model.variants[name] = own
    return {**components, **model.variants[name]}


def size_of(request: GenerationRequest) -> tuple[int, ...]:
    """Width and height of a request's images, of its picture where it names none; empty: the model's own."""
    size = request.inputs.get("width"), request.inputs.get("height")
    if None not in size:
        return size  # type: ignore[return-value]
    return next(((picture.width, picture.height) for picture in request.pictures.values()), ())


def _kind(model: LoadedModel, request: GenerationRequest) -> Hashable:
    """Requests of one kind need the same memory for their images: models of as many bytes, in one precision."""
    classes = tuple(type(part).__name__ for part in _autoencoders(model.components).values())
    return classes, model.bytes, str(model.dtype), size_of(request), request.images > 1


def _autoencoders(components: dict[str, Any]) -> dict[str, nn.Module]:
    return {
        name: part
        for name, part in components.items()
        if isinstance(part, nn.Module) and isinstance(getattr(part, "use_tiling", None), bool)
    }


def _tiles(part: nn.Module, size: tuple[int, ...]) -> bool:
    """Whether an autoencoder would take an image of this size in more than one tile."""
    names = ("tile_sample_min_size", "tile_sample_min_width", "tile_sample_min_height")
    least = [tile for name in names if isinstance(tile := getattr(part, name, None), int | float)]
    return not size or not least or max(size) > min(least)
