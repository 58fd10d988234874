"""The native events of one request, on their way to the receiver of its webhooks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from api.errors import ApiError
from api.schema.messages import OnTheWay
from api.schema.transfers import Transfer
from api.service.native_events import Event, NativeEvents
from api.service.webhooks_signing import native_body

if TYPE_CHECKING:
    from api.service.webhooks import Webhooks

_BEHIND = 50
"""Events of one job that wait, beyond which there are no previews: they are the large ones, and stale by then."""
_BEHIND_IN_ALL = 500
"""The same for all jobs of a receiver: while it is down, the disk does not fill up with pictures."""


class Hook:
    """The native events of one request, on their way to its receiver.

    Args:
        webhooks: sends them.
        url: the receiver.
        key: what they are signed with.
        payload: what each of them carries.
        job: whose they are.
        owner: name of the API key that it came with.
        container_id: CONTAINER_ID.
    """

    def __init__(
        self, webhooks: Webhooks, url: str, key: str, payload: dict[str, Any], job: str, owner: str, container_id: str
    ) -> None:
        self._webhooks, self._url, self._key, self._job, self._owner = webhooks, url, key, job, owner
        self._last: asyncio.Future[None] | None = None
        self._began = self._over = False
        self.events = NativeEvents(self._tell, payload, container_id, self._takes_previews)

    def __call__(self, event: OnTheWay | Transfer) -> None:
        """As ``on_event`` of the service."""
        if not self._over:
            self.events(event)

    def begin(self, options: dict[str, Any] | None = None) -> None:
        """It has been accepted: should it fail, its receiver is told.

        Args:
            options: of ``Admitted``.
        """
        self._began = True
        if options is not None:
            self.events.callback_steps = options.get("callback_steps")

    def fail(self, error: ApiError) -> None:
        """Tell that it has failed, as the last event; not of a request that was refused before anything happened."""
        if self._began and not self._over:
            self.events.fail(error)
            self._over = True

    async def stored(self, patience: float = 2.0) -> None:
        """Wait until its events are safe; a disk with a fault is waited for no longer than ``patience`` seconds."""
        if self._last is not None:
            await asyncio.wait({self._last}, timeout=patience)

    def _takes_previews(self) -> bool:
        behind = self._webhooks.behind(self._url, self._job)
        return behind < _BEHIND and self._webhooks.waiting(self._url) < _BEHIND_IN_ALL

    def _tell(self, event: Event) -> None:
        self._began = True
        body = native_body(event, self._key)
        durable = event["status"] not in ("progress", "preview")
        self._last = self._webhooks.put(
            self._url, body, job=self._job, kind="native", sign_key=self._key, owner=self._owner, durable=durable
        )


@contextlib.asynccontextmanager
async def telling(hook: Hook | None) -> AsyncIterator[None]:
    """What goes wrong inside is told to a request's receiver, and safe when its client is told."""
    try:
        yield
    except ApiError as error:
        if hook:
            hook.fail(error)
            await hook.stored()
        raise
    except asyncio.CancelledError:
        if hook:
            hook.fail(ApiError("CANCELLED", "The client went away."))
        raise
    except Exception:
        if hook:
            hook.fail(ApiError("INTERNAL_ERROR", "Something went wrong in the server; its log has the request id."))
            await hook.stored()
        raise
