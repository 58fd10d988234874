"""How a request's model is held so that it fits, and what comes next where it does not.

A placement is a way to hold the weights and a way to run the autoencoder, named ``model+tiled``, or by the one that is
not ``full``.

Weights, ``full``: on the device. ``model``: in the host's memory, one part of the model at a time on the device.
``sequential``: one block of it at a time. The images are the same.
Autoencoder, ``full``: as it is. ``sliced``: it takes one image at a time, which changes nothing but the order of sums.
``tiled``: it takes each image in overlapping tiles that are blended, which changes pixels near the seams.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from api.engine.cloning import clone
from api.engine.loader import LoadedModel
from api.engine.peaks import About
from api.errors import nothing_to_offload
from api.schema.generation import WEIGHTS, GenerationRequest, each_picture

log = logging.getLogger("api.engine")

_CODECS = ("encode", "decode")
"""Methods that the rungs below ``full`` make smaller; for want of memory elsewhere none of them helps."""
CODECS = ("full", "sliced", "tiled")
_REMEMBERED = 4096
"""Sizes of which is known that they do not fit: sizes are the clients' choice."""


Foresees = Callable[["Build", GenerationRequest, str], bool]
"""Whether a request (of a model of that build, as that placement) takes more memory than there is."""


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

    Args:
        offloads: the device has memory of its own, so that weights can be kept out of it.
        foresees: says whether a call of an autoencoder or another module will not fit.
    """

    def __init__(self, offloads: bool = False, foresees: Foresees = lambda *_: False) -> None:
        self._offloads = offloads
        self._foresees = foresees
        self._lock = threading.Lock()
        self._too_high: dict[Hashable, tuple[str, ...]] = {}
        """By what is asked for: placements that did not suffice."""
        self._fitted: dict[Hashable, bool] = {}
        self._builds: dict[str, Build] = {}

    def wanted(self, request: GenerationRequest) -> list[str]:
        """The ways to hold the weights that a request allows, the one that takes most memory first.

        Raises:
            ApiError: NOT_SUPPORTED: this device has no memory of its own.
        """
        if not self._offloads:
            if request.offload in WEIGHTS[1:]:
                raise nothing_to_offload(request.offload)
            return ["full"]
        if request.offload == "none":
            return ["full"]
        least = request.offload if request.offload in WEIGHTS else "model" if request.low_vram else "full"
        return list(WEIGHTS[WEIGHTS.index(least) :])

    def start(self, model: LoadedModel, request: GenerationRequest, ways: Sequence[str] = ("full",)) -> str:
        """The placement to begin with.

        Args:
            model: which model.
            request: what is asked for.
            ways: to hold the weights, of those that are ``wanted``.
        """
        build = build_of(model)
        with self._lock:
            _remember(self._builds, model.ref.key.partition("#")[0], build)
            return self._start(build, request, ways)

    def lower(
        self,
        model: LoadedModel,
        request: GenerationRequest,
        placement: str,
        short_at: str,
        ways: Sequence[str] = ("full",),
    ) -> str | None:
        """What to try after a placement did not suffice, though the job had the device for itself.

        Args:
            model: which model.
            request: what was asked for.
            placement: that did not suffice.
            short_at: the method of a module that memory ended in; empty: in none.
            ways: see ``start``.

        Returns:
            None: there is nothing that would help.
        """
        build = build_of(model)
        short = placement if short_at in _CODECS else named(weights_of(placement), CODECS[-1])
        below = rungs(build, request, ways)
        below = [rung for rung in below[below.index(placement) + 1 :] if not _takes_more(rung, short)]
        if not below:
            return None
        with self._lock:
            kind = _kind(build, request)
            _remember(self._too_high, kind, tuple(dict.fromkeys((*self._too_high.get(kind, ()), short))))
        log.warning(
            "%s of %s at %s does not fit as %s: %s from now on",
            short_at or "a job",
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

    def expected(self, request: GenerationRequest, ways: Sequence[str] = ("full",)) -> tuple[str | None, bool | None]:
        """The placement that a request would begin with, and whether one like it fitted; None: not known yet."""
        with self._lock:
            build = self._builds.get(request.model.key)
            if build is None:
                return (None if request.low_vram else ways[0]), None
            return self._start(build, request, ways), self._fitted.get(_asked(build, request))

    def way(self, request: GenerationRequest, ways: Sequence[str]) -> str:
        """How the weights would be held, as far as is known before the model is there."""
        return weights_of(self.expected(request, ways)[0] or ways[0])

    def _start(self, build: Build, request: GenerationRequest, ways: Sequence[str]) -> str:
        known = rungs(build, request, ways)
        short = self._too_high.get(_kind(build, request), ())
        left = [rung for rung in known if not any(_takes_more(rung, other) for other in short)]
        return next((rung for rung in left if not self._foresees(build, request, rung)), (left or known)[-1])


def rungs(build: Build, request: GenerationRequest, ways: Sequence[str] = ("full",)) -> list[str]:
    """The placements that differ for a request, the one that takes most memory first.

    Args:
        build: of the model.
        request: what is asked for.
        ways: to hold the weights.
    """
    codecs, size = ["full"], size_of(request)
    if request.offload != "none":
        if request.images > 1 and any(slices for _, slices, _ in build.codecs):
            codecs.append("sliced")
        if any(not size or max(size) > tile for _, _, tile in build.codecs):
            codecs.append("tiled")
    return [named(way, codec) for way in ways for codec in (codecs[-1:] if request.low_vram else codecs)]


def named(weights: str, codec: str) -> str:
    """A placement's name."""
    return "+".join(part for part in (weights, codec) if part != "full") or "full"


def weights_of(placement: str) -> str:
    """How a placement holds the weights."""
    return next((part for part in placement.split("+") if part in WEIGHTS), "full")


def codec_of(placement: str) -> str:
    """How a placement runs the autoencoder."""
    return next((part for part in placement.split("+") if part in CODECS), "full")


def _takes_more(one: str, other: str) -> bool:
    """Whether a placement needs at least as much memory as another one in every way."""
    return WEIGHTS.index(weights_of(one)) <= WEIGHTS.index(weights_of(other)) and CODECS.index(
        codec_of(one)
    ) <= CODECS.index(codec_of(other))


def placed(model: LoadedModel, components: dict[str, Any], attention: str, placement: str) -> dict[str, Any]:
    """A model's components under a placement: others over the same weights, never the shared ones switched.

    Args:
        model: that the components are of; it keeps what was made for it.
        components: with the attention that the job uses.
        attention: its name.
        placement: from ``rungs``.
    """
    codec = codec_of(placement)
    if codec == "full":
        return components
    name = f"{codec}/{attention}"
    if name not in model.variants:
        own = {key: clone(part) for key, part in _autoencoders(components).items()}
        for part in own.values():
            if hasattr(part, "use_slicing"):
                part.use_slicing = True
            if codec == "tiled" and hasattr(part, "use_tiling"):
                part.use_tiling = True
        model.variants[name] = own
    return {**components, **model.variants[name]}


def size_of(request: GenerationRequest) -> tuple[int, ...]:
    """Width and height of a request's images, of its picture where it names none; empty: the model's own."""
    size = request.inputs.get("width"), request.inputs.get("height")
    if None not in size:
        return size  # type: ignore[return-value]
    return next(((picture.width, picture.height) for picture in each_picture(request.pictures)), ())


def about(build: Build, request: GenerationRequest, placement: str) -> About:
    """What the memory of a request's calls depends on."""
    pixels = math.prod(size_of(request) or (0,)) * _frames(request)
    return About(build, codec_of(placement), pixels, bool(request.pictures), request.attention)


def _kind(build: Build, request: GenerationRequest) -> Hashable:
    """Requests of one kind need the same memory for each of their images."""
    return build, request.attention, size_of(request), _frames(request), request.images > 1


def _frames(request: GenerationRequest) -> int:
    """How many images are computed as one."""
    return max(1, request.video.frames) if request.video else 1


def _asked(build: Build, request: GenerationRequest) -> Hashable:
    asked = request.images, request.pipeline, request.low_vram, request.offload
    return build, request.attention, size_of(request), _frames(request), *asked


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
