"""Turns what happens to a job for later into the events that its readers get."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from api.schema.messages import OnTheWay, Preview, Progress
from api.schema.transfers import Transfer
from api.service.jobs import JobState
from api.service.steps import Steps

_EVERY = 0.1
"""Seconds between two events that tell of steps, and between two that tell of previews."""


def state_event(state: JobState, **more: Any) -> dict[str, Any]:
    """The event that a job is in another state now."""
    return {"type": "state", "state": state.value, "time": round(time.time() * 1000), **more}


class Report:
    """The events of one job while it runs.

    Events are kept as long as the job is, so of a preview they hold no more than a link. The newest is here, and goes
    with this.

    Args:
        job_id: the job.
        tell: called with each event.
        clock: seconds.

    Attributes:
        preview: the newest; None before the first.
    """

    def __init__(
        self, job_id: str, tell: Callable[[dict[str, Any]], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.preview: Preview | None = None
        self._id = job_id
        self._tell = tell
        self._clock = clock
        self._steps = Steps(clock)
        self._told = self._shown = -_EVERY

    @property
    def progress(self) -> dict[str, Any] | None:
        """``step``, ``total`` and ``eta``; see ``Steps``."""
        return self._steps.progress

    def __call__(self, event: OnTheWay | Transfer) -> None:
        """As ``on_event`` of the service."""
        if isinstance(event, Progress):
            self._step(event)
        elif isinstance(event, Preview):
            self._show(event)
        else:
            body: dict[str, Any] = {"type": event.kind, "status": event.status}
            if isinstance(event, Transfer):
                moved = {"model": event.model_id, "bytes": event.done, "total": event.total}
                body = {**body, **moved, "rate": event.rate, "eta": event.eta}
            self._put(body)

    def _step(self, event: Progress) -> None:
        if not self._steps.note(event):
            self.preview = None
        now = self._clock()
        if now - self._told >= _EVERY or event.step == event.total:
            self._told = now
            self._put({"type": "inference", "status": "progress", **(self.progress or {})})

    def _show(self, event: Preview) -> None:
        self.preview = event
        now = self._clock()
        if now - self._shown >= _EVERY or event.step == event.total:
            self._shown = now
            links = preview_links(self._id, event)
            told = {"step": event.step, "total": event.total, "image_urls": links}
            self._put({"type": "inference", "status": "preview", **told})

    def _put(self, body: dict[str, Any]) -> None:
        self._tell({**body, "time": round(time.time() * 1000)})


def preview_links(job_id: str, preview: Preview) -> list[str]:
    """Where the images of a job's newest preview are."""
    return [f"/jobs/{job_id}/previews/{number}" for number in range(len(preview.images))]
