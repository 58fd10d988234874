"""Turns what happens to a job for later into the events that its readers get."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from api.schema.messages import Phase, Progress
from api.schema.transfers import Transfer
from api.service.jobs import JobState

_EVERY = 0.1
"""Seconds between two events that tell of steps."""
_WEIGHT = 0.3
"""Of the last step in the step time; a batch that grows makes the next ones slower."""


def state_event(state: JobState, **more: Any) -> dict[str, Any]:
    """The event that a job is in another state now."""
    return {"type": "state", "state": state.value, "time": round(time.time() * 1000), **more}


class Report:
    """The events of one job while it runs.

    Args:
        tell: called with each event.
        clock: seconds.

    Attributes:
        progress: ``step``, ``total`` and ``eta`` (seconds to go, None before the second step); None before the first.
    """

    def __init__(self, tell: Callable[[dict[str, Any]], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.progress: dict[str, Any] | None = None
        self._tell = tell
        self._clock = clock
        self._told = -_EVERY
        self._last: tuple[float, int] | None = None
        self._step_time: float | None = None

    def __call__(self, event: Phase | Progress | Transfer) -> None:
        """As ``on_event`` of the service."""
        if isinstance(event, Progress):
            self._step(event)
            return
        body: dict[str, Any] = {"type": event.kind, "status": event.status}
        if isinstance(event, Transfer):
            moved = {"model": event.model_id, "bytes": event.done, "total": event.total}
            body = {**body, **moved, "rate": event.rate, "eta": event.eta}
        self._put(body)

    def _step(self, event: Progress) -> None:
        now = self._clock()
        if self._last is not None and event.step > self._last[1]:
            taken = (now - self._last[0]) / (event.step - self._last[1])
            self._step_time = (
                taken if self._step_time is None else self._step_time + _WEIGHT * (taken - self._step_time)
            )
        elif self._last is not None:
            self._step_time = None  # its worker died: it began anew
        self._last = (now, event.step)
        left = event.total - event.step
        eta = 0.0 if not left else None if self._step_time is None else round(left * self._step_time, 2)
        self.progress = {"step": event.step, "total": event.total, "eta": eta}
        if now - self._told >= _EVERY or not left:
            self._told = now
            self._put({"type": "inference", "status": "progress", **self.progress})

    def _put(self, body: dict[str, Any]) -> None:
        self._tell({**body, "time": round(time.time() * 1000)})
