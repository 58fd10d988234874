"""Runs requests on one engine, each in a thread of its own."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from api.engine.calls import Cancelled
from api.engine.device import is_fatal, release_host_memory
from api.engine.encode import encode
from api.engine.encode_video import encode_video
from api.engine.generate import Engine, Generated
from api.engine.metadata import texts
from api.errors import ApiError
from api.schema.generation import GenerationRequest, GenerationResult
from api.schema.messages import (
    DEVICE_LOST,
    Alive,
    Answer,
    Computed,
    Counted,
    Done,
    Failed,
    Generate,
    Load,
    Loaded,
    OnTheWay,
    Phase,
    Plan,
    Preview,
    Progress,
    Stage,
    Unload,
)
from api.worker.link import Link
from api.worker.pulse import Pulse

log = logging.getLogger("api.worker")
_ENCODERS = 4
_ALIVE = 2.0
"""Seconds between two signs of life."""
_LOOK = 0.25
"""Seconds between two looks whether something in memory has moved that the service has not been told of."""
_PREVIEW = ("JPEG", 90)
"""Format and quality: what has few pixels needs all of their colours, which JPEG keeps from 90 on; and noise, which the
first previews are full of, takes several times the bytes as PNG."""
_SMALL = 3 * 2**16
"""Bytes of pixels that are encoded sooner than they are handed to another thread."""


def _end_if_lost(fault: BaseException) -> None:
    """End this process if its device is of no use any more: the service starts another one."""
    if is_fatal(fault):
        log.critical("the device is lost (%s): this worker ends and is replaced", fault)
        os._exit(DEVICE_LOST)


def _about(request: GenerationRequest) -> dict[str, str]:
    """What lines of the log say of a request."""
    return {"request_id": request.request_id, "model": request.model.model_id}


def _at_once(call: Callable[..., Any], *arguments: Any, **named: Any) -> Future[Any]:
    """What ``Executor.submit`` does, here and now."""
    future: Future[Any] = Future()
    try:
        future.set_result(call(*arguments, **named))
    except Exception as fault:
        future.set_exception(fault)
    return future


@dataclass(eq=False)
class _Loading:
    """A model that is to be loaded, or is being so; ``gone`` is where an ``Unload`` that came meanwhile sent it."""

    message: Load
    gone: str = ""


class Worker:
    """Takes messages, runs the engine, has images encoded beside it.

    Args:
        link: where requests come from.
        engine: what runs them.
        slots: requests at once.
        init_ms: how long the start took; told once.
        elsewhere: whether somebody waits for another worker.
    """

    def __init__(
        self, link: Link, engine: Engine, slots: int, init_ms: int, elsewhere: Callable[[], bool] = lambda: False
    ) -> None:
        self._link = link
        self._engine = engine
        self._init_ms: int | None = init_ms
        self._pulse = Pulse(engine.executor, elsewhere)
        self._jobs = ThreadPoolExecutor(slots, thread_name_prefix="job")
        self._encoders = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="encode")
        self._loads = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._loading: list[_Loading] = []
        self._overtaking = threading.Lock()
        self._reporting = threading.Lock()
        self._reported = -1

    def tell_alive(self) -> None:
        """Give signs of life from now on, in a thread."""
        threading.Thread(target=self._tell_alive, name="alive", daemon=True).start()

    def serve(self) -> None:
        """Take messages until the process ends."""
        while True:
            message = self._link.inbox.get()
            if isinstance(message, Load):
                self._load(message)
            elif isinstance(message, Unload):
                self._unload(message)
            elif isinstance(message, Plan):
                self._encoders.submit(self._plan, message)
            elif isinstance(message, Stage):
                self._engine.want(message.models)
            elif isinstance(message, Generate):
                self._jobs.submit(self._run, message.request, message.events)
            else:
                self._engine.wake()

    def _tell_alive(self) -> None:
        told, released, before = 0.0, 0, 0
        counted: Counted | None = None
        while True:
            now = time.monotonic()
            if now - told >= _ALIVE:
                told, runs = now, self._engine.executor.runs
                self._link.send(Alive(self._pulse.stalled()))
                if (now_counted := Counted(self._engine.tally.counts(), self._engine.device.allocations())) != counted:
                    counted = now_counted
                    self._link.send(counted)
                if released != runs == before:  # nothing ran for a while, and something did before
                    release_host_memory()
                    released = runs
                before = runs
            if self._engine.cache.tiers.version != self._reported:
                self._report()
            time.sleep(_LOOK)

    def _report(self) -> None:
        """Say what is in memory."""
        cache = self._engine.cache
        with self._reporting:  # what is told last is what was so last
            self._reported = cache.tiers.version
            self._link.send(Loaded(cache.held(), cache.memory()))

    def _load(self, message: Load) -> None:
        loading = _Loading(message)
        with self._overtaking:
            self._loading.append(loading)
        self._loads.submit(self._finish, loading)

    def _unload(self, message: Unload) -> None:
        """Send a model away, and have nothing bring it back that was asked for before."""
        with self._overtaking:
            for loading in self._loading:
                if loading.message.model.key == message.key and loading.message.tier != message.to:
                    loading.gone = message.to
        self._engine.wake()
        self._engine.cache.unload(message.key, message.to)
        self._report()
        self._link.send(Answer(message.id))

    def _finish(self, loading: _Loading) -> None:
        message = loading.message
        answer = self._loaded(message, lambda: bool(loading.gone))
        with self._overtaking:
            self._loading.remove(loading)
        if loading.gone:  # also what was there before it heard of that
            self._engine.cache.unload(message.model.key, loading.gone)
            answer = Answer(message.id, "CANCELLED", f"{message.model.model_id} was unloaded while it was loaded.")
        self._report()
        if message.id:
            self._link.send(answer)

    def warm(self, message: Load) -> None:
        """Load a model before there are requests; a fault is logged, and told again to who asks for it."""
        self._loaded(message, lambda: False)
        self._report()

    def _loaded(self, message: Load, cancelled: Callable[[], bool]) -> Answer:
        answer = Answer(message.id)
        try:
            with self._pulse.working():
                self._engine.load(
                    message.model, message.tier, pin=message.pin, evict=message.evict, cancelled=cancelled
                )
        except Cancelled:
            pass  # whoever said so tells it
        except ApiError as error:
            _end_if_lost(error)
            log.log(logging.ERROR if message.evict else logging.INFO, "%s: %s", error.code, error.message)
            answer = Answer(message.id, error.code, error.message)
        except Exception as fault:
            _end_if_lost(fault)
            log.exception("%s cannot be loaded", message.model.model_id)
            what = f"{message.model.model_id} cannot be loaded ({type(fault).__name__}); the server's log says more."
            answer = Answer(message.id, "INTERNAL_ERROR", what)
        return answer

    def _plan(self, message: Plan) -> None:
        try:
            answer = Answer(message.id, plan=self._engine.plan(message.request))
        except ApiError as error:
            answer = Answer(message.id, error.code, error.message, field=error.field)
        except Exception as fault:
            log.exception("%s cannot be planned for", message.request.model.model_id)
            answer = Answer(message.id, "INTERNAL_ERROR", f"{type(fault).__name__}; the server's log says more.")
        self._link.send(answer)

    def _run(self, request: GenerationRequest, events: bool) -> None:
        with self._pulse.working():
            self._generate(request, events)

    def _generate(self, request: GenerationRequest, events: bool) -> None:
        link, job = self._link, request.id
        due = link.due(job)

        def tell(event: OnTheWay) -> None:
            if events:
                link.send(event)

        def show(step: int, total: int, pictures: np.ndarray) -> None:
            # in the job's thread, though it waits for it: so a preview never comes after what comes after it
            link.send(Preview(job, step, total, [encode(picture, *_PREVIEW) for picture in pictures]))

        try:
            if link.is_cancelled(job):
                raise Cancelled
            generated = self._engine.generate(
                request,
                on_step=lambda step, total: tell(Progress(job, step, total)),
                on_phase=lambda kind, status: tell(Phase(job, kind, status)),
                cancelled=lambda: link.is_cancelled(job),
                on_preview=show if events else None,
                deadline=due.deadline,
                overdue=due.overdue,
            )
            if "loadModel" in generated.timings:
                self._report()
            self._hand_over(request, generated)
        except Cancelled:
            link.send(Failed(job, "CANCELLED", "The job was cancelled.", {}, ""))
        except ApiError as error:
            _end_if_lost(error)
            details = {"field": error.field, "requested": error.requested, "available": error.available}
            link.send(Failed(job, error.code, error.message, details, traceback.format_exc()))
        except Exception as fault:  # the worker lives on; the client learns that it is not to blame
            _end_if_lost(fault)
            log.exception("a job failed", extra=_about(request))
            message = f"The pipeline failed ({type(fault).__name__}); the server's log says more."
            link.send(Failed(job, "INTERNAL_ERROR", message, {}, traceback.format_exc()))
        finally:
            link.forget(job)

    def _hand_over(self, request: GenerationRequest, generated: Generated) -> None:
        """Give the images to the encoders, and say that the device is free for the next job."""
        began = time.perf_counter()
        init, self._init_ms = self._init_ms, None
        timings = ({} if init is None else {"init": init}) | generated.timings
        meta = {**request.meta, **generated.meta}
        usage = self._engine.device.mem_usage()
        count = len(generated.images)
        small = request.video is None and generated.images[0].size * count <= _SMALL
        coder = functools.partial(encode_video, request.video.fps) if request.video else encode
        submit = _at_once if small else self._encoders.submit
        images = [
            submit(
                coder,
                image,
                request.image_format,
                request.image_quality,
                lossless=request.lossless,
                texts=texts(meta, index, count) if request.image_metadata else None,
            )
            for index, image in enumerate(generated.images)
        ]
        if submit is not _at_once:
            self._link.send(Computed(request.id))

        def finish() -> None:
            try:
                encoded = [image.result() for image in images]  # submitted earlier, so never behind this
                timings["encode"] = round((time.perf_counter() - began) * 1000)
                result = GenerationResult(encoded, meta, timings, usage, generated.nsfw, generated.extras)
                self._link.send(Done(request.id, result))
            except Exception:
                log.exception("an image could not be encoded", extra=_about(request))
                message = "The image could not be encoded; the server's log says more."
                self._link.send(Failed(request.id, "INTERNAL_ERROR", message, {}, traceback.format_exc()))

        submit(finish)
