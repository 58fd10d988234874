"""What is told of a job while it runs: how far it is, and its events, one after the other and never after its end.

The SDK's own ``progress_update`` starts a thread, a loop and a connection for each update, so two of them may arrive in
any order, and one even after the result; and it streams the items of generators only, whose output is a list. The
requests are the SDK's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from api.schema.messages import OnTheWay, Preview
from api.schema.transfers import Transfer
from api.service.bodies import images_body
from api.service.reports import Report

log = logging.getLogger("api.serverless")

EVERY = 1.0
"""Seconds between two updates of a job's progress."""
_BEHIND = 50
"""Events that were not sent yet, beyond which previews are left out: they are the large ones."""
_LAST_WORDS = 10.0
"""Seconds that the platform has to take the last events of a job that is over."""

Send = Callable[[dict[str, Any]], Awaitable[None]]


def streams() -> bool:
    """Whether the platform has said where events go."""
    return bool(os.environ.get("RUNPOD_WEBHOOK_POST_STREAM"))


class Updates:
    """The updates of one job; made on the loop that sends them.

    Args:
        job_id: the platform's id.
        progress: sends how far it is.
        stream: sends an event; None where nobody asked for events.
    """

    def __init__(self, job_id: str, progress: Send, stream: Send | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._progress, self._stream = progress, stream
        self._report = Report(job_id, self._told)
        self._latest: dict[str, Any] | None = None
        self._events: deque[dict[str, Any]] = deque()
        self._changed = asyncio.Event()
        self._over = False
        self._task = self._loop.create_task(self._send_all())

    def __call__(self, event: OnTheWay | Transfer) -> None:
        """As ``on_event`` of the service, from its thread."""
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is told any more
            self._loop.call_soon_threadsafe(self._take, event)

    async def close(self) -> None:
        """The job is over: send the events that wait, and no progress any more; what cannot be sent is left."""
        self._over, self._latest = True, None
        self._changed.set()
        await asyncio.wait({self._task}, timeout=_LAST_WORDS)
        self.cancel()

    def cancel(self) -> None:
        """Send nothing any more."""
        self._over = True
        self._task.cancel()

    def _take(self, event: OnTheWay | Transfer) -> None:
        if self._over:
            return
        if not isinstance(event, Preview):
            self._report(event)
        elif self._stream and len(self._events) < _BEHIND:
            told = {"step": event.step, "total": event.total, **images_body(event.images)}
            self._put({"type": "inference", "status": "preview", **told, "time": round(time.time() * 1000)})

    def _told(self, body: dict[str, Any]) -> None:
        self._latest = body
        self._put(body)

    def _put(self, body: dict[str, Any]) -> None:
        if self._stream:
            self._events.append(body)
        self._changed.set()

    async def _send_all(self) -> None:
        last = -EVERY
        while True:
            wait = max(0.0, last + EVERY - self._loop.time()) if self._latest else None
            if not self._events and not self._over and wait != 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), wait)
            self._changed.clear()
            if self._stream and self._events:
                await self._try(self._stream, self._events.popleft())
            elif self._latest and self._loop.time() - last >= EVERY:
                latest, self._latest, last = self._latest, None, self._loop.time()
                await self._try(self._progress, latest)
            elif self._over:
                return

    async def _try(self, send: Send, body: dict[str, Any]) -> None:
        try:
            await send(body)
        except Exception as fault:  # the job goes on without it
            log.warning("an update could not be sent: %s: %s", type(fault).__name__, fault)
