"""Runs a request as often as memory asks for: beside others, alone, and down the ladder of placements.

What was tried in company decides over nothing: a placement that changes pixels is taken only when the request did not
fit with the device for itself, so that the load of the moment never shows in an image.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from api.engine.cache import ModelCache
from api.engine.calls import Cancelled, Ticket
from api.engine.company import Company
from api.engine.device import Device, shortage
from api.engine.line import Line
from api.engine.loader import LoadedModel
from api.engine.moving import Reservation
from api.engine.offload import held_as
from api.engine.placement import Foresees, Ladder, about, build_of, size_of, weights_of
from api.engine.preview import OnPreview
from api.errors import ApiError
from api.schema.generation import GenerationRequest, ModelRef

log = logging.getLogger("api.engine")

OnStep = Callable[[int, int], None]
OnPhase = Callable[[str, str], None]


class Ran(NamedTuple):
    """A run that went well, and how it was done.

    Where another generation follows, ``latents`` may take the place of images, and ``random`` is the state in which it
    left its generators.
    """

    images: np.ndarray
    nsfw: list[bool] | None
    dtype: torch.dtype
    attention: str
    placement: str
    told: dict[str, Any]
    extras: dict[str, bytes]
    latents: torch.Tensor | None = None
    random: Sequence[torch.Tensor] = ()
    words: tuple[str, ...] = ()
    """What ``$meta.numerics`` says beside device, dtype and attention."""
    code: str = "eager"


class _Short(NamedTuple):
    """A run for which memory did not suffice: the method of a module that it ended in, and the error's text."""

    short_at: str
    text: str


class _Unloadable(Exception):
    """A model cannot be loaded for want of the device's memory."""


@dataclass
class Job:
    """A request on its way, through as many runs as it takes; the arguments are those of ``Engine.generate``.

    One that is a stage of a flow (``flows``) takes what the one before ``handed`` over, by argument, and goes on where
    that left its generators, ``random``; with ``latents`` it gives these in the place of images.
    """

    request: GenerationRequest
    on_step: OnStep
    on_phase: OnPhase
    cancelled: Callable[[], bool]
    on_preview: OnPreview | None
    deadline: float
    overdue: float
    began: float = 0.0
    short: _Short = _Short("", "")
    tried: list[str] = field(default_factory=list)
    handed: dict[str, Any] = field(default_factory=dict)
    random: Sequence[torch.Tensor] = ()
    latents: bool = False
    eager: bool = False
    code: Any = None


class Attempts:
    """Runs requests.

    Args:
        cache: of the models.
        line: gives them out.
        device: asked what it has.
        run_once: runs a request for a job of the executor, with a model under a placement.
        strict: the device's budget was set by whoever runs the container: a model larger than it is offloaded, and not
            tried as it is when nothing else is there.
        foresees: see ``Ladder``.

    Attributes:
        company: who shares the device's memory.
        ladder: of placements.
    """

    def __init__(
        self,
        cache: ModelCache,
        line: Line,
        device: Device,
        run_once: Callable[[LoadedModel, Job, Ticket, str], Ran],
        strict: bool = False,
        foresees: Foresees = lambda *_: False,
    ) -> None:
        self._cache = cache
        self._line = line
        self._device = device
        self._run_once = run_once
        self._strict = strict
        self._unloadable: dict[tuple[str, str], None] = {}
        """Models and ways to hold them that memory did not suffice for."""
        self.ladder = Ladder(not device.shares_host, foresees)
        self.company = Company()

    def run(self, job: Job, timings: dict[str, int]) -> Ran:
        """Run a request, again where memory does not suffice.

        Args:
            job: which.
            timings: to be filled in, milliseconds by phase.

        Raises:
            Cancelled: the job is to stop.
            ApiError: MODEL_BROKEN, OUT_OF_MEMORY; what is wrong with the request.
        """
        with self.company.together(job.cancelled) as visit:
            done = self._run_in_company(job, timings)
        if done is None:
            with self.company.alone(job.cancelled):
                done = self._run_alone(job, timings, again=visit.had_company)
        return done

    def ways(self, request: GenerationRequest) -> list[str]:
        """The ways to hold the weights that a request may be run with, the one that takes most memory first.

        They depend on the request and on what the container may use, not on what is in memory; pins count as its
        settings.

        Raises:
            ApiError: NOT_SUPPORTED; MODEL_BROKEN; OUT_OF_MEMORY: the model fits in none of those that it allows.
        """
        return self.ways_of(request.model, self.ladder.wanted(request))

    def ways_of(self, ref: ModelRef, wanted: list[str]) -> list[str]:
        """Of some ways to hold a model's weights, those that there may be room for; see ``ways``."""
        if len(wanted) == 1:
            return wanted
        found, faults = list[str](), list[ApiError]()
        for way in wanted:
            try:
                self._cache.check_possible(held_as(ref, way), within_limit=self._strict)
                found.append(way)
            except ApiError as error:
                if error.code != "OUT_OF_MEMORY":
                    raise
                faults.append(error)
        found = [way for way in found if (ref.key, way) not in self._unloadable] or found[-1:]
        if not found:
            raise _in_no_way(wanted, faults)
        return found

    @contextlib.contextmanager
    def _leased(self, job: Job, timings: dict[str, int], way: str) -> Iterator[LoadedModel]:
        """Hold the job's model; how long that and the rest took is added up, its phases are told once."""
        loading: list[tuple[Mapping[str, float], float]] = []
        first = not job.began

        def on_load(reservation: Reservation) -> None:
            if not loading and first:
                self._cache.tally.switch()
                job.on_phase("loadModel", "start")
            loading.append((reservation.seconds, time.perf_counter()))  # not what it holds

        ref = held_as(job.request.model, way)
        with self._line.lease(ref, job.cancelled, job.deadline, job.overdue, on_load) as model:
            if loading and first:
                timings["loadModel"] = _ms(loading[0][1])
                timings |= {name: round(took * 1000) for name, took in loading[-1][0].items()}
                job.on_phase("loadModel", "done")
            if first:
                job.on_phase("inference", "start")
                job.began = time.perf_counter()
            yield model
            timings["inference"] = _ms(job.began)

    def _run_in_company(self, job: Job, timings: dict[str, int]) -> Ran | None:
        """Run beside other jobs; None where memory did not suffice, even when what is not in use had left it."""
        ways = self.ways(job.request)
        way = self.ladder.way(job.request, ways)
        while True:
            done = self._run_as(job, timings, ways, way)
            if not isinstance(done, str):
                return done
            way = done

    def _run_as(self, job: Job, timings: dict[str, int], ways: list[str], way: str) -> Ran | str | None:
        """The same with the weights held in one way; or the way to hold them, where that is another."""
        with contextlib.ExitStack() as held:
            try:
                model = held.enter_context(self._leased(job, timings, way))
            except ApiError as error:
                if len(ways) == 1 or not is_short(error):
                    raise
                return None
            placement = self.ladder.start(model, job.request, ways)
            if weights_of(placement) != way:
                return weights_of(placement)
            done = self._try(model, job, placement)
            if isinstance(done, _Short) and self._cache.clear_idle():
                self._cache.tally.shortage("evict")
                log.warning("out of memory: idle models are evicted and the request is tried once more")
                done = self._try(model, job, placement)
        return None if isinstance(done, _Short) else done

    def _run_alone(self, job: Job, timings: dict[str, int], *, again: bool) -> Ran:
        """Run with the device's memory for oneself, and down the ladder where even that does not suffice.

        Args:
            job: which.
            timings: to be filled in.
            again: the placement that did not suffice may do so now: others were there.

        Raises:
            ApiError: OUT_OF_MEMORY.
        """
        self._cache.tally.shortage("alone")
        log.warning("out of memory: the request is run alone")
        placement: str | None = None
        ways = self.ways(job.request)
        way = self.ladder.way(job.request, ways)
        while True:
            try:
                done = self._run_down(job, timings, ways, way, placement, again)
            except _Unloadable:
                below = ways[ways.index(way) + 1 :]
                log.warning("%s does not load as %s: %s from now on", job.request.model.model_id, way, below[0])
                self._unloadable[job.request.model.key, way] = None
                ways, way, placement = below, below[0], None
                continue
            if isinstance(done, Ran):
                return done
            self._cache.tally.shortage("lower_placement")
            placement, way, again = done, weights_of(done), True
            self._cache.clear_idle()

    def _run_down(
        self, job: Job, timings: dict[str, int], ways: list[str], way: str, placement: str | None, again: bool
    ) -> Ran | str:
        """Run down those rungs of the ladder that hold the weights in one way.

        Returns:
            What it made, or the placement that may suffice, which holds them in another one.

        Raises:
            _Unloadable: there is no memory for the model as that, and there are other ways.
            ApiError: OUT_OF_MEMORY.
        """
        with contextlib.ExitStack() as held:
            try:
                model = held.enter_context(self._leased(job, timings, way))
            except ApiError as error:
                if way == ways[-1] or not is_short(error):
                    raise
                raise _Unloadable from None
            placement = placement or self.ladder.start(model, job.request, ways)
            again = self._cache.clear_idle() or again or job.tried[-1:] != [placement]
            done: Ran | _Short = job.short
            while placement and weights_of(placement) == way:
                if again:
                    done = self._try(model, job, placement)
                if isinstance(done, Ran):
                    return done
                placement, again = self.ladder.lower(model, job.request, placement, done.short_at, ways), True
                if placement and weights_of(placement) == way:
                    self._cache.tally.shortage("lower_placement")
            if placement:
                return placement
            self.ladder.note(model, job.request, fitted=False)
            raise self._out_of_memory(model, job)

    def _try(self, model: LoadedModel, job: Job, placement: str) -> Ran | _Short:
        """Run; where memory does not suffice, what is known of that, and nothing of what the job had allocated."""
        ticket = Ticket(job.cancelled, about(build_of(model), job.request, placement))
        ticket.graphs = job.request.compile
        job.tried.append(placement)
        try:
            done = self._run_once(model, job, ticket, placement)
            self.ladder.note(model, job.request, fitted=True)
            return done
        except Cancelled:
            raise
        except Exception as fault:
            if (text := shortage(fault)) is None:
                raise
        # past the handler: until it ends, the fault and all that it knows of live
        log.info("out of memory as %s, in %s: %s", placement, ticket.short_at or "the job itself", text[:200])
        job.short = _Short(ticket.short_at, text)
        return job.short

    def _out_of_memory(self, model: LoadedModel, job: Job) -> ApiError:
        request, memory, found = job.request, self._cache.memory(), self._device.memory()
        size = "x".join(map(str, size_of(request)))
        what = f"{request.images} images" if request.images > 1 else "The image"
        has = f" of {found.total / 1e9:.2f} GB" if found else ""
        tried = ", ".join(dict.fromkeys(job.tried))
        message = (
            f"{what}{f' of {size}' if size else ''} and the {model.bytes / 1e9:.2f} GB of {model.ref.model_id} do not "
            f"fit in the memory{has} of the device, tried alone as {tried}. Ask for fewer or smaller images"
            f"{'' if request.offload == 'auto' else ', or leave OFFLOAD out'}. {job.short.text[:200]}"
        )
        numbers = {
            "model_bytes": model.bytes,
            "device_bytes": memory.device,
            "device_limit": memory.device_limit,
            "device_total": found.total if found else None,
            "device_free": found.free if found else None,
            "placements": list(dict.fromkeys(job.tried)),
        }
        return ApiError("OUT_OF_MEMORY", message, requested=size or None, available=numbers)


def is_short(error: ApiError) -> bool:
    """Whether a model could not be loaded for want of the device's memory."""
    return error.code == "OUT_OF_MEMORY" and isinstance(error.__cause__, torch.OutOfMemoryError)


def _in_no_way(ways: Sequence[str], faults: Sequence[ApiError]) -> ApiError:
    said = "; ".join(f"as {way}: {fault.message}" for way, fault in zip(ways, faults, strict=True))
    return ApiError("OUT_OF_MEMORY", f"It fits in no way. {said}", field=faults[0].field, requested=faults[0].requested)


def _ms(began: float) -> int:
    return round((time.perf_counter() - began) * 1000)
