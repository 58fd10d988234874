"""Every metric there is: its name, type, labels and meaning. ``docs/metrics.md`` is checked against this.

The values of labels are bounded: classes, codes, patterns of routes, states, tiers, devices, names of keys. Nothing
that a client makes up is one.
"""

from __future__ import annotations

from typing import NamedTuple

from api.schema.counts import JOBS, SECONDS

PREFIX = "diffusers_api_"
WAITS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the buckets for how long requests and jobs take."""


class Family(NamedTuple):
    """A metric.

    Attributes:
        name: without ``PREFIX``, and without the ``_total`` of a counter.
        kind: ``counter``, ``gauge`` or ``histogram``.
        labels: their names.
        meaning: a sentence.
        bounds: of a histogram's buckets.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str
    bounds: tuple[float, ...] = ()

    @property
    def exposed(self) -> str:
        """Its name as it is read from ``/metrics``, but for the suffixes of a histogram."""
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"


def _counter(name: str, labels: tuple[str, ...], meaning: str) -> Family:
    return Family(name, "counter", labels, meaning)


def _gauge(name: str, labels: tuple[str, ...], meaning: str) -> Family:
    return Family(name, "gauge", labels, meaning)


def _histogram(name: str, labels: tuple[str, ...], meaning: str, bounds: tuple[float, ...] = WAITS) -> Family:
    return Family(name, "histogram", labels, meaning, bounds)


_ALL = (
    # requests
    _counter("http_requests", ("method", "route", "status"), "Answers, by the route's pattern; `other` is no route."),
    _histogram("http_request_seconds", ("method", "route"), "Until an answer begins; of a stream, its first line."),
    _counter("errors", ("code",), "Errors that clients were told: answers, ends of streams, jobs for later."),
    # jobs
    _gauge("jobs", ("kind", "state"), "Jobs that are not over: `connection` (somebody waits) or `later`."),
    _gauge("queue_limit", (), "`MAX_QUEUE`: how many may wait, both kinds together."),
    _counter("jobs_ended", ("kind", "state"), "Jobs that are over, by how they ended."),
    _histogram("queue_seconds", ("kind",), "From when a job was accepted until a worker began with it."),
    _histogram("job_seconds", ("kind",), "From when a job stood in line for a worker until it was over."),
    _histogram(
        "phase_seconds", ("phase",), "Of jobs that ended well: `loadModel`, `inference`, `upscale`, `encode`, `upload`."
    ),
    _counter("images", (), "Images that were made."),
    # steps and calls
    _histogram(
        "step_seconds",
        ("device", "pipeline"),
        "Between two denoising steps of a job, its wait for others included, by the pipeline's class.",
        SECONDS,
    ),
    _histogram(
        "call_seconds",
        ("device", "module"),
        "Device time of one call, by the module's class and method; calls that were merged are one.",
        SECONDS,
    ),
    _histogram("batch_jobs", ("device", "module"), "Jobs that shared a call: the batch size of the executor.", JOBS),
    _counter("batch_rows", ("device", "module"), "Rows of all calls' batches; with guidance an image has two."),
    # models in memory
    _gauge("models", ("device", "tier"), "Models, by the highest tier that has all of them: `device`, `host`, `disk`."),
    _gauge("tier_bytes", ("device", "tier"), "What models take; what they share is counted once."),
    _gauge("tier_limit_bytes", ("device", "tier"), "The budget: `VRAM_LIMIT`, `RAM_LIMIT`, or what was measured."),
    _gauge(
        "host_tier_bytes", ("state",), "With several workers, all together: `held` by one of them, or `kept` for later."
    ),
    _gauge("host_tier_limit_bytes", (), "What these may be: `RAM_LIMIT`, or what was measured."),
    _gauge("tier_peak_bytes", ("device",), "The most that models ever took on the device."),
    _counter("switches", ("device",), "Requests that waited until their model was brought onto the device."),
    _histogram(
        "load_seconds", ("device", "source"), "Bringing a model onto the device, from `disk` or `host`.", SECONDS
    ),
    _counter(
        "moved_bytes",
        ("device", "way"),
        "Weights that were moved: `read` from the disk, `share` by another worker, `copy` to the device.",
    ),
    _counter("moved_seconds", ("device", "way"), "What that took; with the bytes it gives the rate."),
    _counter("evictions", ("device", "tier"), "Parts of models (a UNet, a text encoder) that left a tier."),
    _counter("out_of_memory", ("device", "answer"), "Lacks of the device's memory, by what was done about it."),
    _counter("compiled", ("device", "outcome"), "Code of blocks: `made`, `loaded`, `failed`, `missed`; CUDA `graph`s."),
    _gauge("device_memory_bytes", ("device", "state"), "The allocator of a GPU: `allocated`, `reserved`, `peak`."),
    # workers
    _gauge("ready", (), "1 while a worker can run jobs."),
    _gauge("worker_ready", ("device",), "1 while this worker can run jobs."),
    _gauge("worker_jobs", ("device",), "Jobs that share the device now."),
    _gauge("worker_slots", ("device",), "`MAX_CONCURRENCY`: how many can."),
    _counter("worker_restarts", ("device",), "Times that the worker's process was started again."),
    _gauge("worker_resident_bytes", ("device",), "Memory of the worker's process (RSS)."),
    # models on the volume
    _gauge("fetching", (), "Models and adapters that are being fetched now."),
    _counter("fetches", ("outcome",), "Models and adapters that were fetched: `completed`, `failed`, `cancelled`."),
    _counter("fetched_bytes", ("phase",), "Bytes that went through `download`, `extract` and `convert`."),
    _histogram("fetch_seconds", ("phase",), "What these took, of those that came to their end."),
    _gauge("volume_free_bytes", (), "What the disk of `MODELS_DIR` has left."),
    # keys, webhooks
    _counter("usage_requests", ("owner",), "Requests of a key, by the key's name."),
    _counter("usage_images", ("owner",), "Images of a key."),
    _counter("usage_device_seconds", ("owner",), "Seconds that a key's jobs ran."),
    _counter("usage_load_seconds", ("owner",), "Seconds that they waited for their models."),
    _counter("usage_failures", ("owner",), "Requests of a key that failed."),
    _gauge("webhooks", ("state",), "Webhooks: `pending`, `failed` (given up), `delivered`."),
)
FAMILIES = {family.name: family for family in _ALL}
"""By name."""
COUNTED = frozenset(
    {
        "http_requests",
        "http_request_seconds",
        "errors",
        "jobs_ended",
        "queue_seconds",
        "job_seconds",
        "phase_seconds",
        "images",
        "fetches",
        "fetched_bytes",
        "fetch_seconds",
    }
)
"""Those that are counted where it happens; the rest is read off when somebody asks."""
