"""Traces requests with OpenTelemetry: one tree of spans for each, made in this process.

Workers know nothing of it: the spans of what they do are made from when they tell of it. Nothing of OpenTelemetry is
imported unless OTEL_EXPORTER_OTLP_ENDPOINT is set. Neither prompts nor addresses are attributes.

W3C Trace Context: https://www.w3.org/TR/trace-context/
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from api.errors import ApiError
from api.schema.generation import GenerationRequest, GenerationResult
from api.schema.messages import OnTheWay, Phase
from api.schema.transfers import Transfer

log = logging.getLogger("api.service")

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_NAME = "diffusers-api"
_FLUSH = 3.0
"""Seconds that the last spans get at the end."""
_REMEMBERED = 10_000
"""Jobs whose spans are known, for what comes later."""
_NAMES = {"loadModel": "load", "inference": "inference", "upscale": "upscale"}
_CURRENT: ContextVar[Any] = ContextVar("span", default=None)
"""The span that the next ones belong to."""

Attributes = Mapping[str, Any]
OnEvent = Callable[[OnTheWay], None]
OnTransfer = Callable[[Transfer], None]


def open_tracing(environ: Mapping[str, str] = os.environ) -> Tracing | None:
    """Tracing as OpenTelemetry's own variables set it up; None where they name no collector.

    Args:
        environ: where the variables are; the SDK reads the process's own.
    """
    if not any(environ.get(name) for name in _ENDPOINTS) or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning(
            "an OTLP endpoint is set, but OpenTelemetry is not installed: requests are not traced. "
            "pip install 'diffusers-api[otel]'"
        )
        return None
    named = "OTEL_SERVICE_NAME" in environ or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if named else {"service.name": _NAME})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    log.info("requests are traced")
    return Tracing(provider)


class Tracing:
    """Makes spans. On the event loop only; exporting them is another thread's.

    Args:
        provider: a ``TracerProvider`` of OpenTelemetry's SDK.
    """

    def __init__(self, provider: Any) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._provider = provider
        self._tracer = provider.get_tracer(_NAME)
        self._wire = TraceContextTextMapPropagator()
        self._accepted: dict[str, tuple[Any, int]] = {}
        """Of jobs for later: the span of the request that brought each, and when."""
        self._jobs: dict[str, Any] = {}
        """Spans of jobs for later that had their turn."""
        self._known: dict[str, Any] = {}
        """Spans that webhooks of a job belong to."""

    async def close(self) -> None:
        """Send what there is, for as long as that may take."""
        flush = threading.Thread(target=self._provider.force_flush, name="traces", daemon=True)
        flush.start()
        await asyncio.to_thread(flush.join, _FLUSH)

    # --- spans ---

    def begin(self, name: str, about: Attributes, parent: Any = None, start: int | None = None) -> Any:
        """A span that has begun.

        Args:
            name: of it.
            about: its attributes; those that are None are left out.
            parent: the span that it belongs to; None: the current one.
            start: Unix time, nanoseconds; None: now.
        """
        parent = parent if parent is not None else _CURRENT.get()
        context = self._trace.set_span_in_context(parent) if parent is not None else None
        return self._begin(name, context, start, self._trace.SpanKind.INTERNAL, about)

    def _begin(self, name: str, context: Any, start: int | None, kind: Any, about: Attributes) -> Any:
        known = {key: value for key, value in about.items() if value is not None}
        return self._tracer.start_span(name, context=context, kind=kind, start_time=start, attributes=known)

    def fail(self, span: Any, code: str) -> None:
        """A span ends with an error."""
        span.set_attribute("error.type", code)
        span.set_status(self._trace.StatusCode.ERROR)

    @contextlib.contextmanager
    def current(self, span: Any) -> Iterator[Any]:
        """Spans that begin within the block belong to this one, which ends with it."""
        token = _CURRENT.set(span)
        try:
            yield span
        except ApiError as error:
            self.fail(span, error.code)
            raise
        except BaseException as fault:
            self.fail(span, type(fault).__name__)
            raise
        finally:
            _CURRENT.reset(token)
            span.end()

    def span(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """A span that belongs to the current one, and is itself the current one within the block."""
        return self.current(self.begin(name, {}))

    # --- requests ---

    def request(self, method: str, headers: Any) -> contextlib.AbstractContextManager[Any]:
        """A request is answered within the block; where its headers have a ``traceparent``, that goes on."""
        from opentelemetry.context import Context

        context = self._wire.extract(headers, context=Context())
        kind, attributes = self._trace.SpanKind.SERVER, {"http.request.method": method}
        return self.current(self._begin(method, context, None, kind, attributes))

    def answered(self, span: Any, method: str, route: str | None, status: int, **known: str) -> None:
        """What is known of a request at its end.

        Args:
            span: of the request.
            method: of HTTP.
            route: the pattern of its route; None: there is none.
            status: of HTTP.
            known: more attributes: ``id``, ``owner``, ``error``; those that are empty are left out.
        """
        if route:
            span.update_name(f"{method} {route}")
            span.set_attribute("http.route", route)
        span.set_attribute("http.response.status_code", status)
        for name, value in known.items():
            if value:
                span.set_attribute(f"diffusers.{name}", value)
        if status >= 500:
            self.fail(span, str(status))

    @contextlib.contextmanager
    def admission(self, on_event: OnTransfer | None) -> Iterator[OnTransfer]:
        """See ``Watch.admission``."""
        with self.span("admission") as span:
            phases: dict[tuple[str, str], Any] = {}

            def told(event: Transfer) -> None:
                which = event.model_id, event.kind
                if which not in phases:
                    phases[which] = self.begin(event.kind, {"diffusers.model": _public(event.model_id)}, span)
                if event.status == "done":
                    phases[which].set_attribute("diffusers.bytes", event.done)
                    phases[which].end()
                if on_event is not None:
                    on_event(event)

            try:
                yield told
            finally:
                for phase in phases.values():
                    if phase.is_recording():
                        phase.end()

    def job(self, request: GenerationRequest) -> JobTrace:
        """The spans of a request that stands in line from now on."""
        parent = _CURRENT.get()
        own = self.begin("job", {"diffusers.job": request.id}) if parent is None else None
        self._remember(request.id, parent or own)
        return JobTrace(self, request, parent or own, own)

    # --- jobs for later ---

    def accepted(self, job_id: str) -> None:
        """A job was taken in by the current request."""
        self._accepted[job_id] = _CURRENT.get(), time.time_ns()
        _shorten(self._accepted)

    def turn(self, job_id: str) -> None:
        """It is a job's turn; what begins in this task from now on belongs to it."""
        if job_id not in self._jobs:
            self._jobs[job_id] = self._begun(job_id)
            _shorten(self._jobs)
        _CURRENT.set(self._jobs[job_id])

    def later_over(self, job_id: str, outcome: GenerationResult | ApiError) -> None:
        """A job is over, perhaps before it was its turn."""
        span = self._jobs.pop(job_id, None) or self._begun(job_id)
        if isinstance(outcome, ApiError):
            self.fail(span, outcome.code)
        span.end()

    def _begun(self, job_id: str) -> Any:
        """The span of a job since it was accepted; of one of an earlier process, a tree of its own."""
        parent, since = self._accepted.pop(job_id, (None, None))
        context = self._trace.set_span_in_context(parent) if parent is not None else None
        kind, attributes = self._trace.SpanKind.CONSUMER, {"diffusers.job": job_id}
        span = self._begin("job", context, since, kind, attributes)
        self._remember(job_id, span)
        if since is not None:
            self.begin("queue", {"diffusers.queue": "store"}, span, since).end()
        return span

    def hooked(self, name: str) -> None:
        """See ``Watch.hooked``."""
        self._remember(name, _CURRENT.get())

    def webhook(self, name: str, seconds: float, arrived: bool, attempt: int) -> None:
        """See ``Watch.webhook``."""
        start = time.time_ns() - round(seconds * 1e9)
        span = self.begin(
            "webhook", {"diffusers.job": name, "diffusers.attempt": attempt}, self._known.get(name), start
        )
        if not arrived:
            self.fail(span, "UNDELIVERED")
        span.end()

    def _remember(self, job_id: str, span: Any) -> None:
        if span is not None:
            self._known[job_id] = span
            _shorten(self._known)


class JobTrace:
    """The spans of a job's phases: ``queue``, ``load``, ``inference``, ``encode``.

    Args:
        tracing: makes them.
        request: what is asked for.
        parent: the span that they belong to.
        own: that one, where it ends with the job.
    """

    def __init__(self, tracing: Tracing, request: GenerationRequest, parent: Any, own: Any = None) -> None:
        self._own = own
        self._tracing = tracing
        self._parent = parent
        self._request = request
        self._spans: dict[str, Any] = {"queue": self._begin("queue", {"diffusers.queue": "worker"})}

    def reading(self, on_event: OnEvent | None) -> OnEvent:
        """What is to be told of the job's events; passes them on."""

        def told(event: OnTheWay) -> None:
            if isinstance(event, Phase):
                self._phase(event)
            if on_event is not None:
                on_event(event)

        return told

    def started(self) -> None:
        """A worker has it; one whose worker died is started again."""
        for span in self._spans.values():
            span.end()
        self._spans.clear()

    def end(self, outcome: GenerationResult | ApiError | None) -> None:
        """It is over."""
        for span in self._spans.values():
            if isinstance(outcome, ApiError):
                self._tracing.fail(span, outcome.code)
            span.end()
        self._spans.clear()
        if self._own is not None:
            self._own.end()

    def _phase(self, event: Phase) -> None:
        name = _NAMES[event.kind]
        if event.status == "start":
            self._spans[name] = self._begin(name, _about(self._request))
        elif span := self._spans.pop(name, None):
            span.end()
            if name == "inference":
                self._spans["encode"] = self._begin("encode", {"diffusers.format": self._request.image_format})

    def _begin(self, name: str, about: Attributes) -> Any:
        return self._tracing.begin(name, about, self._parent)


def _about(request: GenerationRequest) -> dict[str, Any]:
    inputs = request.inputs
    known = {
        "model": _public(request.model.model_id),
        "pipeline": request.pipeline,
        "scheduler": request.scheduler,
        "images": request.images,
        **{name: inputs.get(name) for name in ("num_inference_steps", "width", "height")},
    }
    return {f"diffusers.{name}": value for name, value in known.items() if isinstance(value, str | int | float)}


def _public(model_id: str) -> str:
    """A model's name; of one that is named by its address, that it is."""
    return "(by its address)" if "://" in model_id else model_id


def _shorten(known: dict[str, Any]) -> None:
    if len(known) > _REMEMBERED:
        del known[next(iter(known))]
