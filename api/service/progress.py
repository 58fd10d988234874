"""Turns the bytes that a transfer reports into a few events a second, with rate and time to go."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from api.schema.transfers import Transfer

_EVERY = 1.0
"""Seconds between two progress events of one phase."""
_WINDOW = 5.0
"""Seconds over which the rate is measured."""


class _Phase:
    def __init__(self, now: float) -> None:
        self.began = self.ended = self.told = now
        self.done = 0
        self.total: int | None = None
        self.over = False
        self.samples: deque[tuple[float, int]] = deque([(now, 0)])

    def add(self, now: float, done: int, total: int | None) -> None:
        self.ended, self.done, self.total = now, done, total
        self.samples.append((now, done))
        while self.samples[0][0] < now - _WINDOW and len(self.samples) > 2:
            self.samples.popleft()

    @property
    def rate(self) -> float:
        (first, before), (last, after) = self.samples[0], self.samples[-1]
        return max(0.0, (after - before) / (last - first)) if last > first else 0.0


class Tracker:
    """The phases of one transfer. One thread at a time.

    Args:
        model_id: for the events.
        tell: called with each event.
    """

    def __init__(self, model_id: str, tell: Callable[[Transfer], None]) -> None:
        self._model_id = model_id
        self._tell = tell
        self._phases: dict[str, _Phase] = {}

    def report(self, kind: str, done: int, total: int | None) -> None:
        """As ``api.models.manifest.OnProgress``: bytes done, bytes in all or None."""
        now = time.monotonic()
        phase = self._phases.get(kind)
        if phase is None:
            phase = self._phases[kind] = _Phase(now)
            phase.samples[0] = (now, done)  # what an earlier attempt left was not moved now
            phase.add(now, done, total)
            self._tell(self._event(kind, "start"))
        phase.add(now, done, total)
        if not phase.over and total is not None and done >= total:
            self._end(kind)
        elif not phase.over and now - phase.told >= _EVERY:
            phase.told = now
            self._tell(self._event(kind, "progress"))

    def end(self) -> None:
        """Everything is done."""
        for kind, phase in self._phases.items():
            if not phase.over:
                self._end(kind)

    def now(self) -> list[Transfer]:
        """Where each phase that is not over stands."""
        return [self._event(kind, "progress") for kind, phase in list(self._phases.items()) if not phase.over]

    @property
    def timings(self) -> dict[str, int]:
        """Milliseconds by phase."""
        return {kind: round((phase.ended - phase.began) * 1000) for kind, phase in self._phases.items()}

    def _end(self, kind: str) -> None:
        self._phases[kind].over = True
        self._tell(self._event(kind, "done"))

    def _event(self, kind: str, status: str) -> Transfer:
        phase = self._phases[kind]
        left = None if phase.total is None else max(0, phase.total - phase.done)
        eta = round(left / phase.rate, 1) if left is not None and phase.rate else 0.0 if left == 0 else None
        return Transfer(self._model_id, kind, status, phase.done, phase.total, round(phase.rate), eta)
