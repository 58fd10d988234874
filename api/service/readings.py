"""Reads off what the metrics tell of workers, tiers, the queue and the volume, at the moment when somebody asks."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from resource import getpagesize
from typing import TYPE_CHECKING, Any

import msgspec
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from api.schema.counts import Spread
from api.service.families import COUNTED, FAMILIES, PREFIX
from api.service.jobs import JobState
from api.service.workers import Worker

if TYPE_CHECKING:
    from api.service.service import Service

_TYPES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
_OWNERS = 200
"""Keys that are told apart."""


class _Sheet:
    """Metrics that are being filled in."""

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {
            name: _TYPES[family.kind](PREFIX + name, family.meaning, labels=family.labels)
            for name, family in FAMILIES.items()
            if name not in COUNTED
        }

    def put(self, name: str, value: float | None, *labels: str) -> None:
        """A value of a counter or a gauge; None: it is not known."""
        if value is not None:
            self.metrics[name].add_metric(labels, value)

    def put_spread(self, name: str, spread: Spread, *labels: str) -> None:
        """A histogram."""
        bounds = [str(bound) for bound in FAMILIES[name].bounds] + ["+Inf"]
        sums = itertools.accumulate(spread.counts)
        self.metrics[name].add_metric(labels, list(zip(bounds, sums, strict=True)), spread.sum)


def readings(service: Service, volume_free: int | None, owner: str | None = None) -> Sequence[Metric]:
    """All of them, as they are now.

    Args:
        service: asked, on the event loop.
        volume_free: what the disk of the models has left; None: not known.
        owner: whose usage is told; None: everybody's.
    """
    sheet = _Sheet()
    _queue(sheet, service)
    if keeper := service.dispatcher.keeper:
        use = keeper.use()
        sheet.put("host_tier_bytes", use.held, "held")
        sheet.put("host_tier_bytes", use.kept, "kept")
        sheet.put("host_tier_limit_bytes", use.limit)
    for worker in service.dispatcher.workers:
        _worker(sheet, worker)
        _tiers(sheet, worker)
        _counted(sheet, worker)
    sheet.put("fetching", service.fetcher.fetching)
    sheet.put("volume_free_bytes", volume_free)
    _usage(sheet, service, owner)
    _webhooks(sheet, service)
    return list(sheet.metrics.values())


def _queue(sheet: _Sheet, service: Service) -> None:
    dispatcher = service.dispatcher
    jobs = dispatcher.states()
    jobs["later", JobState.IN_QUEUE.value] += service.later.waiting
    for kind, state in itertools.product(("connection", "later"), (JobState.IN_QUEUE, JobState.IN_PROGRESS)):
        sheet.put("jobs", jobs[kind, state.value], kind, state.value)
    sheet.put("queue_limit", service.settings.max_queue)
    sheet.put("ready", dispatcher.state in ("READY", "BUSY"))


def _worker(sheet: _Sheet, worker: Worker) -> None:
    device = worker.device
    sheet.put("worker_ready", worker.ready, device)
    sheet.put("worker_jobs", len(worker.running), device)
    sheet.put("worker_slots", worker.info.slots if worker.info else 0, device)
    sheet.put("worker_restarts", worker.restarts, device)
    sheet.put("worker_resident_bytes", _resident(worker.pid), device)
    memory = worker.allocated
    for state, size in msgspec.structs.asdict(memory).items() if memory else ():
        sheet.put("device_memory_bytes", size, device, state)


def _tiers(sheet: _Sheet, worker: Worker) -> None:
    device, tiers = worker.device, Counter(held.tier for held in worker.models.values())
    for tier in ("device", "host", "disk"):
        sheet.put("models", tiers[tier], device, tier)
    if memory := worker.memory:
        sheet.put("tier_bytes", memory.device, device, "device")
        sheet.put("tier_bytes", memory.host, device, "host")
        sheet.put("tier_limit_bytes", memory.device_limit, device, "device")
        sheet.put("tier_limit_bytes", memory.host_limit, device, "host")
        sheet.put("tier_peak_bytes", memory.device_peak, device)


def _counted(sheet: _Sheet, worker: Worker) -> None:
    device, counts = worker.device, worker.counts
    for kind, calls in counts.calls.items():
        sheet.put_spread("call_seconds", calls.seconds, device, kind)
        sheet.put_spread("batch_jobs", calls.jobs, device, kind)
        sheet.put("batch_rows", calls.rows, device, kind)
    for pipeline, steps in counts.steps.items():
        sheet.put_spread("step_seconds", steps, device, pipeline)
    for source, loads in counts.loads.items():
        sheet.put_spread("load_seconds", loads, device, source)
    sheet.put("switches", counts.switches, device)
    for name, found in (
        ("moved_bytes", counts.moved_bytes),
        ("moved_seconds", counts.moved_seconds),
        ("evictions", counts.evictions),
        ("out_of_memory", counts.shortages),
        ("compiled", counts.compiled),
    ):
        for label, value in found.items():
            sheet.put(name, value, device, label)


def _usage(sheet: _Sheet, service: Service, owner: str | None) -> None:
    found = [used for used in service.usage.snapshot() if owner in (None, used["owner"])]
    for used in found[:_OWNERS]:
        for name in ("requests", "images", "device_seconds", "load_seconds", "failures"):
            sheet.put(f"usage_{name}", used[name], used["owner"])


def _webhooks(sheet: _Sheet, service: Service) -> None:
    for state, count in service.webhooks.counts().items():
        sheet.put("webhooks", count, state)


def _resident(pid: int | None) -> int | None:
    """RSS of a process, bytes; proc(5)."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * getpagesize()
    except (OSError, IndexError):
        return None


def free_bytes(folder: Path) -> int | None:
    """What the disk of a folder has left, also of one that is not there yet; waits for the disk."""
    existing: Iterator[Path] = (place for place in (folder, *folder.parents) if place.exists())
    try:
        return shutil.disk_usage(next(existing)).free
    except (OSError, StopIteration):
        return None
