"""The sender of webhooks: kept until they have arrived or are given up, in order for each job, signed.

Events are handed over without waiting, written by one thread a moment later, several at once, and sent from then on. A
restart goes on with what had not arrived. How often and in which order is in ``webhooks_lines``, what is on the disk in
``webhooks_outbox``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import sqlite3
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from api.errors import ApiError
from api.service.watch import Watch
from api.service.webhooks_delivery import Delivery, Outcome
from api.service.webhooks_hook import Hook
from api.service.webhooks_lines import Lines, Waiting
from api.service.webhooks_outbox import Entry, New, Outbox
from api.service.webhooks_signing import check_key, headers
from api.settings import Settings, SettingsError

log = logging.getLogger("api.webhooks")

_AT_ONCE = 256
"""Webhooks on their way at once, to all receivers."""
_MOST = 10_000
"""Webhooks that may wait for one receiver; the next ones are given up at once."""
_PAUSE = 1.0
"""Seconds before what could not be written is tried again."""
_LAST_WORDS = 3.0
"""Seconds in which what is due is still sent when the server stops."""
_SWEEP = 30.0
_T = TypeVar("_T")
Send = Callable[[str, bytes, list[tuple[str, str]]], Coroutine[Any, Any, Outcome]]


class _Unwritten:
    def __init__(self, new: New, *, durable: bool) -> None:
        self.new, self.durable = new, durable
        self.stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Webhooks:
    """Sends webhooks.

    Args:
        settings: SEND_URL, SIGN_KEY, CONTAINER_ID, how often and how long it is tried; where they are kept.
        send: sends one once; a ``Delivery`` unless told.
        clock: seconds since the epoch.
        draw: a number between two.

    Raises:
        SettingsError: SIGN_KEY cannot be used.

    Attributes:
        watch: told of each time that one was sent.
    """

    def __init__(
        self,
        settings: Settings,
        send: Send | None = None,
        clock: Callable[[], float] = time.time,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> None:
        if settings.sign_key:
            try:
                check_key(settings.sign_key)
            except ValueError as fault:
                raise SettingsError(f"SIGN_KEY: {fault}") from None
        self._settings = settings
        self._clock = clock
        self._send = send
        self._delivery: Delivery | None = None
        self._outbox = Outbox(settings.state_dir / "webhooks", persist=settings.persist_inputs)
        self._lines = Lines(draw)
        self._thread = ThreadPoolExecutor(1, "webhooks")
        self._unwritten: list[_Unwritten] = []
        self._writing = 0
        self._to_write = asyncio.Event()
        self._wake = asyncio.Event()
        self._sending: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False
        self._over = {"failed": 0, "delivered": 0}
        self.watch = Watch()

    def open(self) -> None:
        """Take STATE_DIR/webhooks for this process.

        Raises:
            SettingsError: it cannot be used, or another server uses it.
        """
        self._outbox.open()

    def start(self) -> None:
        """Begin, with what an earlier process left."""
        self.open()
        if self._send is None:
            self._send = self._delivery = Delivery(self._settings)
        begin = asyncio.get_running_loop().create_task
        self._tasks = [begin(self._run())]

    async def stop(self) -> None:
        """Send what is due now, for a moment; the rest waits for the next start. Does nothing the second time."""
        if self._stopped:
            return
        self._stopped = True
        until = time.monotonic() + _LAST_WORDS
        while self._tasks and time.monotonic() < until:
            opens = self._lines.opens()
            if not (self._unwritten or self._writing or self._sending or (opens and opens <= self._clock())):
                break
            await asyncio.sleep(0.02)
        running = [*self._tasks, *self._sending]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for unwritten in self._unwritten:
            unwritten.stored.cancel()
        if self._delivery is not None:
            await self._delivery.close()
        left = sum(1 for _ in self._lines)
        if left:
            log.info("%d webhooks wait for the next start", left)
        await asyncio.get_running_loop().run_in_executor(self._thread, self._outbox.close)
        self._thread.shutdown()

    def hook(
        self, call_inputs: dict[str, Any], *, job: str = "", owner: str = "", payload: dict[str, Any] | None = None
    ) -> Hook | None:
        """What the native events of one request are told to; None where nobody wants them.

        Args:
            call_inputs: the wire's; ``Admission`` checks them, and nothing is told before that.
            job: its id, where it is a job for later.
            owner: name of the API key that it came with.
            payload: what each of them carries; the client's own id, and that of the job, unless told.
        """
        url = call_inputs.get("SEND_URL") or self._settings.send_url
        key = call_inputs.get("SIGN_KEY") or self._settings.sign_key
        named = call_inputs.get("startRequestId")
        if not (isinstance(url, str) and isinstance(key, str) and url):
            return None
        if payload is None:
            payload = {"startRequestId": named if isinstance(named, str) else None, **({"jobId": job} if job else {})}
        if not job:
            job = secrets.token_hex(8)
            self.watch.hooked(job)
        return Hook(self, url, key, payload, job, owner, self._settings.container_id)

    async def post(self, url: str, body: bytes, *, job: str, kind: str, sign_key: str = "", owner: str = "") -> None:
        """Send a body, once those of the same job to the same receiver that came before have arrived.

        Args:
            url: the receiver.
            body: JSON.
            job: whose it is.
            kind: ``native`` or ``runpod``.
            sign_key: what it is signed with; empty: SIGN_KEY of the server.
            owner: name of the API key that the job came with.

        Returns:
            When it is safely stored.
        """
        await asyncio.shield(self.put(url, body, job=job, kind=kind, sign_key=sign_key, owner=owner))

    def put(
        self, url: str, body: bytes, *, job: str, kind: str, sign_key: str, owner: str, durable: bool = True
    ) -> asyncio.Future[None]:
        """As ``post``, without waiting.

        Args:
            durable: it survives a power cut as well.

        Returns:
            Done when it is stored.
        """
        key = "" if sign_key == self._settings.sign_key else sign_key  # a key of the server's is not written down
        new = New("msg_" + secrets.token_hex(12), kind, job, url, owner, body, key, self._clock())
        unwritten = _Unwritten(new, durable=durable)
        self._unwritten.append(unwritten)
        self._to_write.set()
        return unwritten.stored

    def counts(self) -> dict[str, int]:
        """How many wait (``pending``), or since the start were given up (``failed``) or arrived (``delivered``)."""
        return {"pending": len(self._unwritten) + self._writing + self._lines.total(), **self._over}

    def behind(self, url: str, job: str) -> int:
        """How many of a job's webhooks wait."""
        return self._lines.behind(url, job) + sum(1 for one in self._unwritten if one.new.job == job)

    def waiting(self, url: str) -> int:
        """How many wait for a receiver, of all jobs."""
        return self._lines.waiting(url)

    async def listed(self, state: str | None, owner: str | None, limit: int) -> list[Entry]:
        """Those that have not arrived, newest first; see ``Outbox.newest``.

        Args:
            state: ``waiting``, ``failed``, or None: both.
            owner: name of the API key that asks, which sees its own; None: everybody's, and those of the server.
            limit: how many, at most.
        """
        return await self._call(self._outbox.newest, state, owner, limit)

    async def redeliver(self, webhook_id: str, owner: str | None) -> Entry:
        """Send one again that was given up, or now that waits.

        Args:
            webhook_id: as the receiver is told it.
            owner: name of the API key that asks; None: whosever it is.

        Raises:
            ApiError: NO_SUCH_WEBHOOK.
        """
        entry = await self._call(self._outbox.get, webhook_id)
        if entry is None or owner not in (None, entry.owner):
            message = (
                "There is no such webhook: it has arrived, or was given up long ago. GET /webhooks lists the others."
            )
            raise ApiError("NO_SUCH_WEBHOOK", message, requested=webhook_id)
        now = self._clock()
        if again := await self._call(self._outbox.send_again, webhook_id, now):
            self._lines.add(again)
        else:
            self._lines.hurry(webhook_id, now)
        self._wake.set()
        found = await self._call(self._outbox.get, webhook_id)
        return found or entry._replace(due=now, given_up=None)  # it may have arrived meanwhile

    async def _call(self, call: Callable[..., _T], *arguments: Any) -> _T:
        """Call a method of the outbox in its thread, in the order of the calls; what was asked for is done."""
        try:
            work = asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)
        except RuntimeError:
            raise ApiError("NOT_READY", "The server is shutting down.") from None
        return await asyncio.shield(work)

    async def _run(self) -> None:
        for waiting in await self._left():
            self._lines.add(waiting)
        try:
            async with asyncio.TaskGroup() as group:  # only now: what is written is not to be read as well
                for work in (self._write_all(), self._send_all(), self._sweep()):
                    group.create_task(work)
        except Exception:
            log.exception("no webhooks are sent any more, until the next start")
            raise

    async def _write_all(self) -> None:
        while True:
            await self._to_write.wait()
            self._to_write.clear()
            batch, self._unwritten = self._unwritten, []
            self._writing = len(batch)
            new = [self._bounded(one.new) for one in batch]
            numbers = await self._write(new, durable=any(one.durable for one in batch))
            for one, number in zip(new, numbers, strict=True):
                if not one.refused:
                    self._lines.add(_waiting(one, number))
            for unwritten in batch:
                if not unwritten.stored.done():
                    unwritten.stored.set_result(None)
            self._writing = 0
            self._wake.set()

    async def _write(self, new: list[New], *, durable: bool) -> list[int]:
        while True:
            try:
                return await self._call(partial(self._outbox.add, new, durable=durable))
            except sqlite3.Error:
                log.exception("%d webhooks cannot be written", len(new))
                await asyncio.sleep(_PAUSE)

    def _bounded(self, new: New) -> New:
        if self._lines.waiting(new.url) < _MOST:
            return new
        log.warning("a webhook of %s was given up: %d wait for %s", new.job, _MOST, _host(new.url))
        self._over["failed"] += 1
        return new._replace(refused=f"{_MOST} others wait for this receiver")

    async def _send_all(self) -> None:
        while True:
            self._wake.clear()
            while len(self._sending) < _AT_ONCE and (event := self._lines.take(self._clock())):
                task = asyncio.get_running_loop().create_task(self._one(event))
                self._sending.add(task)
                task.add_done_callback(self._sent)
            opens = self._lines.opens() if len(self._sending) < _AT_ONCE else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if opens is None else max(0.001, opens - self._clock())):
                    await self._wake.wait()

    async def _left(self) -> list[Waiting]:
        """What an earlier process left."""
        try:
            found = await self._call(self._outbox.waiting)
        except sqlite3.Error:
            log.exception("the webhooks that an earlier process left cannot be read")
            return []
        if found:
            log.info("%d webhooks wait from before", len(found))
        return found

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        self._wake.set()
        if not task.cancelled() and (fault := task.exception()):
            log.error("unexpected", exc_info=fault)

    async def _one(self, event: Waiting) -> None:
        """Send one once, and note what became of it."""
        began = time.perf_counter()
        outcome = await self._try(event)
        arrived, took = not outcome.error, time.perf_counter() - began
        self.watch.webhook(event.job, took, arrived=arrived, attempt=event.tries + 1)
        now = self._clock()
        if arrived:
            self._over["delivered"] += 1
            # written ahead of the next one of its line: else a start might send this one again after that
            await self._note(self._outbox.arrived, event.number)
            self._lines.arrived(event, now)
            return
        event.tries += 1
        if outcome.final or event.tries >= self._settings.webhook_tries:
            await self._give_up([event], outcome.error, now)
            self._lines.given_up(event, now, is_down=outcome.is_down)
            return
        self._lines.failed(event, now, outcome.at_least, is_down=outcome.is_down)
        log.debug("webhook %s to %s: %s", event.id, _host(event.url), outcome.error)
        await self._note(self._outbox.failed, event, outcome.error)

    async def _try(self, event: Waiting) -> Outcome:
        assert self._send is not None
        try:
            body, key = await self._call(self._outbox.body, event.number)
            signed = headers(event.id, body, key or self._settings.sign_key, self._clock())
            return await self._send(event.url, body, signed)
        except sqlite3.Error as fault:
            log.exception("webhook %s cannot be read", event.id)
            return Outcome(f"it could not be read: {fault}")
        except Exception as fault:
            log.exception("webhook %s cannot be sent", event.id)
            return Outcome(f"unexpected: {type(fault).__name__}")

    async def _give_up(self, events: list[Waiting], error: str, now: float) -> None:
        self._over["failed"] += len(events)
        for event in events:
            told = (event.id, _host(event.url), event.tries, error)
            log.warning("webhook %s to %s was given up after %d tries: %s", *told)
        await self._note(self._outbox.give_up, events, error, now)

    async def _note(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            await self._call(call, *arguments)
        except sqlite3.Error:  # a start might send it once more
            log.exception("what became of a webhook cannot be written")

    async def _sweep(self) -> None:
        while True:
            now = self._clock()
            if old := self._lines.older(now - self._settings.webhook_ttl):
                await self._give_up(
                    old, f"it did not arrive within WEBHOOK_TTL of {self._settings.webhook_ttl:g} s", now
                )
            await self._note(self._outbox.remove_old, now)
            await asyncio.sleep(_SWEEP)


def _waiting(new: New, number: int) -> Waiting:
    return Waiting(number=number, id=new.id, url=new.url, job=new.job, created=new.created, due=new.created)


def _host(url: str) -> str:
    """What may be logged of an address."""
    return urlsplit(url).netloc.rpartition("@")[2]
