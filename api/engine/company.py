"""Jobs that share the device's memory, and now and then one that has it for itself."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from api.engine.calls import Cancelled

_TICK = 0.2
"""Seconds between two looks whether one who waits was cancelled, where nobody says so."""


@dataclass(eq=False)
class Visit:
    """A job's stay. ``had_company``: another job was there at some time of it."""

    had_company: bool = False


class Company:
    """Lets jobs in together, or one alone.

    Nobody comes in while one waits to be alone, so that its wait ends with the jobs that are inside. Not to be entered
    from within: a job that is inside leaves first.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._visits: set[Visit] = set()
        self._wanting = 0
        self._closed = False

    @contextlib.contextmanager
    def together(self, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Visit]:
        """Be there with others.

        Raises:
            Cancelled: ``cancelled`` said so before there was room.
        """
        with self._changed:
            self._await(lambda: not self._closed and not self._wanting, cancelled)
            visit = self._enter()
        try:
            yield visit
        finally:
            self._leave(visit)

    @contextlib.contextmanager
    def alone(self, cancelled: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Be there when everybody else has left, and keep others out.

        Raises:
            Cancelled: ``cancelled`` said so before that.
        """
        with self._changed:
            self._wanting += 1
            try:
                self._await(lambda: not self._visits, cancelled)
                visit = self._enter()
                self._closed = True
            finally:
                self._wanting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            self._closed = False
            self._leave(visit)

    def wake(self) -> None:
        """A job was cancelled: let it leave if it waits."""
        with self._changed:
            self._changed.notify_all()

    def _await(self, free: Callable[[], bool], cancelled: Callable[[], bool]) -> None:
        while not free():
            if cancelled():
                raise Cancelled
            self._changed.wait(_TICK)

    def _enter(self) -> Visit:
        visit = Visit(bool(self._visits))
        for other in self._visits:
            other.had_company = True
        self._visits.add(visit)
        return visit

    def _leave(self, visit: Visit) -> None:
        with self._changed:
            self._visits.remove(visit)
            self._changed.notify_all()
