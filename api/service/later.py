"""Jobs for later: accepted now, run when it is their turn, read when the client likes, safe against a restart."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from api.errors import ApiError
from api.schema.generation import GenerationResult
from api.schema.messages import Preview
from api.service import turns
from api.service.completions import Completions
from api.service.entries import Entry, Turn
from api.service.intake import Intake
from api.service.jobs import JobState
from api.service.limits import Limits
from api.service.reports import Report, state_event
from api.service.store import MAX_TRIES
from api.service.webhooks_hook import Hook
from api.settings import Settings

if TYPE_CHECKING:
    from api.service.service import Service

log = logging.getLogger("api.later")

_LOOK = 0.25
"""Seconds between two looks for a free worker while jobs wait."""
_PAUSE = 1.0
"""Seconds before the next try when the workers, or the store, could not."""
_SWEEP = 5.0
"""Seconds between two looks for jobs that waited or were kept long enough, at most."""
_LAST_WORDS = 5.0
"""Seconds that it may take to write how jobs ended, once the workers stopped."""
_NOT_ITS_FAULT = ("QUEUE_FULL", "NOT_READY")
"""The server could not: the job goes on waiting, and it was no try of it."""


class Later(Intake):
    """Runs jobs that are not bound to a connection.

    As many run at once as the workers have room for; from there on they stand in line with the others.

    Args:
        settings: where the store is, and how long things are kept.
        service: runs the jobs.
        limits: how many jobs a key may have; none by default.
    """

    def __init__(self, settings: Settings, service: Service, limits: Limits | None = None) -> None:
        super().__init__(settings, service, limits)
        self._completions = Completions(self.ledger, self._store)
        self.ledger.on_end = self._over
        self._running: dict[str, tuple[asyncio.Task[None], Report]] = {}
        self._hooks: dict[str, Hook] = {}
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
