"""What happens to a request, as docker-diffusers-api tells it: streams and webhooks both read this.

Its ``send`` (https://github.com/kiri-art/docker-diffusers-api, ``send.py``) gives the keys and their order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from api.errors import ApiError
from api.schema.messages import OnTheWay, Phase, Preview
from api.schema.transfers import Transfer
from api.service.bodies import images_body
from api.service.steps import Steps

Event = dict[str, Any]
"""``type, status, container_id, time, t, tsl, payload``: times are milliseconds, ``time`` since the epoch, ``t`` since
the request came, ``tsl`` since what is over now began."""


def tee(*readers: Callable[[Any], None] | None) -> Callable[[Any], None] | None:
    """One ``on_event`` for several readers; None where there are none, so that nothing is told at all."""
    found = [reader for reader in readers if reader is not None]
    if len(found) < 2:
        return found[0] if found else None

    def tell(event: Any) -> None:
        for reader in found:
            reader(event)

    return tell


class NativeEvents:
    """The events of one request.

    Args:
        tell: called with each.
        payload: what each of them carries.
        container_id: CONTAINER_ID; empty: there is none.
        takes_previews: whether there is room for one more of the large ones.

    Attributes:
        callback_steps: a step is told after every so many; None: none is.
    """

    def __init__(
        self,
        tell: Callable[[Event], None],
        payload: dict[str, Any],
        container_id: str,
        takes_previews: Callable[[], bool] = lambda: True,
    ) -> None:
        self.callback_steps: int | None = None
        self._tell = tell
        self._payload = payload
        self._container_id = container_id or None
        self._takes_previews = takes_previews
        self._running = False
        self._steps = Steps()
        self._began = time.time()
        self._last: dict[str, float] = {}
        self._open: list[str] = []

    @property
    def progress(self) -> Event | None:
        """The line that streams have once a second while the device is at the request, else None."""
        if not self._running:
            return None
        steps = self._steps.progress
        share = steps["step"] / steps["total"] if steps else 0.0
        return {"type": "inference", "progress": share, **(steps or {})}

    @property
    def quiet(self) -> Event:
        """The line that streams have while nothing happens, of the same form: a proxy cuts what is silent."""
        return {"type": "inference", "progress": 1.0 if "inference" in self._last else 0.0}

    def __call__(self, event: OnTheWay | Transfer) -> None:
        """As ``on_event`` of the service."""
        if isinstance(event, Transfer):
            moved = {"model": event.model_id, "bytes": event.done, "total": event.total}
            self.put(event.kind, event.status, {**moved, "rate": event.rate, "eta": event.eta})
        elif isinstance(event, Phase):
            self.put(event.kind, event.status, {})
            if event.kind == "inference":
                self._running, self._steps = event.status == "start", Steps()
        elif isinstance(event, Preview):
            if self._takes_previews():
                shown = {"step": event.step, "total": event.total, **images_body(event.images)}
                self.put("inference", "preview", shown)
        else:
            self._steps.note(event)
            if self.callback_steps and (event.step - 1) % self.callback_steps == 0:
                # as there: the index of the step, from 0
                self.put("inference", "progress", {**(self._steps.progress or {}), "step": event.step - 1})

    def fail(self, error: ApiError) -> None:
        """The request has failed, in what it was at; there is no such event in docker-diffusers-api."""
        told = {"code": error.code, "message": error.message, "field": error.field}
        kind = self._open[-1] if self._open else "inference"
        self.put(kind, "error", {name: value for name, value in told.items() if value is not None})

    def put(self, kind: str, status: str, payload: dict[str, Any]) -> None:
        """Tell an event."""
        now = time.time()
        since = now - self._last.get(kind, now) if status in ("done", "error") else 0.0
        if status not in ("progress", "preview"):
            self._last[kind] = now
            self._open = [*(other for other in self._open if other != kind), *([kind] if status == "start" else [])]
        self._tell(
            {
                "type": kind,
                "status": status,
                "container_id": self._container_id,
                "time": round(now * 1000),
                "t": round((now - self._began) * 1000),
                "tsl": round(since * 1000),
                "payload": {**self._payload, **payload},
            }
        )
