"""A job: one request's life, from the queue to a terminal state that never changes again."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from api.errors import ApiError
from api.schema.generation import GenerationRequest, GenerationResult, each_picture
from api.schema.messages import Generate, OnTheWay, frame
from api.service.destinations import Destination

if TYPE_CHECKING:
    from api.service.tracing import JobTrace


class JobState(StrEnum):
    """Where a job is in its life."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"


TERMINAL = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.TIMED_OUT})


def _frame(request: GenerationRequest, events: bool) -> bytes:
    """Encode now, while a fault still belongs to the one request that has it."""
    try:
        return frame(Generate(request, events))
    except (ValueError, TypeError, OverflowError, RecursionError) as fault:
        message = f"A value cannot be passed on: {fault}."
        raise ApiError("INVALID_INPUTS", message, field="modelInputs") from fault


def _asked(request: GenerationRequest) -> list[Any]:
    """What one generation is asked for."""
    pictures = {n: [p.sha256 for p in each_picture({n: found})] for n, found in request.pictures.items()}
    pipeline = request.pipeline, request.method, request.code, request.prompt_syntax
    scheduler = request.scheduler, request.scheduler_args
    adapters = request.loras, request.inversions, request.ip_adapters
    held = request.attention, request.offload, request.low_vram, request.step_cache, request.upscale, request.extra
    return [request.model.key, pipeline, scheduler, request.inputs, pictures, adapters, held, request.takes]


class Job:
    """One request on its way through the service.

    Args:
        request: what is to be done.
        on_event: called with what the worker reports on the way.
        timings: milliseconds by phase of what came before, to be told with the result.
        patience: seconds after which nobody waits for it any more.
        destinations: where its images go, if not into the answer.
        owner: name of the key that it came with.

    Attributes:
        framed: the message that gives it to a worker.
        alone: a worker died under it: it runs by itself from now on, so that a second death has one cause.
        lone_deaths: workers that died while it ran by itself.
        held: when it began to wait for a worker that has its model, though another one was free.
        begun: when a worker began with it for the first time.
        for_later: no client waits for it on a connection.
        trace: the spans of its phases, where requests are traced.
        name: its id in the log.

    Raises:
        ApiError: INVALID_INPUTS when an input cannot be handed to a worker.
    """

    def __init__(
        self,
        request: GenerationRequest,
        on_event: Callable[[OnTheWay], None] | None = None,
        timings: dict[str, int] | None = None,
        patience: float = math.inf,
        destinations: tuple[Destination, ...] = (),
        owner: str = "",
    ) -> None:
        self.request = request
        self.owner = owner
        self.destinations = destinations
        self._timings = timings or {}
        self.framed = _frame(request, events=on_event is not None)
        self.state = JobState.IN_QUEUE
        self.alone = False
        self.lone_deaths = 0
        self.held: float | None = None
        self.created = time.monotonic()
        self.deadline = self.created + patience
        self.started: float | None = None
        self.begun: float | None = None
        self.for_later = False
        self.trace: JobTrace | None = None
        self.name = request.id
        self._on_event = on_event
        self._outcome: asyncio.Future[GenerationResult] = asyncio.get_running_loop().create_future()

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @cached_property
    def fingerprint(self) -> str:
        """The same for two jobs that ask for the same."""
        parts = [_asked(stage) for stage in self.request.stages]
        return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()

    @property
    def about(self) -> dict[str, str]:
        """What lines of the log say of it."""
        request, owner = self.request, getattr(self, "owner", "")
        return {
            "request_id": request.request_id,
            "job_id": self.name,
            "model": request.model.model_id,
            "owner": owner,
        }

    @property
    def outcome(self) -> GenerationResult | ApiError | None:
        """What came of it; None until it is over."""
        if not self._outcome.done():
            return None
        fault = self._outcome.exception()
        return fault if isinstance(fault, ApiError) else self._outcome.result()

    @property
    def over(self) -> bool:
        """Whether the job is in a terminal state."""
        return self.state in TERMINAL

    def start(self) -> None:
        """A worker begins with it, for the first time or once more."""
        self.state = JobState.IN_PROGRESS
        self.started = time.monotonic()
        self.begun = self.begun or self.started
        if self.trace:
            self.trace.started()

    def requeue(self) -> None:
        """Its worker died: it waits again."""
        self.state = JobState.IN_QUEUE

    def report(self, event: OnTheWay) -> None:
        """Pass an event on, unless the job is over."""
        if not self.over and self._on_event:
            self._on_event(event)

    def complete(self, result: GenerationResult) -> None:
        """End well. Does nothing if the job is already over."""
        if not self.over:
            self.state = JobState.COMPLETED
            result.timings = {**self._timings, **result.timings}
            self._outcome.set_result(result)

    def fail(self, error: ApiError) -> None:
        """End with an error; its code decides the state. Does nothing if the job is already over."""
        if not self.over:
            special = {"CANCELLED": JobState.CANCELLED, "TIMED_OUT": JobState.TIMED_OUT}
            self.state = special.get(error.code, JobState.FAILED)
            self._outcome.set_exception(error)
            self._outcome.exception()  # a client that went away never asks

    async def result(self) -> GenerationResult:
        """Wait for the end.

        Raises:
            ApiError: the job failed, was cancelled or timed out.
        """
        return await asyncio.shield(self._outcome)
