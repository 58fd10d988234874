"""The engine: one device, many generations at once, each exactly as if it were alone."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL.Image
import torch

from api.engine.attention import components_with
from api.engine.cache import ModelCache
from api.engine.device import Device, is_fatal
from api.engine.executor import Cancelled, Executor, Ticket
from api.engine.loader import LoadedModel, load
from api.engine.pipelines import make_pipeline
from api.engine.preview import OnPreview, Previews
from api.engine.views import view
from api.errors import ApiError
from api.schema.generation import GenerationRequest, ModelRef, Picture

log = logging.getLogger("api.engine")

PACKAGES = ("diffusers", "transformers", "torch", "safetensors")

_TICK = 0.2

OnStep = Callable[[int, int], None]
OnPhase = Callable[[str, str], None]


class Generated:
    """What a generation gave, not encoded yet.

    Attributes:
        images: uint8 (N, H, W, 3).
        meta: what is to be known of it beyond the request.
        timings: milliseconds by phase.
        nsfw: per image, where a safety checker ran.
    """

    def __init__(
        self, images: np.ndarray, meta: dict[str, Any], timings: dict[str, int], nsfw: list[bool] | None
    ) -> None:
        self.images = images
        self.meta = meta
        self.timings = timings
        self.nsfw = nsfw


class Engine:
    """Generates on one device, for several threads at once.

    Args:
        device: what to compute on.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.executor = Executor(None if device.is_cuda else torch.get_num_threads(), device.stopwatch())
        self.cache = ModelCache(device.model_budget(), lambda ref: load(ref, device), device.release_cache)
        self.versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        self._turn = threading.Lock()
        self._released = threading.Condition()

    def load(self, ref: ModelRef) -> None:
        """Bring a model into memory if it is not there yet.

        Raises:
            ApiError: MODEL_BROKEN, OUT_OF_MEMORY.
        """
        with self._leased(ref, lambda: False):
            pass

    def generate(
        self,
        request: GenerationRequest,
        on_step: OnStep = lambda step, total: None,
        on_phase: OnPhase = lambda kind, status: None,
        cancelled: Callable[[], bool] = lambda: False,
        on_preview: OnPreview | None = None,
    ) -> Generated:
        """Run one request in the thread of the caller; its module calls go through the executor.

        Args:
            request: validated.
            on_step: called with (step, total) after every denoising step; steps count from 1.
            on_phase: called when ``loadModel`` or ``inference`` starts and is done.
            cancelled: asked before every module call.
            on_preview: called after ``on_step`` where the request asks for previews; without it none are made.

        Raises:
            Cancelled: ``cancelled`` said so.
            ApiError: MODEL_BROKEN, INVALID_SCHEDULER, PIPELINE_ERROR, OUT_OF_MEMORY.
        """
        timings: dict[str, int] = {}
        cold = request.model not in self.cache
        began = time.perf_counter()
        if cold:
            on_phase("loadModel", "start")
        with self._leased(request.model, cancelled) as model:
            if cold:
                timings["loadModel"] = _ms(began)
                on_phase("loadModel", "done")
            on_phase("inference", "start")
            began = time.perf_counter()
            try:
                images, nsfw, used = self._run(model, request, on_step, cancelled, on_preview)
            except torch.OutOfMemoryError as fault:
                if not self.executor.exclusively(self.cache.clear_idle):
                    raise _out_of_memory(fault) from fault
                log.warning("out of memory: idle models are evicted and the request is tried once more")
                try:
                    images, nsfw, used = self._run(model, request, on_step, cancelled, on_preview)
                except torch.OutOfMemoryError as again:
                    raise _out_of_memory(again) from again
            timings["inference"] = _ms(began)
        on_phase("inference", "done")
        return Generated(images, self._meta(model, used), timings, nsfw)

    @contextlib.contextmanager
    def _leased(self, ref: ModelRef, cancelled: Callable[[], bool]) -> Iterator[LoadedModel]:
        """Hold a model; waits while there is no room for it beside those that others hold.

        One waits at a time, and whoever comes later stands behind it: a stream of requests for what is in memory
        cannot keep another model out for ever.
        """
        with self._turn:
            model = self._lease(ref)
            while model is None:
                if cancelled():
                    raise Cancelled
                with self._released:
                    self._released.wait(_TICK)
                model = self._lease(ref)
        try:
            yield model
        finally:
            self.cache.release(ref)
            with self._released:
                self._released.notify_all()

    def _lease(self, ref: ModelRef) -> LoadedModel | None:
        def lease() -> LoadedModel | None:
            return self.cache.lease(ref, lambda: self._expected_bytes(ref))

        if model := self.cache.hold(ref):
            return model
        try:
            return cast("LoadedModel | None", self.executor.exclusively(lease))
        except torch.OutOfMemoryError:
            pass
        try:
            self.executor.exclusively(self.cache.clear_idle)
            return cast("LoadedModel | None", self.executor.exclusively(lease))
        except torch.OutOfMemoryError as fault:
            raise _out_of_memory(fault) from fault

    def _run(
        self,
        model: LoadedModel,
        request: GenerationRequest,
        on_step: OnStep,
        cancelled: Callable[[], bool],
        on_preview: OnPreview | None,
    ) -> tuple[np.ndarray, list[bool] | None, str]:
        ticket = Ticket(cancelled)
        with self.executor.job(ticket), torch.no_grad():
            parts, used = components_with(model, request.attention)
            generator = make_generators(request.seed)
            seen = {name: view(part, self.executor, ticket, first_seed(request.seed)) for name, part in parts.items()}
            pipe = make_pipeline(model, seen, request.pipeline, request.scheduler, request.safety_checker, generator)

            previews = None
            if request.preview is not None and on_preview is not None:
                size = request.inputs.get("width"), request.inputs.get("height")
                previews = Previews(model, pipe, size, request.preview, on_preview)
                previews.prepare()

            def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                if cancelled():
                    raise Cancelled
                total = max(pipe.num_timesteps, step + 1)
                on_step(step + 1, total)
                if previews:
                    previews.after(step + 1, total, tensors.get("latents"))
                return {}

            arguments: dict[str, Any] = {
                **request.inputs,
                **{name: to_pil(picture) for name, picture in request.pictures.items()},
                "generator": generator,
                "callback_on_step_end": after_step,
                # cropping around a mask pastes the result back with Pillow
                "output_type": "pil" if request.inputs.get("padding_mask_crop") is not None else "pt",
            }
            try:
                out = pipe(**arguments)
            except (Cancelled, torch.OutOfMemoryError):
                raise
            except Exception as fault:
                if not _is_of_inputs(fault, request.inputs):
                    raise
                message = f"diffusers refused the inputs: {fault}"
                raise ApiError("PIPELINE_ERROR", message[:1000], field="modelInputs") from fault
            images = to_uint8(out.images)
        flags = getattr(out, "nsfw_content_detected", None)
        return images, [bool(flag) for flag in flags] if flags is not None else None, used

    def _expected_bytes(self, ref: ModelRef) -> int:
        """What a model will take, from the size of its files; a cast to fp32 doubles fp16 files."""
        files = sum(p.stat().st_size for p in Path(ref.folder).rglob("*.safetensors"))
        return files * (2 if self.device.dtype(ref.precision) == torch.float32 else 1)

    def _meta(self, model: LoadedModel, attention_used: str) -> dict[str, Any]:
        dtype = str(model.dtype).removeprefix("torch.")
        return {
            "device": self.device.torch.type,
            "device_name": self.device.name,
            "dtype": dtype,
            "placement": "full",
            "attention": attention_used,
            "numerics": f"{self.device.torch.type}/{dtype}/{attention_used}/eager",
            "versions": self.versions,
        }


def make_generators(seed: int | list[int]) -> torch.Generator | list[torch.Generator]:
    """One generator for an integer seed, one per image for a list.

    On the CPU, so that a seed means the same noise on every machine.
    """
    if isinstance(seed, list):
        return [torch.Generator().manual_seed(s) for s in seed]
    return torch.Generator().manual_seed(seed)


def first_seed(seed: int | list[int]) -> int:
    """The seed of what is drawn once for all images."""
    return seed[0] if isinstance(seed, list) else seed


def to_pil(picture: Picture) -> PIL.Image.Image:
    """A decoded picture as the pipelines take it."""
    return PIL.Image.frombytes(picture.mode, (picture.width, picture.height), picture.pixels)


def to_uint8(images: torch.Tensor | list[PIL.Image.Image]) -> np.ndarray:
    """What a pipeline gave to uint8 (N, H, W, 3).

    Args:
        images: float (N, 3, H, W) in [0, 1], rounded where the tensor is: the same values as
            diffusers' own ``numpy_to_pil`` without its detour over float32 arrays. Or pictures.
    """
    if isinstance(images, list):
        return np.stack([np.asarray(image.convert("RGB")) for image in images])
    scaled = images.float().mul(255).round_().clamp_(0, 255).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()


_RARE = frozenset({"timesteps", "sigmas", "cross_attention_kwargs", "clip_skip", "padding_mask_crop"})
"""Inputs that reach deep into a pipeline, where a wrong value fails in any way at all."""


def _is_of_inputs(fault: Exception, inputs: dict[str, Any]) -> bool:
    """Whether the client's inputs are to blame: diffusers says so, or they hold something rare.

    A device that was lost is nobody's fault here, whatever the inputs hold: the worker has to end.
    """
    if is_fatal(fault):
        return False
    if isinstance(fault, ValueError | TypeError | NotImplementedError):
        return True
    deep = isinstance(fault, LookupError | AttributeError | RuntimeError)
    return deep and any(inputs.get(name) is not None for name in _RARE)


def _ms(began: float) -> int:
    return round((time.perf_counter() - began) * 1000)


def _out_of_memory(fault: BaseException) -> ApiError:
    return ApiError("OUT_OF_MEMORY", f"Does not fit in memory; ask for fewer or smaller images. {str(fault)[:200]}")
