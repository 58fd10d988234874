"""What a request gets that makes images larger: ``upscale`` after a generation, and ``use_extra: "upsample"``."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from api.errors import ApiError
from api.models.adapter_header import read_shapes
from api.models.adapters import FIELDS, UPSCALER, Asked, adapter_ref
from api.models.library import InstalledAdapter, Library
from api.models.safetensors_check import safetensors_problem
from api.models.upscalers import DEFAULT_TILE, NAMED, AskedUpscale, read_name
from api.schema.catalogue import nearest
from api.schema.generation import GenerationRequest, ModelRef, Picture, Upscale
from api.schema.transfers import Transfer
from api.service import memory
from api.service.adapters import Adapters
from api.service.destinations import Destination, check_destinations, choose_destinations
from api.service.inputs import ALIASES
from api.service.output import Encoding, choose_encoding
from api.service.pictures import read_picture
from api.service.workers import Worker
from api.settings import Settings

EXTRAS = ("upsample",)
_TAKEN = frozenset({
    "use_extra", "upscale", "MODEL_ID", "MODEL_PRECISION", "is_url", "image_format", "image_quality", "lossless",
    "image_metadata", "output_url", "streamEvents", "async", "startRequestId", "SEND_URL", "SIGN_KEY",
})  # fmt: skip
"""The ``callInputs`` that mean something where no pipeline runs."""
_PICTURES = ("image", *ALIASES)
_OLD = {"face_enhance": (None, False, 0), "denoise_strength": (None, 1)}
"""``modelInputs`` of docker-diffusers-api, and the values that ask for nothing."""

OnEvent = Callable[[Transfer], None]


class Ready(msgspec.Struct, frozen=True):
    """An upscaler that is here.

    Attributes:
        upscale: what a worker is told.
        meta: what ``$meta`` says of it: can be sent again.
        timings: what it took to get it, milliseconds by phase.
    """

    upscale: Upscale
    meta: dict[str, Any]
    timings: dict[str, int]


class Upscaling:
    """Finds, fetches and checks upscalers, and admits requests that want nothing else.

    Args:
        settings: limits.
        adapters: gets their files, which are kept as those of adapters are.
        has_gpu: they compute in fp16 there, where they can.
    """

    def __init__(self, settings: Settings, adapters: Adapters, has_gpu: bool) -> None:
        self._settings = settings
        self._adapters = adapters
        self._has_gpu = has_gpu

    def check(self, options: dict[str, Any]) -> None:
        """What can be said of ``upscale`` in a generation without looking for the upscaler.

        Raises:
            ApiError: INVALID_INPUTS.
        """
        asked: AskedUpscale | None = options.get("upscale")
        if asked is None:
            return
        if asked.model is None:
            message = "Say which upscaler: one of these, a .safetensors file in a repository, or a URL."
            raise ApiError("INVALID_INPUTS", message, field=FIELDS[UPSCALER], available=list(NAMED))
        adapter_ref(asked.model, self._settings)

    def check_size(self, options: dict[str, Any], size: tuple[int, int] | None) -> None:
        """Whether what is asked for is within the limit, as far as the request says it.

        Args:
            options: checked ``callInputs``.
            size: width and height of what is made larger, if they are known.

        Raises:
            ApiError: LIMIT_EXCEEDED.
        """
        asked: AskedUpscale | None = options.get("upscale")
        if asked is None or asked.scale is None or size is None:
            return
        width, height = size
        pixels, most = round(width * asked.scale) * round(height * asked.scale), self._settings.max_upscaled_pixels
        if pixels > most:
            message = (
                f"{width}x{height} made {asked.scale:g} times larger are {pixels} pixels; this server's "
                f"MAX_UPSCALED_PIXELS is {most}."
            )
            raise ApiError("LIMIT_EXCEEDED", message, field="callInputs.upscale.scale", requested=asked.scale)

    async def ready(
        self, options: dict[str, Any], held: contextlib.ExitStack, on_event: OnEvent | None = None
    ) -> Ready | None:
        """Have the upscaler of a generation here; None where it asks for none.

        Args:
            options: checked ``callInputs``.
            held: keeps it on the volume until it is closed.
            on_event: called with what happens while it is fetched.

        Raises:
            ApiError: MODEL_BROKEN; what its source says.
        """
        asked: AskedUpscale | None = options.get("upscale")
        if asked is None or asked.model is None:
            return None
        return await self._ready(asked.model, asked, "fp16", held, on_event)

    async def _ready(
        self,
        model: Asked,
        asked: AskedUpscale,
        precision: str,
        held: contextlib.ExitStack,
        on_event: OnEvent | None,
    ) -> Ready:
        adapter, timings = await self._adapters.get(model, held, on_event)
        await asyncio.to_thread(_check_file, adapter)
        name = adapter.name.partition("#")[0] + (f"#revision={model.revision}" if model.revision else "")
        ref = ModelRef(name, adapter.sha256, precision if self._has_gpu else "fp32", str(adapter.path))
        upscale = Upscale(ref, asked.scale, asked.tile, self._settings.max_upscaled_pixels)
        meta = {"model": name, "sha256": adapter.sha256, "scale": asked.scale, "tile": asked.tile}
        return Ready(upscale, {name: value for name, value in meta.items() if value is not None}, timings)

    def asked(self, options: dict[str, Any], model_inputs: dict[str, Any]) -> AskedUpscale | None:
        """What ``use_extra`` asks for; None where a pipeline is to be run.

        Raises:
            ApiError: NO_SUCH_EXTRA, INVALID_INPUTS, UNKNOWN_INPUT, MISSING_INPUT, NOT_SUPPORTED, NO_MODEL_ID,
                SAFETY_REQUIRED.
        """
        extra = options.get("use_extra")
        if extra is None:
            return None
        if extra not in EXTRAS:
            message = f"There is no such extra.{nearest(extra, EXTRAS)}"
            raise ApiError(
                "NO_SUCH_EXTRA", message, field="callInputs.use_extra", requested=extra, available=list(EXTRAS)
            )
        if self._settings.safety_checker == "required":
            message = "This server gives out no image that its safety checker has not seen, and an extra runs none."
            raise ApiError("SAFETY_REQUIRED", message, field="callInputs.use_extra", requested=extra)
        for name in options:
            if name not in _TAKEN:
                message = f"use_extra {extra} runs no pipeline and takes no {name}; leave it out."
                raise ApiError("INVALID_INPUTS", message, field=f"callInputs.{name}", available=sorted(_TAKEN))
        _check_inputs(model_inputs)
        asked: AskedUpscale = options.get("upscale") or AskedUpscale(None, None, DEFAULT_TILE)
        named = options.get("MODEL_ID")
        if named and asked.model:
            message = "upscale.model names the upscaler already; send one of them."
            raise ApiError("INVALID_INPUTS", message, field="callInputs.MODEL_ID", requested=named)
        model = read_name(named, "callInputs.MODEL_ID") if named else asked.model
        if model is None:
            message = "Say which upscaler: one of these, a .safetensors file in a repository, or a URL."
            raise ApiError("NO_MODEL_ID", message, field="callInputs.MODEL_ID", available=list(NAMED))
        with _said_of(options):
            adapter_ref(model, self._settings)
        choose_encoding(options)
        return msgspec.structs.replace(asked, model=model)

    async def admit(
        self,
        request_id: str,
        options: dict[str, Any],
        model_inputs: dict[str, Any],
        asked: AskedUpscale,
        on_event: OnEvent | None,
    ) -> tuple[GenerationRequest, dict[str, int], tuple[Destination, ...]]:
        """Read the picture, and have the upscaler here.

        Args:
            request_id: what the client and the log know the request by.
            options: checked ``callInputs``.
            model_inputs: as they were sent.
            asked: from the method of that name.
            on_event: called with what happens while the upscaler is fetched.

        Returns:
            The request, milliseconds by phase, and where the image goes, if not into the answer.

        Raises:
            ApiError: what is wrong with the picture; MODEL_BROKEN; what the upscaler's source says.
        """
        assert asked.model is not None
        encoding, job_id = choose_encoding(options), secrets.token_hex(8)
        destinations = choose_destinations(options, 1, encoding.format, job_id, self._settings)
        await check_destinations(destinations, self._settings)
        picture = await self._picture(options, model_inputs, encoding)
        self.check_size({**options, "upscale": asked}, (picture.width, picture.height))
        with contextlib.ExitStack() as held, _said_of(options):
            precision = options.get("MODEL_PRECISION") or "fp16"
            ready = await self._ready(asked.model, asked, precision, held, on_event)
            meta: dict[str, Any] = {
                "use_extra": "upsample",
                "upscale": ready.meta,
                "modelInputs": {"image": f"sha256:{picture.sha256}"},
                "image_format": encoding.format,
                "image_quality": encoding.quality,
            }
            meta |= {"lossless": True} if encoding.lossless else {}
            meta |= {name: options[name] for name in ("startRequestId", "MODEL_PRECISION") if name in options}
            request = GenerationRequest(
                id=job_id,
                request_id=request_id,
                model=ready.upscale.model,
                pipeline="",
                scheduler="",
                inputs={},
                pictures={"image": picture},
                seed=0,
                images=1,
                image_format=encoding.format,
                image_quality=encoding.quality,
                attention="sdpa",
                safety_checker=False,
                meta=meta,
                lossless=encoding.lossless,
                image_metadata=options.get("image_metadata", True),
                upscale=ready.upscale,
                extra="upsample",
            )
        return request, ready.timings, destinations

    async def check_picture(self, options: dict[str, Any], model_inputs: dict[str, Any], asked: AskedUpscale) -> None:
        """What can be said of the picture of a request that is to run later; of one at a URL, nothing.

        Raises:
            ApiError: what is wrong with it.
        """
        if not options.get("is_url"):
            picture = await self._picture(options, model_inputs, choose_encoding(options))
            self.check_size({**options, "upscale": asked}, (picture.width, picture.height))

    async def _picture(self, options: dict[str, Any], model_inputs: dict[str, Any], encoding: Encoding) -> Picture:
        (name,) = (each for each in _PICTURES if model_inputs.get(each))
        is_url, mode = bool(options.get("is_url")), "RGB" if encoding.format == "JPEG" else "RGBA"
        return await read_picture(model_inputs[name], f"modelInputs.{name}", mode, is_url, self._settings)


def listed(library: Library, workers: list[Worker]) -> list[dict[str, Any]]:
    """Every upscaler that is here, or in memory only; in a thread.

    Args:
        library: what is on the volume.
        workers: in whose memory one may be.
    """
    loaded = {memory.files_of(one.ref): one.ref for one in memory.held(workers, lambda ref: ref.is_upscaler)}
    found = [(each.name, each.path, each.sha256, each.source) for each in library.upscalers()]
    known = {(str(path), sha256) for _, path, sha256, _ in found}
    found += [(ref.model_id, Path(ref.folder), ref.revision, "") for key, ref in loaded.items() if key not in known]
    return [
        {
            "model": name.partition("#")[0],
            "sha256": sha256,
            "source": source or None,
            "path": path,
            "disk": path.stat().st_size if path.is_file() else 0,
        }
        for name, path, sha256, source in found
    ]


def with_upscale(request: GenerationRequest, ready: Ready | None) -> GenerationRequest:
    """A generation whose images are made larger, if they are to be."""
    if ready is None:
        return request
    return msgspec.structs.replace(request, upscale=ready.upscale, meta={**request.meta, "upscale": ready.meta})


def _check_inputs(model_inputs: dict[str, Any]) -> None:
    for name, value in model_inputs.items():
        if name in _OLD and value in _OLD[name]:
            continue
        if name in _OLD:
            message = f"{name} needs another model beside the upscaler, which is not run here; leave it out."
            raise ApiError("NOT_SUPPORTED", message, field=f"modelInputs.{name}", requested=value)
        if name not in _PICTURES:
            message = f"An upscaler takes a picture and nothing else.{nearest(name, _PICTURES)}"
            raise ApiError("UNKNOWN_INPUT", message, field=f"modelInputs.{name[:200]}", available=list(_PICTURES))
    sent = [name for name in _PICTURES if model_inputs.get(name)]
    if not sent:
        raise ApiError("MISSING_INPUT", "The picture that is to become larger is missing.", field="modelInputs.image")
    if len(sent) > 1:
        message = f"The same as {sent[0]}; send one picture."
        raise ApiError("INVALID_INPUTS", message, field=f"modelInputs.{sent[1]}")
    if not isinstance(model_inputs[sent[0]], str):
        message = "Must be an image (base64, or a URL with callInputs.is_url)."
        raise ApiError("INVALID_INPUTS", message, field=f"modelInputs.{sent[0]}")


def _check_file(adapter: InstalledAdapter) -> None:
    """In a thread: whether a file is safetensors, and whole. What it is, the worker says."""
    problem = safetensors_problem(adapter.path)
    try:
        problem = problem or ("" if read_shapes(adapter.path) else "holds no weights")
    except (OSError, ValueError) as fault:
        problem = f"cannot be read: {fault}"
    if problem:
        message = f"{adapter.name} {problem}. Remove it and fetch it again, or take another one."
        raise ApiError("MODEL_BROKEN", message, field=FIELDS[UPSCALER], requested=adapter.name)


@contextlib.contextmanager
def _said_of(options: dict[str, Any]) -> Iterator[None]:
    """What is said of the upscaler is said of where it was named."""
    try:
        yield
    except ApiError as error:
        if error.field != FIELDS[UPSCALER] or "MODEL_ID" not in options:
            raise
        error.field = "callInputs.MODEL_ID"
        raise
