"""Who watches a service: what happens is told here, and here alone, for the metrics and for traces.

Everything is told from the event loop. Without metrics and traces, nothing is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from api.errors import ApiError
from api.schema.generation import GenerationRequest, GenerationResult
from api.schema.transfers import Transfer

if TYPE_CHECKING:
    from api.service.jobs import Job
    from api.service.metrics import Metrics
    from api.service.tracing import JobTrace, Tracing

_REMEMBERED = 10_000
"""Jobs for later whose time of acceptance is known; the store may hold more."""
_GIVEN_UP = ("CANCELLED", "NOT_READY")
_TURN: ContextVar[str] = ContextVar("turn", default="")
"""The job for later that the current task runs."""


class Watch:
    """Passes on what happens.

    Args:
        metrics: counts.
        tracing: makes spans of requests; None: they are not traced.
    """

    def __init__(self, metrics: Metrics | None = None, tracing: Tracing | None = None) -> None:
        self.metrics = metrics
        self.tracing = tracing
        self._accepted: dict[str, float] = {}

    async def close(self) -> None:
        """Nothing more happens."""
        if self.tracing:
            await self.tracing.close()

    # --- HTTP ---

    def answered(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """A request was answered; see ``Metrics.answered``."""
        if self.metrics:
            self.metrics.answered(method, route, status, seconds)

    def error(self, code: str) -> None:
        """A client was told of an error."""
        if self.metrics:
            self.metrics.error(code)

    # --- requests and their jobs ---

    @contextlib.contextmanager
    def admission(self, on_event: Callable[[Transfer], None] | None) -> Iterator[Callable[[Transfer], None] | None]:
        """A request is validated within the block, and its model fetched.

        Yields:
            What is to be told of transfers.
        """
        if self.tracing is None:
            yield on_event
            return
        with self.tracing.admission(on_event) as told:
            yield told

    def trace(self, request: GenerationRequest) -> JobTrace | None:
        """The spans of a request that stands in line for a worker from now on."""
        return self.tracing.job(request) if self.tracing else None

    def name_of(self, request: GenerationRequest) -> str:
        """What a job is called in the log: as clients know it where it is one for later."""
        return _TURN.get() or request.id

    @contextlib.contextmanager
    def upload(self) -> Iterator[None]:
        """Images are put elsewhere within the block."""
        began = time.perf_counter()
        with self.tracing.span("upload") if self.tracing else contextlib.nullcontext():
            yield
        if self.metrics:
            self.metrics.phase("upload", time.perf_counter() - began)

    def over(self, job: Job) -> None:
        """A job that stood in line for a worker is over."""
        if self.metrics:
            self.metrics.job_over(job, time.monotonic() - job.created)
        if job.trace:
            job.trace.end(job.outcome)

    # --- jobs for later ---

    def accepted(self, job_id: str) -> None:
        """A job for later was taken in, by the request that is being answered."""
        self._accepted[job_id] = time.monotonic()
        if len(self._accepted) > _REMEMBERED:
            del self._accepted[next(iter(self._accepted))]
        if self.tracing:
            self.tracing.accepted(job_id)

    def turn(self, job_id: str) -> None:
        """It is a job's turn, in the task that runs it. Since when a job of an earlier process waits is not known."""
        _TURN.set(job_id)
        since = self._accepted.pop(job_id, None)
        if self.metrics and since is not None:
            self.metrics.waited("later", time.monotonic() - since)
        if self.tracing:
            self.tracing.turn(job_id)

    def later_over(self, job_id: str, state: str, outcome: GenerationResult | ApiError) -> None:
        """A job for later is over."""
        self._accepted.pop(job_id, None)
        if self.metrics:
            self.metrics.ended("later", state)
            if isinstance(outcome, ApiError):
                self.metrics.error(outcome.code)
        if self.tracing:
            self.tracing.later_over(job_id, outcome)

    def hooked(self, name: str) -> None:
        """The request that is being answered will have webhooks, which are told by this name."""
        if self.tracing:
            self.tracing.hooked(name)

    def webhook(self, name: str, seconds: float, *, arrived: bool, attempt: int = 1) -> None:
        """A webhook was sent once.

        Args:
            name: the job's id, or what ``hooked`` was told.
            seconds: that it took until now.
            arrived: else it is tried again, or given up.
            attempt: 1 for the first one.
        """
        if self.tracing:
            self.tracing.webhook(name, seconds, arrived, attempt)

    # --- fetching ---

    def fetching(self, readers: list[Callable[[Transfer], None]], outcome: asyncio.Future[Any]) -> None:
        """A model is being fetched.

        Args:
            readers: of its events.
            outcome: what comes of it.
        """
        if self.metrics:
            metrics = self.metrics
            readers.append(_Moved(metrics))
            outcome.add_done_callback(lambda done: metrics.fetched(_how(done)))


class _Moved:
    """Reads the events of one fetch, and counts what came between them."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._phases: dict[str, tuple[float, int]] = {}
        """When each phase began, and the bytes that it had when it was last told of."""

    def __call__(self, event: Transfer) -> None:
        """As a reader of a fetch."""
        now = time.monotonic()
        began, before = self._phases.get(event.kind, (now, event.done))  # what an earlier attempt left did not come now
        self._phases[event.kind] = began, event.done
        self._metrics.moved(event, event.done - before, now - began if event.status == "done" else None)


def _how(done: asyncio.Future[Any]) -> str:
    if done.cancelled():
        return "cancelled"
    fault = done.exception()
    if isinstance(fault, ApiError) and fault.code in _GIVEN_UP:
        return "cancelled"
    return "failed" if fault else "completed"
