"""How a request's model is held so that it fits, and what comes next where it does not.

``full``: as it is. ``sliced``: the autoencoder takes one image at a time, which changes nothing but the order of sums.
``tiled``: it takes each image in overlapping tiles that are blended, which changes pixels near the seams.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import nn

from api.engine.cloning import clone
from api.engine.loader import LoadedModel
from api.schema.generation import GenerationRequest

log = logging.getLogger("api.engine")

_CODECS = ("encode", "decode")
"""Methods that the rungs below ``full`` make smaller; for want of memory elsewhere none of them helps."""
_REMEMBERED = 4096
"""Sizes of which is known that they do not fit: sizes are the clients' choice."""


@dataclass(frozen=True)
class Build:
    """What a model's memory depends on, whichever its weights are.

    Attributes:
        codecs: of each autoencoder: its class, whether it takes slices, and the side beyond which it takes tiles.
        bytes: of all weights.
        dtype: that it computes in.
    """

    codecs: tuple[tuple[str, bool, float], ...]
    bytes: int
    dtype: str


def build_of(model: LoadedModel) -> Build:
    """Of a model in memory."""
    parts = _autoencoders(model.components).values()
    codecs = [
        (type(part).__name__, isinstance(getattr(part, "use_slicing", None), bool), _tile(part)) for part in parts
    ]
    return Build(tuple(codecs), model.bytes, str(model.dtype))


class Ladder:
    """Chooses placements, by what a request asks for and by what did not fit a job that had the device for itself.

    What was learned in the company of other jobs would have the load of the moment decide over pixels; what was learned
    alone is true of this device, and is kept as long as the worker lives.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._too_high: dict[Hashable, str] = {}
        """By what is asked for: the lowest placement that did not suffice."""
        self._fitted: dict[Hashable, bool] = {}
        self._builds: dict[str, Build] = {}

    def start(self, model: LoadedModel, request: GenerationRequest) -> str:
        """The placement to begin with."""
        build = build_of(model)
        with self._lock:
            _remember(self._builds, model.ref.key, build)
            return self._start(build, request)

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
        build = build_of(model)
        below = rungs(build, request)
        below = below[below.index(placement) + 1 :]
        if short_at not in _CODECS or not below:
            return None
        with self._lock:
            _remember(self._too_high, _kind(build, request), placement)
        log.warning(
            "%s of %s at %s does not fit as %s: %s from now on",
            short_at,
            model.ref.model_id,
            "x".join(map(str, size_of(request))) or "its own size",
            placement,
            below[0],
        )
        return below[0]

    def note(self, model: LoadedModel, request: GenerationRequest, *, fitted: bool) -> None:
        """A request went well, or did not fit in any way."""
        with self._lock:
            _remember(self._fitted, _asked(build_of(model), request), fitted)

    def expected(self, request: GenerationRequest) -> tuple[str | None, bool | None]:
        """The placement that a request would begin with, and whether one like it fitted; None: not known yet."""
        with self._lock:
            build = self._builds.get(request.model.key)
            if build is None:
                return (None if request.low_vram else "full"), None
            return self._start(build, request), self._fitted.get(_asked(build, request))

    def _start(self, build: Build, request: GenerationRequest) -> str:
        known = rungs(build, request)
        if request.low_vram:
            return known[-1]
        failed = self._too_high.get(_kind(build, request))
        below = known[known.index(failed) + 1 :] if failed in known else known
        return below[0] if below else known[-1]


def rungs(build: Build, request: GenerationRequest) -> list[str]:
    """The placements that differ for a request, the one that takes most memory first."""
    found, size = ["full"], size_of(request)
    if request.offload == "none":
        return found
    if request.images > 1 and any(slices for _, slices, _ in build.codecs):
        found.append("sliced")
    if any(not size or max(size) > tile for _, _, tile in build.codecs):
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


def _kind(build: Build, request: GenerationRequest) -> Hashable:
    """Requests of one kind need the same memory for each of their images."""
    return build, size_of(request), request.images > 1


def _asked(build: Build, request: GenerationRequest) -> Hashable:
    return build, size_of(request), request.images, request.pipeline, request.low_vram, request.offload


def _remember(known: dict[Any, Any], key: Hashable, value: Any) -> None:
    """Enter what is newest last; the oldest goes when there are too many."""
    known.pop(key, None)
    known[key] = value
    if len(known) > _REMEMBERED:
        del known[next(iter(known))]


def _autoencoders(components: dict[str, Any]) -> dict[str, nn.Module]:
    return {
        name: part
        for name, part in components.items()
        if isinstance(part, nn.Module) and isinstance(getattr(part, "use_tiling", None), bool)
    }


def _tile(part: nn.Module) -> float:
    """The side of an image beyond which an autoencoder takes it in more than one tile; 0: not known."""
    names = ("tile_sample_min_size", "tile_sample_min_width", "tile_sample_min_height")
    return min((tile for name in names if isinstance(tile := getattr(part, name, None), int | float)), default=0.0)
