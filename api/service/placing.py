"""When a job waits for the worker that has its model in memory, though another one is free."""

from __future__ import annotations

import time
from collections.abc import Callable

from api.service.jobs import Job

_FIRST_GUESS = 10.0
"""Seconds that loading a model is thought to take before any has been measured."""
_REMEMBERED = 1024
"""Models whose loading is remembered."""


class Placing:
    """Weighs waiting for a warm worker against loading the model on a cold one.

    A job waits while the warm worker is expected to come to it sooner than a cold one would have loaded its model, and
    never longer than that loading takes, so that a wrong guess costs at most as much again (the "ski rental" rule;
    A. Karlin et al., "Competitive snoopy caching", Algorithmica 3, 1988).

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._loads: dict[str, float] = {}

    def note(self, key: str, seconds: float) -> None:
        """A model was loaded in so many seconds."""
        self._loads.pop(key, None)
        self._loads[key] = seconds
        if len(self._loads) > _REMEMBERED:
            del self._loads[next(iter(self._loads))]

    def wait(self, job: Job, turn: float) -> float:
        """Seconds that a job is to wait still for the worker that has its model; 0.0: it may go to any.

        Args:
            turn: seconds until that worker is expected to come to it.
        """
        load = self._loads.get(job.request.model.key, self._usual())
        now = self._clock()
        if job.held is None:
            job.held = now
        return max(0.0, job.held + load - now) if turn < load else 0.0

    def _usual(self) -> float:
        return sum(self._loads.values()) / len(self._loads) if self._loads else _FIRST_GUESS
