"""How far a job is and how long it still takes, from the steps that it told."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from api.schema.messages import Progress

_WEIGHT = 0.3
"""Of the last step in the step time; a batch that grows makes the next ones slower."""


class Steps:
    """The steps of one job, as they are told.

    Args:
        clock: seconds.

    Attributes:
        progress: ``step``, ``total`` and ``eta`` (seconds to go, None before the second step); None before the first.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.progress: dict[str, Any] | None = None
        self._clock = clock
        self._last: tuple[float, int] | None = None
        self._step_time: float | None = None

    def note(self, event: Progress) -> bool:
        """A step is done.

        Returns:
            False where the job began anew, since its worker died.
        """
        now, goes_on = self._clock(), True
        if self._last is not None and event.step > self._last[1]:
            taken = (now - self._last[0]) / (event.step - self._last[1])
            self._step_time = (
                taken if self._step_time is None else self._step_time + _WEIGHT * (taken - self._step_time)
            )
        elif self._last is not None:
            self._step_time, goes_on = None, False
        self._last = (now, event.step)
        left = event.total - event.step
        eta = 0.0 if not left else None if self._step_time is None else round(left * self._step_time, 2)
        self.progress = {"step": event.step, "total": event.total, "eta": eta}
        return goes_on
