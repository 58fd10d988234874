"""Makes images larger with an upscaler, piece by piece, each piece a call that goes through the executor."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.nn.functional import pad

from api.engine.attempts import OnPhase, OnStep, is_short
from api.engine.cache import ModelCache
from api.engine.calling import to_uint8
from api.engine.calls import Ticket
from api.engine.company import Company
from api.engine.device import Device, shortage
from api.engine.executor import Executor
from api.engine.line import Line
from api.engine.moving import Reservation
from api.engine.peaks import About
from api.engine.tiling import Span, spread, tiled
from api.engine.upscalers import FIELD, Kind, Upscaler, kind_of
from api.errors import ApiError
from api.schema.generation import GenerationRequest, ModelRef, Picture, Upscale

_OPACITY = 3
"""Index of the channel."""


@dataclass
class Order:
    """What a job wants done, and who is told of it.

    Attributes:
        upscale: how.
        cancelled: asked before each piece.
        on_piece: called with (piece, pieces in all); they count from 1.
        on_load: called when the upscaler is not in memory, and is brought there now.
        deadline: when the result is of no use any more, ``time.monotonic``.
        overdue: until when it may wait for the upscaler while others go before it.
        loaded: milliseconds that bringing it took.
    """

    upscale: Upscale
    cancelled: Callable[[], bool] = lambda: False
    on_piece: OnStep = lambda piece, total: None
    on_load: OnPhase = lambda kind, status: None
    deadline: float = float("inf")
    overdue: float = float("inf")
    loaded: int | None = field(default=None)


class Upscaling:
    """Runs upscalers, for several threads at once.

    Args:
        device: what to compute on.
        executor: of the device.
        cache: of the models.
        line: gives them out.
        company: who shares the device's memory.
    """

    def __init__(self, device: Device, executor: Executor, cache: ModelCache, line: Line, company: Company) -> None:
        self._device = device
        self._executor = executor
        self._cache = cache
        self._line = line
        self._company = company

    def check(self, request: GenerationRequest) -> None:
        """What can be said of a request's upscaler before anything is run.

        Raises:
            ApiError: MODEL_BROKEN, INVALID_UPSCALER, OUT_OF_MEMORY; LIMIT_EXCEEDED.
        """
        if (upscale := request.upscale) is None:
            return
        with _about(upscale.model):
            self._cache.check_possible(upscale.model)
            kind = kind_of(Path(upscale.model.folder))
        picture = request.pictures.get("image") if request.extra else None
        if isinstance(picture, Picture):
            _check_size(picture.width, picture.height, kind, upscale)
        elif size := request.size:
            _check_size(*size, kind, upscale)

    def finish(
        self, request: GenerationRequest, images: np.ndarray, order: Order | None, on_phase: OnPhase
    ) -> tuple[np.ndarray, dict[str, Any], dict[str, int]]:
        """The last step of a generation.

        Args:
            request: whose images they are.
            images: uint8 (N, H, W, C).
            order: None: they stay as they are.
            on_phase: called when ``upscale`` starts and is done.

        Returns:
            The images, what ``$meta`` says of it, and the milliseconds that it took.

        Raises:
            ApiError: as ``run``.
            Cancelled: ``order.cancelled`` said so.
        """
        if order is None:
            return images, {}, {}
        began = time.perf_counter()
        on_phase("upscale", "start")
        images, told = self.run(images, order)
        on_phase("upscale", "done")
        return images, told, {"upscale": _ms(began)}

    def upsample(
        self, request: GenerationRequest, order: Order, on_phase: OnPhase
    ) -> tuple[np.ndarray, dict[str, Any], dict[str, int]]:
        """A request that makes its picture larger, and nothing else; returns and raises as ``finish``."""
        picture = request.pictures["image"]
        assert isinstance(picture, Picture)
        channels = len(picture.pixels) // (picture.width * picture.height)
        pixels = np.frombuffer(picture.pixels, np.uint8).reshape(1, picture.height, picture.width, channels)
        began: list[float] = []

        def on_load(kind: str, status: str) -> None:
            on_phase(kind, status)
            if status == "done":
                start()

        def start() -> None:
            if not began:
                began.append(time.perf_counter())
                on_phase("inference", "start")

        order.on_load, tell = on_load, order.on_piece

        def on_piece(piece: int, total: int) -> None:
            start()
            tell(piece, total)

        order.on_piece = on_piece
        images, told = self.run(pixels, order)
        on_phase("inference", "done")
        timings = {} if order.loaded is None else {"loadModel": order.loaded}
        dtype = told["upscaler"]["dtype"]
        told |= {
            "device": self._device.torch.type,
            "device_name": self._device.name,
            "dtype": dtype,
            "placement": "full",
            "numerics": f"{self._device.torch.type}/{dtype}/none/eager{'/tf32' * self._device.tf32}",
        }
        return images, told, {**timings, "inference": _ms(began[0])}

    def run(self, images: np.ndarray, order: Order) -> tuple[np.ndarray, dict[str, Any]]:
        """Make images larger.

        Args:
            images: uint8 (N, H, W, C): grey, RGB, or RGB and opacity.
            order: how.

        Returns:
            uint8 (N, round(H * scale), round(W * scale), C), three channels of a grey one where the upscaler knows no
            other, and what ``$meta`` says of it.

        Raises:
            ApiError: MODEL_BROKEN, INVALID_UPSCALER, LIMIT_EXCEEDED, OUT_OF_MEMORY.
            Cancelled: ``order.cancelled`` said so.
        """
        try:
            done = self._try(images, order, alone=False)
            if isinstance(done, str):
                self._cache.tally.shortage("alone")
                done = self._try(images, order, alone=True)
        finally:
            self._cache.give_back()
        if isinstance(done, str):
            message = (
                f"The upscaler and pieces of {order.upscale.tile} pixels do not fit in the memory of the device. Ask "
                f"for a smaller tile; of an upscaler that takes whole pictures, send a smaller one. {done[:200]}"
            )
            raise ApiError("OUT_OF_MEMORY", message, field="callInputs.upscale.tile", requested=order.upscale.tile)
        return done

    def _try(self, images: np.ndarray, order: Order, *, alone: bool) -> tuple[np.ndarray, dict[str, Any]] | str:
        """The same once; where memory does not suffice, what was said of that."""
        visit = self._company.alone if alone else self._company.together
        try:
            with visit(order.cancelled), self._leased(order) as upscaler:
                if alone:
                    self._cache.clear_idle()
                return self._upscaled(images, upscaler, order)
        except (torch.OutOfMemoryError, ApiError) as fault:
            if isinstance(fault, ApiError) and not is_short(fault):
                raise
            said = shortage(fault) or str(fault)
        # past the handler: until it ends, the fault and all that it knows of live
        self._cache.clear_idle()
        return said

    @contextlib.contextmanager
    def _leased(self, order: Order) -> Iterator[Upscaler]:
        began: list[float] = []

        def on_load(reservation: Reservation) -> None:
            if not began:
                began.append(time.perf_counter())
                if order.loaded is None:
                    order.on_load("loadModel", "start")

        ref = order.upscale.model
        with (
            _about(ref),
            self._line.lease(ref, order.cancelled, order.deadline, order.overdue, on_load) as upscaler,
        ):
            if began and order.loaded is None:
                order.loaded = _ms(began[0])
                order.on_load("loadModel", "done")
            yield upscaler

    def _upscaled(self, images: np.ndarray, upscaler: Upscaler, order: Order) -> tuple[np.ndarray, dict[str, Any]]:
        kind, upscale = upscaler.kind, order.upscale
        height, width, channels = images.shape[1:]
        _check_size(width, height, kind, upscale)
        rows, columns = _spans(width, height, kind, upscale.tile)
        seen = min(channels, _OPACITY) if kind.channels > 1 else channels
        planes = seen if kind.channels == 1 else 1
        pieces = len(rows.starts) * len(columns.starts)
        about = About((upscaler.ref.key, str(upscaler.dtype)), "full", rows.size * columns.size)
        ticket, made = Ticket(order.cancelled, about), 0

        def make(piece: torch.Tensor) -> torch.Tensor:
            nonlocal made
            larger = self._call(upscaler, piece, ticket)
            made += 1
            order.on_piece(made, len(images) * planes * pieces)
            return larger

        scale = kind.scale if upscale.scale is None else upscale.scale
        size = round(width * scale), round(height * scale)
        found = []
        with self._executor.job(ticket), torch.no_grad():
            for image in images:
                picture = torch.from_numpy(image[:, :, :seen].copy()).permute(2, 0, 1)[None] / 255.0
                parts = picture.split(kind.channels if seen >= kind.channels else 1, dim=1)
                larger = [_whole(part.expand(-1, kind.channels, -1, -1), rows, columns, kind, make) for part in parts]
                pixels = to_uint8_channels(torch.cat(larger, dim=1)[:, :, : height * kind.scale, : width * kind.scale])
                found.append(_sized(pixels, image[:, :, seen:], size))
        told = {
            "upscale": {
                "model": upscale.model.model_id,
                "sha256": upscale.model.revision,
                "scale": scale,
                "tile": upscale.tile,
            },
            "upscaler": {
                "architecture": kind.architecture,
                "scale": kind.scale,
                "dtype": str(upscaler.dtype).removeprefix("torch."),
                "pieces": [len(columns.starts), len(rows.starts)],
                "resized": None if scale == kind.scale else "lanczos",
            },
        }
        return np.stack(found), told

    def _call(self, upscaler: Upscaler, piece: torch.Tensor, ticket: Ticket) -> torch.Tensor:
        """One piece made larger; float32 on the CPU, from 0 to 1."""
        kind, module = upscaler.kind, upscaler.module
        given = piece.to(self._device.torch, upscaler.dtype)
        if kind.call is None:
            made = self._executor.run(ticket, module.forward, (given,), {})
        else:
            made = self._executor.run(ticket, kind.call, (module, given), {})
        wanted = (*piece.shape[:2], piece.shape[2] * kind.scale, piece.shape[3] * kind.scale)
        if not isinstance(made, torch.Tensor) or tuple(made.shape) != wanted:
            message = f"The upscaler ({kind.architecture}) does not make pictures {kind.scale} times larger."
            raise ApiError("INVALID_UPSCALER", message, field=FIELD, requested=upscaler.ref.model_id)
        return made.float().clamp(0, 1).cpu()


def to_uint8_channels(picture: torch.Tensor) -> np.ndarray:
    """(1, C, H, W) from 0 to 1 as uint8 (H, W, C), also of one channel."""
    return to_uint8(picture)[0][:, :, : picture.shape[1]]


def _spans(width: int, height: int, kind: Kind, tile: int) -> tuple[Span, Span]:
    """The pieces of a picture, as it is when what the upscaler asks for was added at its right and lower edge."""
    more_wide, more_high = kind.requirements.get_padding(width, height)
    width, height = width + more_wide, height + more_high
    if not kind.tiles or kind.requirements.square:
        return Span((0,), height, height), Span((0,), width, width)
    step, least = kind.requirements.multiple_of, kind.requirements.minimum
    return spread(height, tile, step, least), spread(width, tile, step, least)


def _whole(
    part: torch.Tensor, rows: Span, columns: Span, kind: Kind, make: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    high, wide = rows.whole - part.shape[2], columns.whole - part.shape[3]
    # as spandrel does it: a reflection is one pixel shorter than the picture at most
    reflected = min(wide, part.shape[3] - 1), min(high, part.shape[2] - 1)
    if wide or high:
        part = pad(part, (0, reflected[0], 0, reflected[1]), "reflect")
        part = pad(part, (0, wide - reflected[0], 0, high - reflected[1]), "replicate")
    return tiled(part, rows, columns, kind.scale, make)


def _sized(pixels: np.ndarray, opacity: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture in the size that was asked for, with what the upscaler was not given.

    Args:
        pixels: uint8 (H, W, C).
        opacity: uint8 (h, w, 1), or (h, w, 0) where there is none.
        size: width and height.
    """
    if pixels.shape[1::-1] != size:
        pixels = np.stack([_resized(pixels[:, :, each], size) for each in range(pixels.shape[2])], axis=2)
    if opacity.shape[2]:
        pixels = np.concatenate([pixels, _resized(opacity[:, :, 0], size)[:, :, None]], axis=2)
    return pixels


def _resized(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(PIL.Image.fromarray(plane).resize(size, PIL.Image.Resampling.LANCZOS))


def _check_size(width: int, height: int, kind: Kind, upscale: Upscale) -> None:
    """Whether what is made is within the limit, also where it is made smaller again.

    Raises:
        ApiError: LIMIT_EXCEEDED.
    """
    scale = max(upscale.scale or 0, kind.scale)
    pixels = round(width * scale) * round(height * scale)
    if pixels <= upscale.max_pixels:
        return
    own = f", as it always does: {upscale.scale:g} is made of that" if upscale.scale and upscale.scale < scale else ""
    message = (
        f"The upscaler makes {round(width * scale)}x{round(height * scale)} pixels of {width}x{height}{own}. This "
        f"server's MAX_UPSCALED_PIXELS is {upscale.max_pixels}; send or ask for a smaller image, or take another one."
    )
    raise ApiError("LIMIT_EXCEEDED", message, field="callInputs.upscale", requested=pixels)


@contextlib.contextmanager
def _about(ref: ModelRef) -> Iterator[None]:
    """What is said of a model is said of the upscaler, by the name that the request has for it."""
    try:
        yield
    except ApiError as error:
        if error.code not in ("MODEL_BROKEN", "INVALID_UPSCALER", "NOT_SUPPORTED"):
            raise
        message = error.message
        raise ApiError(error.code, message, field=FIELD, requested=ref.model_id, available=error.available) from error


def _ms(began: float) -> int:
    return round((time.perf_counter() - began) * 1000)
