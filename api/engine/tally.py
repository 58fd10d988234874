"""Counts what an engine does, for whoever watches it.

Every count is a few additions under a lock that nobody holds for longer: well under two microseconds for a call of a
module, which takes a thousand times that.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from api.schema.counts import JOBS, SECONDS, Calls, Counts, Spread

T = TypeVar("T")

_KINDS = 48
"""How many classes are told apart; names of pipelines and modules may come from code that a request names."""
OTHER = "other"


class Tally:
    """The counts of one engine. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counts()

    def call(self, kind: str, jobs: int, rows: int, seconds: float) -> None:
        """A call of a module was made.

        Args:
            kind: its class and method.
            jobs: that shared it.
            rows: of its batch.
            seconds: that the device was at it.
        """
        with self._lock:
            calls = _of(self._counts.calls, kind, _no_calls)
            calls.seconds.add(SECONDS, seconds)
            calls.jobs.add(JOBS, jobs)
            calls.rows += rows

    def steps(self, pipeline: str) -> Callable[[], None]:
        """To be called after every step of one job; what is before the first has the prompt's encoding in it."""
        last: float | None = None

        def stepped() -> None:
            nonlocal last
            before, last = last, time.perf_counter()
            if before is not None:
                with self._lock:
                    _of(self._counts.steps, pipeline, _no_seconds).add(SECONDS, last - before)

        return stepped

    def load(self, source: str, seconds: float) -> None:
        """A model was brought onto the device."""
        with self._lock:
            _of(self._counts.loads, source, _no_seconds).add(SECONDS, seconds)

    def moved(self, way: str, size: int, seconds: float) -> None:
        """Weights were moved.

        Args:
            way: ``read``, ``share`` or ``copy``.
            size: bytes.
            seconds: that it took.
        """
        with self._lock:
            counts = self._counts
            counts.moved_bytes[way] = counts.moved_bytes.get(way, 0) + size
            counts.moved_seconds[way] = counts.moved_seconds.get(way, 0.0) + seconds

    def evicted(self, tier: str, parts: int) -> None:
        """So many parts of models have left a tier."""
        if parts:
            with self._lock:
                self._counts.evictions[tier] = self._counts.evictions.get(tier, 0) + parts

    def switch(self) -> None:
        """A request waits for a model to be brought onto the device."""
        with self._lock:
            self._counts.switches += 1

    def shortage(self, answer: str) -> None:
        """Memory did not suffice; ``answer`` is one of ``SHORTAGES``."""
        with self._lock:
            self._counts.shortages[answer] = self._counts.shortages.get(answer, 0) + 1

    def compiled(self, outcome: str) -> None:
        """Something came of compiling; ``outcome`` is one of ``COMPILED``."""
        with self._lock:
            self._counts.compiled[outcome] = self._counts.compiled.get(outcome, 0) + 1

    def counts(self) -> Counts:
        """All of them, as they are now."""
        with self._lock:
            return copy.deepcopy(self._counts)


def _of(found: dict[str, T], name: str, make: Callable[[], T]) -> T:
    if name not in found:
        if len(found) >= _KINDS:
            name = OTHER
        found.setdefault(name, make())
    return found[name]


def _no_calls() -> Calls:
    return Calls(Spread.over(SECONDS), Spread.over(JOBS))


def _no_seconds() -> Spread:
    return Spread.over(SECONDS)
