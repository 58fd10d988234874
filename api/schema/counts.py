"""What a worker counts: numbers that only grow while it lives, and how those of several are added up."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the buckets for how long a call, a step or the loading of a model takes."""
JOBS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)
"""The same for how many jobs share a call."""
SHORTAGES = ("smaller_batch", "halves", "evict", "alone", "lower_placement", "reload")
"""What is done about a lack of the device's memory."""
COMPILED = ("made", "loaded", "failed", "missed", "graph")
"""Code of blocks that was compiled, loaded, could not be; jobs that met a call without; CUDA graphs recorded."""
SOURCES = ("disk", "host")
"""Where a model comes from that is brought onto the device."""


class Spread(msgspec.Struct):
    """A histogram.

    Attributes:
        counts: how many there are in each bucket, not added up; the last one is for what is above all bounds.
        sum: of all values.
    """

    counts: list[int]
    sum: float = 0.0

    @classmethod
    def over(cls, bounds: tuple[float, ...]) -> Spread:
        """An empty one."""
        return cls([0] * (len(bounds) + 1))

    def add(self, bounds: tuple[float, ...], value: float) -> None:
        """Count a value; ``bounds`` are those that it was made with."""
        self.counts[bisect_left(bounds, value)] += 1
        self.sum += value


class Calls(msgspec.Struct):
    """Calls of one method of one class of modules; merged ones are one.

    Attributes:
        seconds: that the device was at each, over ``SECONDS``.
        jobs: that shared each, over ``JOBS``.
        rows: of all their batches.
    """

    seconds: Spread
    jobs: Spread
    rows: int = 0


class Counts(msgspec.Struct):
    """What a worker has counted since it started.

    Attributes:
        calls: by class and method, such as ``UNet2DConditionModel.forward``.
        steps: seconds between two denoising steps of a job, by its pipeline's class.
        loads: seconds until a model was on the device, by where it came from (``SOURCES``).
        moved_bytes: by way: ``read`` from the disk, ``share`` where another worker had read it, ``copy`` to the device.
        moved_seconds: that this took.
        evictions: parts of models that left a tier, by tier.
        switches: requests that waited until a model was brought onto the device.
        shortages: of the device's memory, by what was done about it (``SHORTAGES``).
        compiled: what came of compiling (``COMPILED``).
    """

    calls: dict[str, Calls] = {}
    steps: dict[str, Spread] = {}
    loads: dict[str, Spread] = {}
    moved_bytes: dict[str, int] = {}
    moved_seconds: dict[str, float] = {}
    evictions: dict[str, int] = {}
    switches: int = 0
    shortages: dict[str, int] = {}
    compiled: dict[str, int] = {}


class DeviceMemory(msgspec.Struct):
    """Bytes of a device's memory that a worker's process has, as torch's allocator counts them.

    Attributes:
        allocated: in tensors.
        reserved: held by the allocator.
        peak: most that were ever allocated.
    """

    allocated: int
    reserved: int
    peak: int


def plus(one: T, other: T) -> T:
    """The sum of two counts, field by field and key by key; neither is changed."""
    return _plus(one, other)


def _plus(one: Any, other: Any) -> Any:
    if isinstance(one, dict):
        return one | {key: _plus(one[key], value) if key in one else value for key, value in other.items()}
    if isinstance(one, list):
        return [_plus(left, right) for left, right in zip(one, other, strict=True)]
    if isinstance(one, msgspec.Struct):
        return type(one)(*(_plus(getattr(one, name), getattr(other, name)) for name in one.__struct_fields__))
    return one + other
