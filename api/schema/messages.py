"""The process boundary between service and worker: every message, and how it is framed.

A frame is a 4-byte big-endian length and a MessagePack body.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from api.schema.counts import Counts, DeviceMemory
from api.schema.generation import GenerationRequest, GenerationResult, ModelRef

HEADER = struct.Struct(">I")
DEVICE_LOST = 70
"""Exit status of a worker whose device can be used no more; ``EX_SOFTWARE`` of sysexits.h."""


class Load(msgspec.Struct, tag=True):
    """Bring a model into memory ahead of any request.

    Attributes:
        id: to be answered with ``Answer``; empty: nobody waits for that.
        tier: ``device`` or ``host``.
        pin: it is not evicted from there.
        evict: others may be evicted for it.
    """

    model: ModelRef
    id: str = ""
    tier: str = "device"
    pin: bool = False
    evict: bool = True


class Unload(msgspec.Struct, tag=True):
    """Have a model leave the device once its jobs are done, and with ``to`` = ``disk`` memory altogether."""

    key: str
    id: str
    to: str = "disk"


class Stage(msgspec.Struct, tag=True):
    """The models of the jobs that wait, the next one first: to be in the host's memory, as far as there is room."""

    models: list[ModelRef]


class Plan(msgspec.Struct, tag=True):
    """Say what running a request would take, without running it; its pictures have sizes, but no pixels."""

    request: GenerationRequest
    id: str


class Due(msgspec.Struct, tag=True):
    """How long a request, which follows, may wait for a model. ``time.monotonic``, which is one for all processes.

    Attributes:
        overdue: until when others may go before it.
        deadline: when its result is of no use any more.
    """

    id: str
    overdue: float
    deadline: float


class Generate(msgspec.Struct, tag=True):
    """Run one request; with ``events`` its phases and steps are told."""

    request: GenerationRequest
    events: bool


class Cancel(msgspec.Struct, tag=True):
    """Stop a running request at its next step."""

    id: str


class Ready(msgspec.Struct, tag=True):
    """The worker has imported everything and can take requests, ``slots`` of them at once.

    Attributes:
        ready_ms: from its first line until its warm models were in memory.
        torch_ms: the part of it until torch was imported.
        phases: beginning and end of what it did meanwhile, by name: ``time.perf_counter``, one clock for all processes.
    """

    device: str
    device_name: str
    versions: dict[str, str]
    ready_ms: int
    torch_ms: int
    slots: int
    phases: dict[str, tuple[float, float]] = {}


class Held(msgspec.Struct):
    """A model of which something is in a worker's memory.

    Attributes:
        ref: which model.
        tier: ``device``, ``host`` or ``disk``: the highest one that has all of it.
        device: bytes of its parts on the device; those that it shares are counted for each model.
        host: the same in the host's memory.
        leases: jobs that hold it.
        pin: the tier that it is pinned to, or nothing.
        used: when it was last used, Unix time.
    """

    ref: ModelRef
    tier: str
    device: int
    host: int
    leases: int
    pin: str
    used: float


class Memory(msgspec.Struct):
    """Bytes that models take in a worker's tiers, what is shared counted once, and what they may take."""

    device: int
    device_limit: int
    device_peak: int
    host: int
    host_limit: int


class Loaded(msgspec.Struct, tag=True):
    """The models that are in the worker's memory now, by key, least recently used first."""

    models: dict[str, Held]
    memory: Memory


class Planned(msgspec.Struct):
    """What running a request would take.

    Attributes:
        fits: None: not known before one like it has run.
        why: it does not.
        placement: that it would begin with; None: not known before its model has been in memory.
        tier: where its model is: ``device``, ``host`` or ``disk``.
        model: bytes of its weights.
        read: of them, to be read from the disk.
        copy: of them, to be brought onto the device.
        read_seconds: that reading takes, by what others took; None: none was read yet.
        copy_seconds: the same of the copying.
    """

    fits: bool | None
    why: str
    placement: str | None
    tier: str
    model: int
    read: int
    copy: int
    read_seconds: float | None
    copy_seconds: float | None


class Answer(msgspec.Struct, tag=True):
    """``Load``, ``Unload`` or ``Plan`` is done. ``code`` and ``message`` are empty if it went well.

    Attributes:
        field: of a plan: which part of the request is to blame.
    """

    id: str
    code: str = ""
    message: str = ""
    plan: Planned | None = None
    field: str | None = None


class Alive(msgspec.Struct, tag=True):
    """The worker still answers.

    Attributes:
        stalled: seconds since what should move has moved: the call that the device makes now began, a job that is
            between two calls made its last, or anything happened at all; 0 when there is nothing to do.
    """

    stalled: float


class Counted(msgspec.Struct, tag=True):
    """What the worker has counted since it started, and what its process has of the device's memory (None: a CPU)."""

    counts: Counts
    memory: DeviceMemory | None = None


class Phase(msgspec.Struct, tag=True):
    """A part of a request began or ended.

    Attributes:
        kind: ``loadModel``, ``inference`` or ``upscale``.
        status: ``start`` or ``done``.
    """

    id: str
    kind: str
    status: str


class Progress(msgspec.Struct, tag=True):
    """One denoising step of a request is done; ``step`` counts from 1."""

    id: str
    step: int
    total: int


class Preview(msgspec.Struct, tag=True):
    """What a request's images look like after ``step``, which was told before.

    Attributes:
        images: one for each image of the request, in their order: JPEG, as many pixels as there are latents.
    """

    id: str
    step: int
    total: int
    images: list[bytes]


class Computed(msgspec.Struct, tag=True):
    """The device is done with a request; its images are being encoded, the next one may come."""

    id: str


class Done(msgspec.Struct, tag=True):
    """A request is finished."""

    id: str
    result: GenerationResult


class Failed(msgspec.Struct, tag=True):
    """A request could not be done. ``error`` is what ``ApiError`` takes."""

    id: str
    code: str
    message: str
    error: dict[str, Any]
    stack: str


ToWorker = Load | Unload | Stage | Plan | Due | Generate | Cancel
OnTheWay = Phase | Progress | Preview
AboutJob = OnTheWay | Computed | Done | Failed
FromWorker = Ready | Loaded | Answer | Alive | Counted | AboutJob

_encoder = msgspec.msgpack.Encoder()
_to_worker = msgspec.msgpack.Decoder(ToWorker)
_from_worker = msgspec.msgpack.Decoder(FromWorker)


def frame(message: ToWorker | FromWorker) -> bytes:
    """A message as it goes over the wire."""
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body


def parse_to_worker(body: bytes) -> ToWorker:
    """The message in a frame's body, on the worker's side."""
    return _to_worker.decode(body)


def parse_from_worker(body: bytes) -> FromWorker:
    """The message in a frame's body, on the service's side."""
    return _from_worker.decode(body)
