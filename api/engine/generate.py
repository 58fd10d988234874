"""The engine: one device, many generations at once, each exactly as if it were alone."""

from __future__ import annotations

import importlib.metadata
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from api.engine import lossy
from api.engine.adapters import Adapters
from api.engine.attempts import Attempts, Job, OnPhase, OnStep, Ran, is_short
from api.engine.budgets import Budgets, budgets, host_memory
from api.engine.cache import ModelCache
from api.engine.common_host import HostTier, share
from api.engine.compiled.blocks import Blocks
from api.engine.compiled.graphs import Backend, CudaBackend, Graphs
from api.engine.device import Device
from api.engine.embeddings import Embeddings
from api.engine.executor import Executor
from api.engine.flows import Flows, planned, told_of
from api.engine.ip_adapters import clear as clear_ip_adapters
from api.engine.line import Line, out_of_memory
from api.engine.loader import PartLoader
from api.engine.offload import held_as
from api.engine.parts import Loader
from api.engine.peaks import Peaks
from api.engine.placement import Build, about, codec_of, weights_of
from api.engine.preview import OnPreview
from api.engine.run import Runner
from api.engine.staging import Stager
from api.engine.tally import Tally
from api.engine.tiers import Tiers
from api.engine.upscale import Order, Upscaling
from api.errors import ApiError
from api.schema.generation import WEIGHTS, GenerationRequest, ModelRef
from api.schema.messages import Planned

log = logging.getLogger("api.engine")

PACKAGES = ("diffusers", "transformers", "torch", "safetensors")


class Generated:
    """What a generation gave, not encoded yet.

    Attributes:
        images: uint8 (N, H, W, 3); videos: (N, F, H, W, 3).
        meta: what is to be known of it beyond the request.
        timings: milliseconds by phase.
        nsfw: per image, where a safety checker ran.
        extras: encoded, by name; see ``Extras``.
    """

    def __init__(
        self,
        images: np.ndarray,
        meta: dict[str, Any],
        timings: dict[str, int],
        nsfw: list[bool] | None,
        extras: dict[str, bytes] | None = None,
    ) -> None:
        self.images = images
        self.meta = meta
        self.timings = timings
        self.nsfw = nsfw
        self.extras = extras or {}


class Engine:
    """Generates on one device, for several threads at once.

    Args:
        device: what to compute on.
        limits: bytes that models may take; None: as measured.
        loader: reads models; None: our own.
        longest_wait: seconds for which a job may be passed by jobs whose model is in memory.
        idle_timeout: seconds after which an unused model leaves the device; 0: never.
        adapters_limit: bytes of the device that adapters may take which no running job uses.
        embeddings_limit: bytes of the device that results of text encoders may take, for prompts that come again.
        attention: the kernels of requests for ``auto`` ones, by dtype; torch's own where it names none.
        compiled: ``blocks``, ``graphs``, ``both`` or ``off``; see docs/compile.md.
        compile_cache: folder of compiled code.
        recorder: of graphs; None: CUDA's, where the device has it.
        tier: the host's memory, where other workers share it.
    """

    def __init__(
        self,
        device: Device,
        limits: Budgets | None = None,
        loader: Loader | None = None,
        longest_wait: float = 10.0,
        idle_timeout: float = 0.0,
        adapters_limit: int = 2**30,
        embeddings_limit: int = 2**26,
        attention: Mapping[torch.dtype, str] = MappingProxyType({}),
        compiled: str = "off",
        compile_cache: Path | None = None,
        recorder: Backend | None = None,
        tier: HostTier | None = None,
    ) -> None:
        self.device = device
        found = device.memory()
        self.peaks = Peaks(device.meter(), found.free if found else None)
        threads = None if device.is_cuda else torch.get_num_threads()
        self.tally = Tally()
        recorder = recorder or (CudaBackend(device.torch) if device.is_cuda else None)
        self.graphs = (
            Graphs(recorder, device.torch, tally=self.tally) if recorder and compiled in ("graphs", "both") else None
        )
        if self.graphs:
            self.peaks.kept = lambda: self.graphs.bytes if self.graphs else 0
        self.executor = Executor(threads, device.stopwatch(), self.peaks, self.tally, self.graphs)
        limits = limits or budgets(None, None, device.memory(), host_memory())
        tiers = Tiers(limits.device, limits.host, shared=limits.shared, capacity=limits.capacity)
        executor, loader = self.executor, loader or PartLoader(device, limits.host, tier)
        run, alone = executor.on_device, executor.exclusively
        self.cache = ModelCache(tiers, loader, run, alone, device.release_cache, self.tally)
        if tier and isinstance(loader, PartLoader):
            share(self.cache, tier, loader.named)
        self.adapters = Adapters(device.torch, adapters_limit)
        self.embeddings = Embeddings(embeddings_limit)
        self.cache.on_clear, self.cache.on_leave = self._clear, self._left
        self.line = Line(self.cache, longest_wait)
        self.versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        self.blocks: Blocks | None = None
        if compile_cache and compiled in ("blocks", "both"):
            self.blocks = Blocks(device.torch, compile_cache, self.versions, executor.on_device, self.tally)
        given = self.adapters, self.embeddings, self.blocks, self.graphs
        runner = Runner(device, executor, self.tally, attention, *given)
        self.attempts = Attempts(self.cache, self.line, device, runner.run, limits.strict, self._foresees)
        self.flows = Flows(self.attempts, self.line)
        self.upscaling = Upscaling(device, executor, self.cache, self.line, self.attempts.company)
        self.stager = Stager(self.cache, self.line.wishes, idle_timeout)
        self.line.on_change = self.stager.poke

    def _clear(self) -> bool:
        """Forget what the device holds beside models for jobs to come; whether there was anything."""
        graphs = self.graphs.clear() if self.graphs else False
        return any([self.adapters.clear(), self.embeddings.clear(), clear_ip_adapters(), graphs])

    def _left(self, module: Any) -> None:
        self.embeddings.forget(module)
        if self.graphs:
            self.graphs.moved()

    def close(self) -> None:
        """End the threads."""
        if self.blocks:
            self.blocks.close()
        self.stager.close()
        self.executor.close()

    def wake(self) -> None:
        """A job was cancelled: let it leave wherever it waits."""
        self.executor.wake()
        self.line.wake()
        self.attempts.company.wake()

    def want(self, refs: Sequence[ModelRef]) -> None:
        """Say which models will be asked for, the next one first: they are read ahead, and evicted last."""
        self.line.wanted = tuple(refs)
        self.stager.poke()

    def load(
        self,
        ref: ModelRef,
        tier: str = "device",
        *,
        pin: bool = False,
        evict: bool = True,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Bring a model into memory if it is not there yet.

        Args:
            ref: which model.
            tier: ``device`` or ``host``.
            pin: keep it there.
            evict: others may be evicted for it; else it is left out where there is no room.
            cancelled: asked while it waits or loads, and whenever ``wake`` is called.

        Raises:
            ApiError: MODEL_BROKEN, OUT_OF_MEMORY.
            Cancelled: ``cancelled`` said so.
        """
        if tier == "host":
            self._load_host(ref, pin, cancelled)
            pin = False  # it is
        elif not evict:
            self._load_if_room(ref, cancelled)
        else:
            # what is pinned to the device is there as it is, and upscalers are never offloaded
            as_it_is = pin or self.device.shares_host or ref.is_upscaler
            ways = ["full"] if as_it_is else self.attempts.ways_of(ref, list(WEIGHTS))
            while not self._load_as(held_as(ref, ways[0]), pin, cancelled, last=len(ways) == 1):
                ways = ways[1:]
            self.cache.give_back()
            return
        if pin:
            self.cache.pin(ref, tier)

    def _load_as(self, held: ModelRef, pin: bool, cancelled: Callable[[], bool], last: bool) -> bool:
        """Load a model held in one way; whether it came, where memory does not suffice and it is not the last way."""
        try:
            with self.attempts.company.together(cancelled), self.line.lease(held, cancelled):
                self.cache.keep(held)
                if pin:
                    self.cache.pin(held, "device")
        except ApiError as error:
            if last or not is_short(error):
                raise
            return False
        return True

    def _load_host(self, ref: ModelRef, pin: bool, cancelled: Callable[[], bool]) -> None:
        try:
            if self.cache.load_host(ref, pin=pin, cancelled=cancelled):
                return
        except MemoryError as fault:
            raise out_of_memory(fault) from fault
        memory = self.cache.memory()
        message = (
            f"{ref.model_id} does not fit in the {memory.host_limit / 1e9:.2f} GB of RAM_LIMIT beside what is in use "
            "or pinned there; unload another model, or send this again when the jobs that run are done."
        )
        raise ApiError("OUT_OF_MEMORY", message, field="callInputs.MODEL_ID", requested=ref.model_id)

    def _load_if_room(self, ref: ModelRef, cancelled: Callable[[], bool]) -> None:
        reservation = self.cache.reserve(ref, self.cache.parts(ref), evict=False)
        if reservation and self.cache.complete(reservation, cancelled):
            self.cache.release(ref)
        self.cache.give_back()

    def plan(self, request: GenerationRequest) -> Planned:
        """What a request would take, without running it.

        Args:
            request: validated; its pictures may be without pixels.

        Raises:
            ApiError: MODEL_BROKEN.
        """
        if request.then:
            return planned(request, self.plan)
        cache = self.cache
        lossy.check_quantizes(request, cache.parts)
        try:
            ways = self.attempts.ways(request)
            placement, fits = self.attempts.ladder.expected(request, ways)
            held = held_as(request.model, weights_of(placement or ways[0]))
            tier, total, read, copy = cache.missing(held)
        except ApiError as error:
            if error.code != "OUT_OF_MEMORY":
                raise
            total = sum(spec.bytes for spec in cache.parts(request.model))
            return Planned(False, error.message, None, "disk", total, total, total, None, None)
        why = "" if fits is not False else "A request like it did not fit in the device's memory."
        seconds = cache.rates["read"].seconds(read), cache.rates["copy"].seconds(copy)
        return Planned(fits, why, placement, tier, total, read, copy, *seconds)

    def generate(
        self,
        request: GenerationRequest,
        on_step: OnStep = lambda step, total: None,
        on_phase: OnPhase = lambda kind, status: None,
        cancelled: Callable[[], bool] = lambda: False,
        on_preview: OnPreview | None = None,
        deadline: float = math.inf,
        overdue: float = math.inf,
    ) -> Generated:
        """Run one request in the thread of the caller; its module calls go through the executor.

        Args:
            request: validated.
            on_step: called with (step, total) after every denoising step; steps count from 1.
            on_phase: called when ``loadModel``, ``inference`` or ``upscale`` starts and is done.
            cancelled: asked before every module call.
            on_preview: called after ``on_step`` where the request asks for previews; without it none are made.
            deadline: when the result is of no use any more, ``time.monotonic``.
            overdue: until when it may wait for a model while others go before it.

        Raises:
            Cancelled: ``cancelled`` said so.
            ApiError: MODEL_BROKEN, INVALID_SCHEDULER, PIPELINE_ERROR, OUT_OF_MEMORY, INVALID_UPSCALER, LIMIT_EXCEEDED.
        """
        for stage in request.stages:
            lossy.check_quantizes(stage, self.cache.parts)
        timings: dict[str, int] = {}
        order = Order(request.upscale, cancelled, deadline=deadline, overdue=overdue) if request.upscale else None
        self.upscaling.check(request)
        if request.extra and order:
            order.on_piece = on_step
            images, told, timings = self.upscaling.upsample(request, order, on_phase)
            return Generated(images, {**told, "versions": self.versions}, timings, None)
        job = Job(request, on_step, on_phase, cancelled, on_preview, deadline, overdue)
        try:
            runs = self.flows.run(job, timings)
        finally:
            self.cache.give_back()
        on_phase("inference", "done")
        images, told, more = self.upscaling.finish(request, runs[-1].images, order, on_phase)
        meta = told_of(request, [self._meta(*run) for run in zip(request.stages, runs, strict=True)])
        extras = {name: extra for run in runs for name, extra in run.extras.items()}
        return Generated(images, meta | told, timings | more, runs[-1].nsfw, extras)

    def _foresees(self, build: Build, request: GenerationRequest, placement: str) -> bool:
        """Whether a placement's weights and what was learned of its calls are more than there is."""
        held = held_as(request.model, weights_of(placement))
        return self.peaks.exceeds(about(build, request, placement), lambda: self.cache.device_bytes(held))

    def _meta(self, request: GenerationRequest, done: Ran) -> dict[str, Any]:
        dtype = str(done.dtype).removeprefix("torch.")
        numerics = f"{self.device.torch.type}/{dtype}/{done.attention}/{done.code}"
        numerics += "".join(f"/{word}" for word in done.words)
        numerics += lossy.words(request, done.told, self.device.torch, done.dtype)
        return {
            "device": self.device.torch.type,
            "device_name": self.device.name,
            "dtype": dtype,
            "placement": done.placement,
            "attention": done.attention,
            "numerics": f"{numerics}/tiled" if codec_of(done.placement) == "tiled" else numerics,
            "versions": self.versions,
            **done.told,
        }
