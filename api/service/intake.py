"""Takes jobs for later in: those that come, and those that are sent once more; and lets go of those that wait."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import sqlite3
import time
from collections.abc import Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from api.errors import ApiError
from api.service.acceptance import check_places, digest_of, scoped
from api.service.endpoints import Counts, EndpointStore
from api.service.entries import NATIVE, Accepted, Entry, Terms
from api.service.jobs import JobState
from api.service.ledger import Ledger
from api.service.limits import Limits
from api.service.places import Places
from api.service.reports import state_event
from api.service.s3_config import S3Config
from api.service.store import RETRIABLE
from api.service.watch import Watch
from api.settings import Settings

if TYPE_CHECKING:
    from api.service.service import Service

log = logging.getLogger("api.later")

PRIORITIES = {"low": 0, "normal": 1, "high": 2}
_RECOVERY = 5.0
"""Seconds for which those who come wait until the store was read; milliseconds unless the disk has a fault."""
_T = TypeVar("_T")


class Intake:
    """Accepts jobs that are not bound to a connection, and counts those that wait.

    They count as queued requests, so MAX_QUEUE bounds both together.

    Args:
        settings: where the store is, and how long things are kept.
        service: says what is wrong with them, and how much room there is.
        limits: how many jobs a key may have; none by default.

    Attributes:
        ledger: what is known of each job, to be read.
        waiting: how many jobs wait in the store.
        watch: told of what becomes of them.
    """

    def __init__(self, settings: Settings, service: Service, limits: Limits | None = None) -> None:
        self._places = Places(limits or Limits(settings, ()))
        self._settings = settings
        self._service = service
        self._store = EndpointStore(settings.state_dir, persist_inputs=settings.persist_inputs)
        self.ledger = Ledger(self._store, settings.result_ttl)
        self.waiting = 0
        self.watch = Watch()
        self._wake = asyncio.Event()
        self._recovered = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def accept(
        self,
        request_id: str,
        model_inputs: dict[str, Any],
        call_inputs: dict[str, Any],
        priority: str = "normal",
        key: str | None = None,
        *,
        job_id: str | None = None,
        terms: Terms = NATIVE,
        s3: S3Config | None = None,
    ) -> Entry:
        """Take a request in, to be run when it is its turn.

        Args:
            request_id: what the log knows it by.
            model_inputs: the wire's ``modelInputs``.
            call_inputs: the wire's ``callInputs``.
            priority: ``low``, ``normal`` or ``high``.
            key: the client's name for the request: sent again with the same key, it is the same job.
            job_id: its id, where the client chose it; then that is the key.
            terms: what else the client asks for.
            s3: a bucket that the images are to go to.

        Raises:
            ApiError: what can be said against it without fetching its model; QUEUE_FULL, NOT_READY; DISK_FULL;
                RATE_LIMITED, TOO_MANY_JOBS.
        """
        said = {"modelInputs": model_inputs, "callInputs": call_inputs, **({"s3Config": s3} if s3 else {})}
        inputs = msgspec.json.encode(said)
        digest = digest_of(inputs, terms, priority)
        field = "Idempotency-Key" if job_id is None else "id"
        key = scoped(key, job_id, terms)
        await self._until_recovered()
        known = None if key is None else await self.ledger.call(self._store.by_key, key)
        if known is None:
            self._service.dispatcher.check_room()
            self._enter(terms.owner)  # before anything is awaited: those who come meanwhile find the queue so full
            try:
                await self._service.check(model_inputs, call_inputs)
                await check_places(terms, s3, self._settings)
            except BaseException:
                self._turn_back(terms.owner)
                raise
            ttl = min(self._settings.job_ttl, terms.ttl or math.inf)
            accept = partial(
                self._store.accept, job_id or secrets.token_hex(8), request_id, inputs, priority=PRIORITIES[priority],
                now=time.time(), ttl=ttl, events=[state_event(JobState.IN_QUEUE)], key=key, digest=digest, terms=terms,
            )  # fmt: skip
            # a client that goes away now has its job all the same
            known = await asyncio.shield(self._begin(self._write(accept, terms.owner)))
        if known is None:
            message = "There is a job with this id already: choose another one, such as a UUID."
            raise ApiError("INVALID_INPUTS", message, field=field, requested=job_id)
        if known.digest != digest:
            message = f"This {field} came with another request before: each request needs one of its own."
            raise ApiError("INVALID_INPUTS", message, field=field)
        return known.entry

    async def newest(self, limit: int, owner: str) -> list[Entry]:
        """The jobs of an owner that were accepted last, newest first."""
        return await self.ledger.call(self._store.newest, limit, owner)

    async def counts(self, endpoint: str, owner: str) -> Counts:
        """How many jobs an owner has at an endpoint."""
        return await self.ledger.call(self._store.counts, endpoint, owner)

    async def purge(self, endpoint: str, owner: str) -> int:
        """Cancel what waits at an endpoint; what runs goes on.

        Returns:
            How many jobs waited.

        Raises:
            ApiError: NOT_READY, DISK_FULL.
        """
        await self._until_recovered()
        return await asyncio.shield(self._begin(self._purge(endpoint, owner)))

    async def _purge(self, endpoint: str, owner: str) -> int:
        try:
            purged = await self.ledger.purge(endpoint, owner, ApiError("CANCELLED", "The queue was purged."))
        except sqlite3.Error as fault:
            log.exception("that a queue was purged could not be stored")
            raise ApiError("DISK_FULL", f"Nothing was purged: STATE_DIR cannot be written to: {fault}.") from fault
        self._count(-purged)
        return purged

    async def retry(self, entry: Entry) -> None:
        """Have a job of RunPod's routes run once more, that failed or ran out of time.

        Raises:
            ApiError: INVALID_INPUTS: it ended otherwise, or has not, or its inputs are gone; NO_SUCH_JOB: it was
                removed meanwhile; QUEUE_FULL, NOT_READY, DISK_FULL; RATE_LIMITED, TOO_MANY_JOBS.
        """
        await self._until_recovered()
        if not await asyncio.shield(self._begin(self._retry(entry))):
            state = (await self.ledger.get(entry.id)).state  # it may be another one by now
            message = f"Only jobs that are FAILED or TIMED_OUT can be tried again; this one is {state.value}."
            if state in RETRIABLE:
                message = "Its inputs were in memory only, and went with a restart: send the request again."
            raise ApiError("INVALID_INPUTS", message, field="id", requested=entry.id)

    async def _retry(self, entry: Entry) -> bool:
        self._service.dispatcher.check_room()
        self._enter(entry.owner)
        try:
            ttl = min(self._settings.job_ttl, entry.terms.ttl or math.inf)
            waits = await self.ledger.retry(entry.id, ttl)
        except BaseException as fault:
            self._turn_back(entry.owner)
            if not isinstance(fault, sqlite3.Error):
                raise
            log.exception("that a job waits once more could not be stored")
            raise ApiError("DISK_FULL", f"The job could not be stored in STATE_DIR: {fault}.") from fault
        if waits:
            self._places.keep(entry.id, entry.owner)
            self.watch.accepted(entry.id)
        else:
            self._turn_back(entry.owner)
        self._wake.set()
        return waits

    async def _write(self, accept: partial[Accepted | None], owner: str) -> Accepted | None:
        try:
            accepted = await self.ledger.call(accept)
        except BaseException as fault:
            self._turn_back(owner)
            if not isinstance(fault, sqlite3.Error):
                raise
            log.exception("a job could not be stored")
            message = f"The job could not be stored in STATE_DIR: {fault}. Send it again as a request that waits."
            raise ApiError("DISK_FULL", message) from fault
        if accepted is None or not accepted.is_new:
            self._turn_back(owner)
        else:
            self._places.keep(accepted.entry.id, owner)
            self.watch.accepted(accepted.entry.id)
        self._wake.set()
        return accepted

    async def _until_recovered(self) -> None:
        try:
            async with asyncio.timeout(_RECOVERY):
                await self._recovered.wait()
        except TimeoutError:
            message = (
                "The jobs in STATE_DIR cannot be read or written at the moment, which is tried again all the time; "
                "the server's log says why. Try again later, or send the request as one that waits."
            )
            raise ApiError("NOT_READY", message, retry_after=math.ceil(_RECOVERY)) from None

    def _enter(self, owner: str) -> None:
        self._places.take(owner)
        self._count(1)

    def _turn_back(self, owner: str) -> None:
        self._count(-1)
        self._places.give_back(owner)

    def _count(self, more: int) -> None:
        self.waiting += more
        self._service.dispatcher.expected += more

    def _begin(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._tasks.discard)
        return task
