"""How the worker ends: it takes no job any more, finishes what runs within DRAIN_TIMEOUT, and goes.

By itself the SDK ends when its two long polls do, a minute and a half later, and a job that comes meanwhile is begun by
nobody. What is not done in time is left unanswered: the platform gives it to another worker, as after a crash.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

log = logging.getLogger("api.serverless")

_LOOK = 0.05


class Drain:
    """Ends the SDK's loop, once.

    Args:
        patience: seconds that running jobs get.
        unfinished: ids of the jobs that were begun and whose result was not sent yet.
        before_the_end: awaited when they are done.

    Attributes:
        begun: the end has begun.
        status: what the process is to end with.
    """

    def __init__(
        self,
        patience: float,
        unfinished: Callable[[], set[str]],
        before_the_end: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        self.begun = False
        self._patience = patience
        self._unfinished = unfinished
        self._before_the_end = before_the_end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self.status = 0

    def attach(self) -> None:
        """Take the signals from the SDK, whose handlers are asked as well; on its loop, in the main thread."""
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._after(signal.getsignal(number)))

    def begin(self, status: int = 0) -> None:
        """Begin the end.

        Args:
            status: of the process.
        """
        self.status = self.status or status
        if self._loop is not None and not self.begun:
            self.begun = True
            signal.raise_signal(signal.SIGTERM)  # the SDK hears of it in the only way that it has for this

    def _after(self, previous: Any) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            self.begun = True
            if callable(previous):
                previous(number, frame)
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._go)

        return handle

    def _go(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        log.info("shutting down: %d jobs run", len(self._unfinished()))
        deadline = time.monotonic() + self._patience
        try:
            while self._unfinished() and time.monotonic() < deadline:
                await asyncio.sleep(_LOOK)
        finally:  # also where the SDK's own end comes first
            await self._before_the_end()
        if left := self._unfinished():
            log.warning("%d jobs were not done within DRAIN_TIMEOUT; they are left to another worker", len(left))
        # from a callback: a task would keep the exception for somebody to ask for
        asyncio.get_running_loop().call_soon(sys.exit, self.status)
