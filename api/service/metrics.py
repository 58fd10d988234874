"""Everything that ``GET /metrics`` tells: what is counted here, and what is read off when somebody asks.

``prometheus_client`` writes the formats and holds the counters of this process. Workers count for themselves
(``schema/counts``), and say so every two seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from api.errors import CODES
from api.schema.generation import GenerationResult
from api.schema.transfers import Transfer
from api.service.families import COUNTED, FAMILIES, PREFIX
from api.service.jobs import TERMINAL, Job
from api.service.readings import free_bytes, readings

if TYPE_CHECKING:
    from api.service.service import Service

KINDS = ("connection", "later")
PHASES = ("loadModel", "inference", "upscale", "encode", "upload")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER = "other"
_PATIENCE = 1.0
"""Seconds that a disk gets to say what it has left."""

disable_created_metrics()  # series beside every counter that nobody reads


class Metrics:
    """Counts what happens in this process, and writes everything out.

    Args:
        service: asked for what can be read off.
    """

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for name in sorted(COUNTED):
            family = FAMILIES[name]
            about = PREFIX + name, family.meaning, family.labels
            if family.kind == "counter":
                self._counters[name] = Counter(*about, registry=self._registry)
            else:
                self._histograms[name] = Histogram(*about, registry=self._registry, buckets=family.bounds)
        for kind in KINDS:  # a rate needs what was there before the first one
            for state in TERMINAL:
                self._counters["jobs_ended"].labels(kind, state.value)
        for outcome in ("completed", "failed", "cancelled"):
            self._counters["fetches"].labels(outcome)
        self._service = service
        self._asking: asyncio.Task[int | None] | None = None
        self._owner: str | None = None
        self.volume_free: int | None = None
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    async def look(self) -> None:
        """Ask the disk of the models, which may lie on a network, what it has left; not for long."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(asyncio.to_thread(free_bytes, self._service.settings.models_dir))
        with contextlib.suppress(TimeoutError):
            self.volume_free = await asyncio.wait_for(asyncio.shield(self._asking), _PATIENCE)

    def describe(self) -> list[Metric]:
        """As ``prometheus_client`` wants it: to register what is read off is not to read it off."""
        return []

    def collect(self) -> Iterator[Metric]:
        """What is read off, as ``prometheus_client`` asks for it."""
        return iter(readings(self._service, self.volume_free, self._owner))

    def exposition(self, accept: str, owner: str | None = None) -> tuple[bytes, str]:
        """All of it, and its media type.

        Args:
            accept: what the client takes: OpenMetrics where it says so, else Prometheus' text format.
            owner: whose usage is told; None: everybody's.
        """
        encode, content_type = choose_encoder(accept)
        self._owner = owner  # for ``collect``, which the encoder has called before this returns
        return encode(self._registry), content_type

    def answered(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """A request was answered.

        Args:
            route: the pattern of its route; None: there is none.
        """
        method = method if method in _METHODS else OTHER
        self._counters["http_requests"].labels(method, route or OTHER, str(status)).inc()
        self._histograms["http_request_seconds"].labels(method, route or OTHER).observe(seconds)

    def error(self, code: str) -> None:
        """A client was told of an error."""
        self._counters["errors"].labels(code if code in CODES else OTHER).inc()

    def job_over(self, job: Job, seconds: float) -> None:
        """A job that stood in line for a worker is over, so many seconds after it came."""
        kind = KINDS[job.for_later]
        if not job.for_later:
            self.ended("connection", job.state.value)
            if job.begun is not None:
                self.waited("connection", job.begun - job.created)
        self._histograms["job_seconds"].labels(kind).observe(seconds)
        if isinstance(outcome := job.outcome, GenerationResult):
            self._counters["images"].inc(len(outcome.images))
            for phase in PHASES:
                if phase in outcome.timings:
                    self.phase(phase, outcome.timings[phase] / 1000)

    def ended(self, kind: str, state: str) -> None:
        """A job is over."""
        self._counters["jobs_ended"].labels(kind, state).inc()

    def waited(self, kind: str, seconds: float) -> None:
        """A job has waited for its turn."""
        self._histograms["queue_seconds"].labels(kind).observe(seconds)

    def phase(self, phase: str, seconds: float) -> None:
        """A part of a job took so long."""
        self._histograms["phase_seconds"].labels(phase).observe(seconds)

    def fetched(self, outcome: str) -> None:
        """A model was fetched, or was not: ``completed``, ``failed``, ``cancelled``."""
        self._counters["fetches"].labels(outcome).inc()

    def moved(self, event: Transfer, size: int, seconds: float | None) -> None:
        """Bytes of a model came.

        Args:
            event: that told of it.
            size: bytes since the event before it.
            seconds: since the phase began, where this is its end.
        """
        self._counters["fetched_bytes"].labels(event.kind).inc(max(0, size))
        if seconds is not None:
            self._histograms["fetch_seconds"].labels(event.kind).observe(seconds)
