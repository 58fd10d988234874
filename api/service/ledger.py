"""The store, seen from the event loop: who writes, waits until it is written; who reads, reads what was written."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from api.errors import ApiError
from api.schema.generation import GenerationResult
from api.service.endpoints import EndpointStore
from api.service.entries import Entry
from api.service.jobs import TERMINAL, JobState
from api.service.reports import state_event
from api.service.watch import Watch

log = logging.getLogger("api.later")

_FLUSH = 0.05
"""Seconds for which events are gathered before they are written."""
_PAUSE = 1.0
"""Seconds before what could not be written is tried again."""
_STATES = {"CANCELLED": JobState.CANCELLED, "TIMED_OUT": JobState.TIMED_OUT}
_T = TypeVar("_T")
Events = list[tuple[int, dict[str, Any]]]
"""Events with their sequence numbers, which count from 1."""


class Ledger:
    """Writes and reads the store, in a thread that does nothing else.

    An event is told to readers once it is written, so that every reader, at any time, sees the same sequence.

    Args:
        store: used by nobody else from now on, but for images, which any thread may read.
        result_ttl: seconds that jobs are kept once they are over.

    Attributes:
        on_end: called with the id of each job that has ended.
        watch: told of jobs that are over.
    """

    def __init__(self, store: EndpointStore, result_ttl: float) -> None:
        self._store = store
        self._result_ttl = result_ttl
        self._thread = ThreadPoolExecutor(1, "store")
        self._unwritten: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self._written: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._ended: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._closed = False
        self.on_end: Callable[[str], None] = lambda _: None
        self.watch = Watch()

    async def call(self, call: Callable[..., _T], *arguments: Any) -> _T:
        """Call a method of the store in its thread; calls are done in the order in which they are made.

        Raises:
            ApiError: NOT_READY: it is closed.
        """
        if self._closed:
            raise ApiError("NOT_READY", "The server is shutting down.")
        # shielded: who asked may be cancelled, what was asked for is done
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments))

    async def close(self) -> None:
        """Let readers go, and close the store."""
        self._closed = True
        for event in (*self._written.values(), *self._ended.values()):
            event.set()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._store.close)
        self._thread.shutdown()

    async def get(self, job_id: str, owner: str | None = None, endpoint: str | None = None) -> Entry:
        """A job as it is now.

        Args:
            job_id: its id.
            owner: only if it is that one's; None: whoever's.
            endpoint: only if it came to that one of RunPod's routes; None: wherever.

        Raises:
            ApiError: NO_SUCH_JOB.
        """
        entry = await self.call(self._store.get, job_id)
        if entry is None or owner not in (None, entry.owner) or endpoint not in (None, entry.endpoint):
            raise self._no_such_job(job_id)
        return entry

    async def over(self, job_id: str, seconds: float) -> Entry:
        """A job once it is over, or as it is after so many seconds, or when the server stops.

        Raises:
            ApiError: NO_SUCH_JOB, NOT_READY.
        """
        entry = await self.get(job_id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while entry.state not in TERMINAL and not self._closed:
                    ended = self._ended[job_id]
                    entry = await self.get(job_id)
                    if entry.state in TERMINAL:
                        self._ended.pop(job_id, None)
                    else:
                        await ended.wait()
        return entry if self._closed else await self.get(job_id)

    async def stream(self, job_id: str, seconds: float) -> tuple[Entry, list[dict[str, Any]]]:
        """What happened to a job and no call of this has told yet; waits for it for so many seconds at most.

        Returns:
            The job, and its events, without those of states but for the last.

        Raises:
            ApiError: NO_SUCH_JOB, NOT_READY.
        """
        due = time.monotonic() + seconds
        while True:
            written = self._written[job_id]
            entry, events = await self.call(self._store.stream, job_id)
            if entry is None or entry.state in TERMINAL:
                self._written.pop(job_id, None)
            if entry is None:
                raise self._no_such_job(job_id)
            events = [body for body in events if body["type"] != "state" or body["state"] in TERMINAL]
            left = due - time.monotonic()
            if events or entry.state in TERMINAL or left <= 0:
                return entry, events
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await written.wait()

    async def result(self, entry: Entry, *, with_images: bool = True) -> GenerationResult:
        """What a job gave that is COMPLETED.

        Raises:
            ApiError: NO_SUCH_JOB: it was removed meanwhile.
        """
        stored = entry.result
        assert stored is not None
        images = [await self.image(entry, number) for number in range(stored.images)] if with_images else []
        return GenerationResult(
            images, stored.meta, stored.timings, stored.mem_usage, stored.nsfw, stored.extras, stored.urls
        )

    async def image(self, entry: Entry, number: int) -> bytes:
        """One image of a job that is COMPLETED.

        Raises:
            ApiError: NO_SUCH_JOB: it was removed meanwhile.
        """
        assert entry.result is not None
        try:
            return await asyncio.to_thread(self._store.images.read, entry.id, number, entry.result.extension)
        except FileNotFoundError:
            raise self._no_such_job(entry.id) from None

    async def follow(self, job_id: str, after: int = 0) -> AsyncIterator[Events]:
        """The events of a job as they are written, in portions; ends with the job.

        Args:
            after: the last sequence number that is known.

        Raises:
            ApiError: NOT_READY: the store was closed.
        """
        while True:
            written = self._written[job_id]
            entry = await self.call(self._store.get, job_id)
            events = await self.events(job_id, after)
            if events:
                yield events
                after = events[-1][0]
            if entry is None or entry.state in TERMINAL:
                self._written.pop(job_id, None)
                return
            if not events:
                await written.wait()

    async def events(self, job_id: str, after: int = 0) -> Events:
        """The events of a job that there are now; the last one of a job that failed says why.

        Args:
            after: the last sequence number that is known.
        """
        events = await self.call(self._store.events, job_id, after)
        if events and events[-1][1].get("state") in TERMINAL:
            entry = await self.call(self._store.get, job_id)
            if entry and entry.error:
                events[-1][1]["$error"] = entry.error
        return events

    def note(self, job_id: str, event: dict[str, Any]) -> None:
        """Have an event of a job that runs written, soon."""
        self._unwritten[job_id].append(event)

    def forget(self, job_id: str) -> None:
        """Drop events that were not written: the job is over."""
        self._unwritten.pop(job_id, None)

    def tell(self, job_id: str) -> None:
        """Wake those who follow a job."""
        if written := self._written.pop(job_id, None):
            written.set()

    async def write_events(self) -> None:
        """Write what is noted, for ever."""
        while True:
            await asyncio.sleep(_FLUSH)
            if not self._unwritten:
                continue
            events = dict(self._unwritten)
            self._unwritten.clear()
            try:
                await self.call(self._store.append, events)
            except sqlite3.Error:
                log.exception("events cannot be written")
            for job_id in events:
                self.tell(job_id)

    async def give_back(self, job_id: str, *, counts: bool) -> bool:
        """Let a job that runs wait again, however often that takes to write; see ``Store.give_back``."""
        events = [*self._unwritten.pop(job_id, []), state_event(JobState.IN_QUEUE)]
        while True:
            try:
                changed = await self.call(lambda: self._store.give_back(job_id, events, counts=counts))
            except sqlite3.Error:  # nobody else knows of it: it would run for ever
                log.exception("that job %s waits again cannot be written", job_id)
                await asyncio.sleep(_PAUSE)
            else:
                self.tell(job_id)
                return changed

    async def end(self, job_id: str, outcome: GenerationResult | ApiError) -> JobState | None:
        """Write how a job ended, however often that takes: it is over when that is written.

        Returns:
            The state before; None where it was over already, or is not known.
        """
        events = self._unwritten.pop(job_id, [])
        while True:
            try:
                return await self._end(job_id, outcome, events)
            except (sqlite3.Error, OSError) as fault:
                log.exception("how job %s ended cannot be written", job_id)
                if isinstance(outcome, GenerationResult):
                    outcome = ApiError("DISK_FULL", f"The images could not be stored in STATE_DIR: {fault}.")
                await asyncio.sleep(_PAUSE)

    async def _end(
        self, job_id: str, outcome: GenerationResult | ApiError, events: list[dict[str, Any]]
    ) -> JobState | None:
        now, ttl, state = time.time(), self._result_ttl, JobState.COMPLETED
        if isinstance(outcome, ApiError):
            error, state = outcome.body(), _STATES.get(outcome.code, JobState.FAILED)
            events = [*events, state_event(state, code=outcome.code)]
            before = await self.call(lambda: self._store.fail(job_id, state, error, events, now=now, ttl=ttl))
        else:
            result, events = outcome, [*events, state_event(state)]
            before = await self.call(lambda: self._store.complete(job_id, result, events, now=now, ttl=ttl))
        if before is not None:
            self.watch.later_over(job_id, state.value, outcome)
        self._tell_end(job_id)
        return before

    async def purge(self, endpoint: str, owner: str, error: ApiError) -> int:
        """Cancel what waits at an endpoint; see ``EndpointStore.purge``.

        Returns:
            How many jobs waited.
        """
        now, ttl = time.time(), self._result_ttl
        events = [state_event(JobState.CANCELLED, code=error.code)]
        body = error.body()
        ended = await self.call(lambda: self._store.purge(endpoint, owner, body, events, now=now, ttl=ttl))
        for job_id in ended:
            self.watch.later_over(job_id, JobState.CANCELLED.value, error)
            self._tell_end(job_id)
        return len(ended)

    async def retry(self, job_id: str, ttl: float) -> bool:
        """Let a job wait once more; see ``EndpointStore.retry``.

        Args:
            ttl: seconds that it may wait.
        """
        events = [state_event(JobState.IN_QUEUE)]
        waits = await self.call(lambda: self._store.retry(job_id, events, now=time.time(), ttl=ttl))
        self.tell(job_id)
        return waits

    def _tell_end(self, job_id: str) -> None:
        self.tell(job_id)
        if ended := self._ended.pop(job_id, None):
            ended.set()
        self.on_end(job_id)

    def _no_such_job(self, job_id: str) -> ApiError:
        message = (
            f"There is no such job. Results are removed {self._result_ttl:g} s after the job is over (RESULT_TTL), "
            "those of runsync after a minute."
        )
        return ApiError("NO_SUCH_JOB", message, requested=job_id)
