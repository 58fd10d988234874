"""Jobs for later: accepted now, run when it is their turn, read when the client likes, safe against a restart."""

from __future__ import annotations

import asyncio
import contextlib
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
from api.schema.generation import GenerationResult
from api.schema.messages import Preview
from api.service import turns
from api.service.acceptance import check_places, digest_of, scoped
from api.service.completions import Completions
from api.service.endpoints import Counts, EndpointStore
from api.service.entries import NATIVE, Accepted, Entry, Terms, Turn
from api.service.jobs import JobState
from api.service.ledger import Ledger
from api.service.limits import Limits
from api.service.places import Places
from api.service.reports import Report, state_event
from api.service.s3_config import S3Config
from api.service.store import MAX_TRIES
from api.service.watch import Watch
from api.service.webhooks_hook import Hook
from api.settings import Settings

if TYPE_CHECKING:
    from api.service.service import Service

log = logging.getLogger("api.later")

PRIORITIES = {"low": 0, "normal": 1, "high": 2}
_LOOK = 0.25
"""Seconds between two looks for a free worker while jobs wait."""
_PAUSE = 1.0
"""Seconds before the next try when the workers, or the store, could not."""
_SWEEP = 5.0
"""Seconds between two looks for jobs that waited or were kept long enough, at most."""
_LAST_WORDS = 5.0
"""Seconds that it may take to write how jobs ended, once the workers stopped."""
_RECOVERY = 5.0
"""Seconds for which those who come wait until the store was read; milliseconds unless the disk has a fault."""
_NOT_ITS_FAULT = ("QUEUE_FULL", "NOT_READY")
"""The server could not: the job goes on waiting, and it was no try of it."""
_T = TypeVar("_T")


class Later:
    """Accepts and runs jobs that are not bound to a connection.

    They count as queued requests, so MAX_QUEUE bounds both together, and as many run at once as the workers
    have room for; from there on they stand in line with the others.

    Args:
        settings: where the store is, and how long things are kept.
        service: runs the jobs.
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
        self._completions = Completions(self.ledger, self._store)
        self.ledger.on_end = self._over
        self.waiting = 0
        self.watch = Watch()
        self._running: dict[str, tuple[asyncio.Task[None], Report]] = {}
        self._hooks: dict[str, Hook] = {}
        self._wake = asyncio.Event()
        self._recovered = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reserved: set[str] = set()
        """Jobs that have left the store and not come to the line yet, where their places are kept."""
        self._closing = False
        self._not_before = 0.0

    def open(self) -> None:
        """Take STATE_DIR for this process.

        Raises:
            SettingsError: it cannot be used, or another server uses it.
        """
        self._store.open()

    def start(self) -> None:
        """Begin, first with what an earlier process left."""
        self.open()
        self._begin(self._run_all())

    def close(self) -> None:
        """Begin nothing any more. What runs goes on, and may be read."""
        self._closing = True

    async def stop(self) -> None:
        """After the workers stopped: what is not done waits for the next start."""
        self.close()
        running = [task for task, _ in self._running.values()]
        if running:
            await asyncio.wait(running, timeout=_LAST_WORDS)
        for task in list(self._tasks):
            task.cancel()
        try:
            async with asyncio.timeout(_LAST_WORDS):
                ran = await self.ledger.call(self._store.running) if self._recovered.is_set() else []
                for job_id, _ in ran:
                    await self.ledger.give_back(job_id, counts=False)
        except (TimeoutError, sqlite3.Error):
            log.exception("what runs cannot be given back: the next start does it, as after a crash")
        await self.ledger.close()

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

    def progress(self, job_id: str) -> dict[str, Any] | None:
        """How far a job that runs is; see ``Report``."""
        running = self._running.get(job_id)
        return running[1].progress if running else None

    def preview(self, job_id: str) -> Preview | None:
        """The newest preview of a job that runs."""
        running = self._running.get(job_id)
        return running[1].preview if running else None

    async def cancel(self, job_id: str) -> Entry:
        """End a job wherever it is; one that is over stays as it is.

        Raises:
            ApiError: NO_SUCH_JOB, NOT_READY.
        """
        await self._until_recovered()
        await asyncio.shield(self._begin(self._fail(job_id, ApiError("CANCELLED", "The job was cancelled."))))
        return await self.ledger.get(job_id)

    async def purge(self, endpoint: str, owner: str) -> int:
        """Cancel what waits at an endpoint; what runs goes on.

        Returns:
            How many jobs waited.

        Raises:
            ApiError: NOT_READY.
        """
        await self._until_recovered()
        return await asyncio.shield(self._begin(self._purge(endpoint, owner)))

    async def _purge(self, endpoint: str, owner: str) -> int:
        purged = await self.ledger.purge(endpoint, owner, ApiError("CANCELLED", "The queue was purged."))
        self._count(-purged)
        return purged

    async def retry(self, entry: Entry) -> None:
        """Have a job of RunPod's routes run once more, that failed or ran out of time.

        Raises:
            ApiError: INVALID_INPUTS: it ended otherwise, or has not; QUEUE_FULL, NOT_READY.
        """
        await self._until_recovered()
        self._service.dispatcher.check_room()
        if not await asyncio.shield(self._begin(self._retry(entry))):
            message = f"Only jobs that are FAILED or TIMED_OUT can be tried again; this one is {entry.state.value}."
            raise ApiError("INVALID_INPUTS", message, field="id", requested=entry.id)

    async def _retry(self, entry: Entry) -> bool:
        self._enter(entry.owner)
        try:
            ttl = min(self._settings.job_ttl, entry.terms.ttl or math.inf)
            waits = await self.ledger.retry(entry.id, ttl)
        except BaseException:
            self._turn_back(entry.owner)
            raise
        if waits:
            self._places.keep(entry.id, entry.owner)
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

    async def _run_all(self) -> None:
        while not self._recovered.is_set():
            try:
                await self._recover()
            except Exception:
                log.exception("what an earlier process left cannot be read")
                await asyncio.sleep(_PAUSE)
        self._begin(self.ledger.write_events())
        self._begin(self._completions.tell(self._service.webhooks))
        self._begin(self._sweep())
        while not self._closing:
            self._wake.clear()
            try:
                await self._take_turns()
            except Exception:
                log.exception("the store cannot be read")
                self._not_before = time.monotonic() + _PAUSE
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK if self.waiting else None):
                    await self._wake.wait()

    async def _recover(self) -> None:
        """What ran when the process ended waits again, unless it did so too often. May be begun anew at any point."""
        for job_id in await self.ledger.call(self._store.without_inputs):
            message = (
                "The server was started anew, and with PERSIST_INPUTS=0 inputs end with it: send the request again."
            )
            await self.ledger.end(job_id, ApiError("NOT_READY", message))
        for job_id, tries in await self.ledger.call(self._store.running):
            if tries < MAX_TRIES:
                await self.ledger.give_back(job_id, counts=True)
            else:
                message = f"The server died {tries} times while it ran this job; it is not tried again."
                await self._end_from_outside(job_id, ApiError("WORKER_DIED", message))
        self._places.recover(await self.ledger.call(self._store.owners))
        if waiting := await self.ledger.call(self._store.waiting):
            self._count(waiting)
            log.info("%d jobs wait from before", waiting)
        self._recovered.set()

    async def _take_turns(self) -> None:
        workers = self._service.dispatcher.workers
        while self.waiting and not self._closing and time.monotonic() >= self._not_before:
            if len(self._running) >= sum(worker.info.slots for worker in workers if worker.ready and worker.info):
                return
            turn = await self.ledger.call(self._store.take, time.time(), [state_event(JobState.IN_PROGRESS)])
            if turn is None:
                return
            self.waiting -= 1
            self._reserved.add(turn.id)
            self.ledger.tell(turn.id)
            report = Report(turn.id, partial(self.ledger.note, turn.id))
            task = self._begin(self._run(turn, report))
            self._running[turn.id] = (task, report)
            task.add_done_callback(partial(self._ended, turn.id))

    def _release(self, job_id: str) -> None:
        if job_id in self._reserved:
            self._reserved.remove(job_id)
            self._service.dispatcher.expected -= 1

    def _ended(self, job_id: str, task: asyncio.Task[None]) -> None:
        self._release(job_id)  # of one that was cancelled before it began
        if job_id in self._running and self._running[job_id][0] is task:  # it may be its turn once more already
            del self._running[job_id]
            self._hooks.pop(job_id, None)
            self.ledger.forget(job_id)
        self._wake.set()

    async def _run(self, turn: Turn, report: Report) -> None:
        about = {"request_id": turn.request_id, "job_id": turn.id}
        self.watch.turn(turn.id)
        inputs = msgspec.json.decode(turn.inputs)
        hook = self._hook(turn.id, inputs, turn.terms.owner)
        if hook:
            hook.begin()
            self._hooks[turn.id] = hook
        try:
            outcome: GenerationResult | ApiError = await self._generate(turn, inputs, report, hook)
        except ApiError as error:
            outcome = error
        except Exception:
            log.exception("unexpected", extra=about)
            outcome = ApiError("INTERNAL_ERROR", "Something went wrong in the server; its log has the request id.")
        if isinstance(outcome, ApiError):
            stopped = self._closing and outcome.code == "CANCELLED"  # while its model was fetched
            if stopped or outcome.code in _NOT_ITS_FAULT:
                self._not_before = time.monotonic() + _PAUSE
                if await self.ledger.give_back(turn.id, counts=False):
                    self._count(1)
                return
            log.warning("job failed: %s %s", outcome.code, outcome.message, extra=about)
            if hook:
                hook.fail(outcome)
        if hook:  # once it is over nobody would tell its events again
            await hook.stored()
        await self.ledger.end(turn.id, outcome)

    async def _generate(
        self, turn: Turn, inputs: dict[str, Any], report: Report, hook: Hook | None
    ) -> GenerationResult:
        self._release(turn.id)  # the next line takes the place itself, before it awaits anything
        return await turns.run(turn, inputs, report, hook, self._service, self._settings)

    async def _fail(self, job_id: str, error: ApiError) -> None:
        """End a job from outside, in whatever state it is."""
        before = await self._end_from_outside(job_id, error)
        if before == JobState.IN_QUEUE:
            self._count(-1)
        if before is not None and job_id in self._running:
            self._running[job_id][0].cancel()

    def _hook(self, job_id: str, inputs: dict[str, Any], owner: str) -> Hook | None:
        return self._service.webhooks.hook(inputs["callInputs"], job=job_id, owner=owner)

    async def _end_from_outside(self, job_id: str, error: ApiError) -> JobState | None:
        """End a job, and tell the receiver of its webhooks."""
        hook = self._hooks.get(job_id)
        if hook is None and (inputs := await self.ledger.call(self._store.inputs, job_id)):
            entry = await self.ledger.call(self._store.get, job_id)
            hook = self._hook(job_id, msgspec.json.decode(inputs), entry.owner if entry else "")
        before = await self.ledger.end(job_id, error)
        if hook and before is not None:
            hook.begin()
            hook.fail(error)
        return before

    async def _sweep(self) -> None:
        shortest = min(self._settings.job_ttl, self._settings.result_ttl)
        while True:
            try:
                for job_id in await self.ledger.call(self._store.expired, time.time()):
                    allowed = f"JOB_TTL of {self._settings.job_ttl:g} s, or the policy.ttl that it came with"
                    message = f"It was not its turn within {allowed}."
                    await self._fail(job_id, ApiError("TIMED_OUT", message))
                await self.ledger.call(self._store.remove_old, time.time())
            except Exception:
                log.exception("old jobs cannot be removed")
            await asyncio.sleep(min(_SWEEP, max(0.2, shortest / 4)))

    def _over(self, job_id: str) -> None:
        self._places.leave(job_id)
        self._completions.look()

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
