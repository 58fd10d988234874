"""What loading a model spends its time on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

_FADES = 0.8
"""Weight of what was measured before, with each that is measured anew."""


@dataclass
class Spent:
    """Seconds that loading took, by what they were spent on.

    Attributes:
        read: files to host memory.
        build: configurations, headers, modules, tokenizers, the pipeline.
        copy: host memory to the device.
    """

    read: float = 0.0
    build: float = 0.0
    copy: float = 0.0


class Spans:
    """From when to when something was done, by what: from the first time it began to the last time it ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: dict[str, tuple[float, float]] = {}

    def note(self, on: str, began: float) -> None:
        """What began then (``time.perf_counter``) is over."""
        now = time.perf_counter()
        with self._lock:
            first, last = self._spans.get(on, (began, now))
            self._spans[on] = min(first, began), max(last, now)

    def all(self) -> dict[str, tuple[float, float]]:
        """Beginning and end, by what."""
        with self._lock:
            return dict(self._spans)


SPANS = Spans()
"""Of all loading in this process."""


class Rate:
    """How many bytes a second go one way, by the last ones that went."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = self._seconds = 0.0

    def note(self, size: int, seconds: float) -> None:
        """So many bytes took so long."""
        with self._lock:
            self._bytes = _FADES * self._bytes + size
            self._seconds = _FADES * self._seconds + seconds

    def seconds(self, size: int) -> float | None:
        """What so many bytes should take; None where none went yet."""
        with self._lock:
            if not size:
                return 0.0
            return size * self._seconds / self._bytes if self._bytes else None


_SPENT: ContextVar[Spent | None] = ContextVar("spent", default=None)


@contextlib.contextmanager
def measuring(spent: Spent) -> Iterator[Spent]:
    """Add up in ``spent`` what this thread's loading takes within the block."""
    token = _SPENT.set(spent)
    try:
        yield spent
    finally:
        _SPENT.reset(token)


@contextlib.contextmanager
def spending(on: str) -> Iterator[None]:
    """Count the time within the block as spent on ``read``, ``build`` or ``copy``, where somebody is measuring."""
    spent, began = _SPENT.get(), time.perf_counter()
    try:
        yield
    finally:
        if spent is not None:
            setattr(spent, on, getattr(spent, on) + time.perf_counter() - began)
        SPANS.note(on, began)
