"""The service in a thread with an event loop of its own.

RunPod's SDK wants the main thread: it sets signal handlers and runs a loop of its own there, and importing it takes
longer than a second. The service has begun to start its workers by then.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from api.service.service import Service

_T = TypeVar("_T")
_LAST_WORDS = 15.0
"""Seconds that workers and threads get to end, beyond DRAIN_TIMEOUT."""


class Hosted:
    """A service that runs in a thread.

    Args:
        service: not started yet.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._fault: BaseException | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._host, name="service", daemon=True)

    def start(self) -> None:
        """Start it; returns once its workers are being started.

        Raises:
            Exception: what the service says.
        """
        self._thread.start()
        self._started.wait()
        if self._fault:
            raise self._fault

    def run(self, what: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run something on the service's loop, from any thread. Cancelling the future cancels it there."""
        return asyncio.run_coroutine_threadsafe(what, self._loop)

    def stop(self) -> None:
        """Drain it and end its workers."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(self.service.settings.drain_timeout + _LAST_WORDS)

    def _host(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._live())

    async def _live(self) -> None:
        try:
            self.service.start()
        except BaseException as fault:
            self._fault = fault
            return
        finally:
            self._started.set()
        await self._stop.wait()
        await self.service.stop()
