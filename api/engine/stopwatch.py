"""How long the device is at each call: on a CPU a call's own time, on CUDA what the device says of it.

A CUDA call returns when it is queued, not when it is done. What is measured is the time between two events on the
stream (CUDA Runtime API, "Event Management"), and known only later.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

_AHEAD = 1
"""Calls that may be queued on the device behind the one that it is at: none, and it idles while the next is launched;
more, and a job that comes later waits for all of them."""

Note = Callable[[float], None]


class Stopwatch(Protocol):
    """Times the calls of one device, one after the other."""

    def time(self, call: Callable[[], Any], note: Note) -> Any:
        """Make a call; ``note`` is told the seconds that the device was at it, now or later, in the same thread.

        Raises:
            Exception: what the call raises; it is not noted then.
        """

    def catch_up(self) -> None:
        """Tell what has become known, and wait until no more calls are queued than may be."""

    @property
    def since(self) -> float | None:
        """When what the device is at began (``time.monotonic``); None while it is idle. In any thread."""


class CpuStopwatch:
    """A call is over when it returns."""

    def __init__(self) -> None:
        self.since: float | None = None

    def time(self, call: Callable[[], Any], note: Note) -> Any:
        """See ``Stopwatch``."""
        self.since = began = time.monotonic()
        try:
            result = call()
        finally:
            self.since = None
        note(time.monotonic() - began)
        return result

    def catch_up(self) -> None:
        """Nothing is ever behind."""


class CudaStopwatch:
    """A call is over when the device has reached its end.

    Args:
        device: e.g. ``cuda:0``.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._launching: float | None = None
        self._queued: deque[tuple[torch.cuda.Event, torch.cuda.Event, float, Note]] = deque()

    @property
    def since(self) -> float | None:
        """See ``Stopwatch``."""
        waiting = [launched for _, end, launched, _ in list(self._queued) if not end.query()]
        return waiting[0] if waiting else self._launching

    def time(self, call: Callable[[], Any], note: Note) -> Any:
        """See ``Stopwatch``."""
        launched = self._launching = time.monotonic()
        stream = torch.cuda.current_stream(self._device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        try:
            begin.record(stream)
            result = call()
            end.record(stream)
        finally:
            self._launching = None
        self._queued.append((begin, end, launched, note))
        return result

    def catch_up(self) -> None:
        """See ``Stopwatch``."""
        while self._queued and (len(self._queued) > _AHEAD or self._queued[0][1].query()):
            begin, end, _, note = self._queued.popleft()
            end.synchronize()
            note(begin.elapsed_time(end) / 1000)
