"""Tells the webhooks of RunPod's jobs that they are over, also those of jobs that ended before a crash."""

from __future__ import annotations

import asyncio
import logging
from typing import Literal, Protocol

import msgspec

from api.errors import ApiError
from api.service.endpoints import EndpointStore
from api.service.jobs import TERMINAL
from api.service.ledger import Ledger
from api.service.runpod_status import status_of

log = logging.getLogger("api.later")

_PAUSE = 5.0
"""Seconds before what could not be handed over is tried again."""


class Sender(Protocol):
    """Delivers what webhooks are to be told."""

    async def post(
        self, url: str, body: bytes, *, job: str, kind: Literal["native", "runpod"], sign_key: str = "", owner: str = ""
    ) -> None:
        """Take a message; it is on the disk when this returns."""


class Completions:
    """Hands each end of a job that has a webhook to the one who delivers it.

    The store knows which ends were handed over, so none is lost; one may be told twice, where the process dies in
    between.

    Args:
        ledger: what is known of jobs.
        store: only used through the ledger's thread.
    """

    def __init__(self, ledger: Ledger, store: EndpointStore) -> None:
        self._ledger = ledger
        self._store = store
        self._ended = asyncio.Event()
        self._ended.set()  # there may be some from before

    def look(self) -> None:
        """A job has ended."""
        self._ended.set()

    async def tell(self, sender: Sender) -> None:
        """Hand over what is to be told, for ever."""
        while True:
            await self._ended.wait()
            self._ended.clear()
            try:
                ended = await self._ledger.call(self._store.to_tell)
            except Exception:
                log.exception("which webhooks are to be told cannot be read")
                failed = True
            else:
                failed = not all([await self._tell_one(sender, job_id) for job_id in ended])
            if failed:
                await asyncio.sleep(_PAUSE)
                self._ended.set()

    async def _tell_one(self, sender: Sender, job_id: str) -> bool:
        try:
            await self._tell(sender, job_id)
        except Exception:
            log.exception("the webhook of job %s could not be told that it is over; it is tried again", job_id)
            return False
        return True

    async def _tell(self, sender: Sender, job_id: str) -> None:
        entry = await self._ledger.call(self._store.get, job_id)
        if entry is None or entry.state not in TERMINAL:  # sent once more since: it is told of the next end
            return
        if not entry.terms.webhook:  # it was in memory only, and the process ended
            await self._ledger.call(self._store.told, job_id, entry.finished)
            return
        try:
            body = await status_of(self._ledger, entry)
        except ApiError as error:
            if error.code != "NO_SUCH_JOB":
                raise
            body = {"id": entry.id, "status": entry.state.value}  # its images are gone: that it is over, stays true
        data = msgspec.json.encode(body)
        await sender.post(entry.terms.webhook, data, job=job_id, kind="runpod", owner=entry.owner)
        await self._ledger.call(self._store.told, job_id, entry.finished)
