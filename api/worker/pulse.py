"""Tells how long a worker has been without progress, so that one that hangs is seen wherever it hangs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from api.engine.executor import Executor


class Pulse:
    """Watches an executor, and the threads that have something to do beside it.

    Three things are watched, each with a clock of its own:

    - the call that the device makes now. A module call and the loading of a model are one call each;
    - each job that is between two calls: its thread is to come back for the next one;
    - everything together, while threads are at work: a call that is made or asked for, and a thread that begins or
      ends, is progress. So waiting for room, for another's load or for a turn is no hang while others go on, and a hang
      in a place that nobody thought of is one.

    How long a job takes as a whole is not watched, nor how long it waits for the device.

    Args:
        executor: of the device.
        elsewhere: whether somebody waits for another worker, which has a watch of its own.
    """

    def __init__(self, executor: Executor, elsewhere: Callable[[], bool] = lambda: False) -> None:
        self._executor = executor
        self._elsewhere = elsewhere
        self._lock = threading.Lock()
        self._working = 0
        self._begun = 0
        self._seen: Any = None
        self._moved = time.monotonic()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """This thread has something to do."""
        with self._lock:
            self._working += 1
            self._begun += 1
        try:
            yield
        finally:
            with self._lock:
                self._working -= 1

    def stalled(self) -> float:
        """Seconds since what should move has moved; 0.0 when there is nothing to do. Asked again and again."""
        now, executor = time.monotonic(), self._executor
        calling, astray = executor.since, executor.astray
        seen = (executor.calls, executor.runs, self._begun, self._working, calling)
        if seen != self._seen or not self._working or self._elsewhere():
            self._seen, self._moved = seen, now
        # while the device makes a call, all may wait for it: then its own clock counts
        clocks = [calling if calling is not None else self._moved, astray]
        return max(now - clock for clock in clocks if clock is not None)
