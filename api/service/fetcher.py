"""Brings models here when requests name them: one fetch per model, however many wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec

from api.errors import ApiError
from api.models.adapters import FIELDS
from api.models.description import InstalledModel, describe
from api.models.installer import Installed, Installer
from api.models.library import BUNDLED_ORG, InstalledAdapter, Library
from api.models.refs import SourceRef
from api.schema.transfers import Transfer
from api.service.model_uploads import ModelUploads
from api.service.progress import Tracker
from api.service.threads import in_thread, soon
from api.service.watch import Watch
from api.settings import Settings

log = logging.getLogger("api.fetch")

AT_ONCE = 8
"""Models that are fetched side by side; the next ones wait. As many again from addresses that requests chose: a server
of a stranger that sends nothing holds up no other kind of source."""
_TICK = 0.2
_PATIENCE = 5.0
"""Seconds that a source has to say how large a model is."""
_LINGER = 0.25
"""Seconds for which an admitted request's model is held until its job is in line."""

Check = Callable[[InstalledModel], Awaitable[object]]
OnTransfer = Callable[[Transfer], None]


class Fetched(msgspec.Struct, frozen=True):
    """A model that is here, and what it took to get it: milliseconds by phase."""

    model: InstalledModel
    timings: dict[str, int]


class FetchedAdapter(msgspec.Struct, frozen=True):
    """An adapter that is here, and what it took to get it: milliseconds by phase."""

    adapter: InstalledAdapter
    timings: dict[str, int]


class _Stopped(Exception):
    """Nobody wants it any more."""


class _Fetch:
    """One model on its way, and those who wait for it. Lives on the event loop; works in a thread of its own."""

    def __init__(self, ref: SourceRef) -> None:
        self.loop = loop = asyncio.get_running_loop()
        self.ref = ref
        self.readers: list[OnTransfer] = []
        self.waiting = 0
        self.confirmed = threading.Event()
        self.stopped = threading.Event()
        self.described: asyncio.Future[InstalledModel] = loop.create_future()
        self.outcome: asyncio.Future[Any] = loop.create_future()
        self.left: asyncio.Future[None] = loop.create_future()
        self.outcome.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.tracker = Tracker(ref.model_id, lambda event: soon(loop, self._pass_on, event))

    def _pass_on(self, event: Transfer) -> None:
        for reader in list(self.readers):
            reader(event)

    def report(self, phase: str, done: int, total: int | None) -> None:
        self.check()
        self.tracker.report(phase, done, total)

    def check(self) -> None:
        if self.stopped.is_set():
            raise _Stopped

    def confirm(self) -> None:
        """From the thread: wait until somebody who has seen the configuration still wants the weights."""
        while not self.confirmed.wait(_TICK):
            self.check()

    def leave(self, on_event: OnTransfer | None) -> None:
        self.waiting -= 1
        if on_event is not None:
            self.readers.remove(on_event)
        if not self.waiting and not self.confirmed.is_set():
            self.stop()

    def stop(self) -> None:
        """Nobody wants it, or nobody may have it any more."""
        self.stopped.set()
        if not self.left.done():
            self.left.set_result(None)


class Fetcher:
    """Fetches and uploads models, in threads.

    A fetch that a valid request began goes on when its client goes away: proxies cut connections that are
    idle for long, and the same request, sent again, finds the model.

    Args:
        settings: whether there are downloads, and the keys for them.
        library: what is here, and the volume that models are put on.
        in_use: names of the folders that jobs work with.

    Attributes:
        watch: told of what is fetched.
    """

    def __init__(self, settings: Settings, library: Library, in_use: Callable[[], set[str]]) -> None:
        self._settings = settings
        self._library = library
        self._in_use = in_use
        self._held: Counter[str] = Counter()
        self._installer = Installer(settings, library.volume, self._leased, library.folder_of)
        self._fetches: dict[str, _Fetch] = {}
        self._uploads = ModelUploads(settings, self._held)
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(AT_ONCE)
        self._room_for_strangers = asyncio.Semaphore(AT_ONCE)
        self._asking = asyncio.Semaphore(AT_ONCE)
        self._asking_strangers = asyncio.Semaphore(AT_ONCE)
        self._stopping = False
        self.watch = Watch()

    async def ensure(self, ref: SourceRef, check: Check | None = None, on_event: OnTransfer | None = None) -> Fetched:
        """Wait until a model is here.

        Args:
            ref: which model.
            check: awaited with its configuration, before its weights are fetched where the source allows that;
                raises what is wrong with the request.
            on_event: called with what happens meanwhile.

        Raises:
            ApiError: what ``check`` raises; MODEL_MISMATCH when there are no downloads; what the source says.
        """
        if self.is_local(ref):
            return Fetched(await asyncio.to_thread(self._without_source, ref), {})
        fetched: Fetched = await self._fetched(ref, check, on_event)
        return fetched

    async def ensure_adapter(self, ref: SourceRef, on_event: OnTransfer | None = None) -> FetchedAdapter:
        """Wait until a LoRA or a textual inversion is here.

        Args:
            ref: of an adapter.
            on_event: called with what happens meanwhile.

        Raises:
            ApiError: MODEL_MISMATCH when there are no downloads; what the source says.
        """
        if found := await asyncio.to_thread(self._library.find_adapter, ref):
            return FetchedAdapter(found, {})
        if not self._settings.runtime_downloads:
            message = f'"{ref.model_id}" is not here, and this server downloads nothing (RUNTIME_DOWNLOADS=0).'
            raise ApiError("MODEL_MISMATCH", message, field=FIELDS[ref.adapter], requested=ref.model_id)
        fetched: FetchedAdapter = await self._fetched(ref, None, on_event)
        return fetched

    async def _fetched(self, ref: SourceRef, check: Check | None, on_event: OnTransfer | None) -> Any:
        fetch = self._fetches.get(ref.name)
        while fetch is not None and fetch.stopped.is_set():
            await asyncio.wait({fetch.outcome})
            fetch = self._fetches.get(ref.name)
        if fetch is None:
            fetch = self._fetches[ref.name] = _Fetch(ref)
            self.watch.fetching(fetch.readers, fetch.outcome)
            self._begin(self._run(fetch))
        fetch.waiting += 1
        if on_event is not None:
            for transfer in fetch.tracker.now():  # whoever joins has missed the start
                on_event(msgspec.structs.replace(transfer, status="start"))
            fetch.readers.append(on_event)
        try:
            awaited: set[asyncio.Future[Any]] = {fetch.described, fetch.outcome}
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            if fetch.described.done() and check is not None:
                await check(fetch.described.result())
            fetch.confirmed.set()
            return await asyncio.shield(fetch.outcome)
        finally:
            fetch.leave(on_event)

    async def size(self, ref: SourceRef) -> int | None:
        """Bytes that ``ensure`` would fetch, or None where the source does not say; nothing is fetched.

        Raises:
            ApiError: what the source says; TIMED_OUT: it takes longer than a few seconds to say anything.
        """
        room = self._asking if _is_ours(ref) else self._asking_strangers
        try:
            async with asyncio.timeout(_PATIENCE):
                await room.acquire()
                work = asyncio.ensure_future(in_thread(lambda: self._size(ref), f"size of {ref.model_id}"))
                # a source that does not answer keeps its thread for a while: there are only so many of them
                work.add_done_callback(lambda done: room.release())
                work.add_done_callback(lambda done: done.cancelled() or done.exception())
                return await asyncio.shield(work)
        except TimeoutError:
            message = f'The source of "{ref.model_id}" did not say within {_PATIENCE:g} s how large it is.'
            raise ApiError("TIMED_OUT", message) from None

    def is_local(self, ref: SourceRef) -> bool:
        """Whether a model is here or nowhere: it is not looked for on the network."""
        return not self._settings.runtime_downloads or (ref.is_plain and ref.repo.startswith(f"{BUNDLED_ORG}/"))

    @contextlib.contextmanager
    def hold(self, *folders: Path) -> Iterator[None]:
        """Keep models and adapters on the volume, and a moment longer: until the job is in line that holds them."""
        names = [folder.name for folder in folders]
        self._held.update(names)
        try:
            yield
        finally:
            asyncio.get_running_loop().call_later(_LINGER, self._held.subtract, names)

    @property
    def fetching(self) -> int:
        """How many models and adapters are being fetched now."""
        return len(self._fetches)

    def transfers(self) -> list[Transfer]:
        """Everything that is on its way now."""
        return [*(event for fetch in self._fetches.values() for event in fetch.tracker.now()), *self._uploads.now()]

    def upload_after_use(self, folder: Path, on_event: OnTransfer | None = None) -> None:
        """Begin the upload that was asked for with MODEL_URL, now that an image was returned.

        Args:
            folder: the model.
            on_event: called with what happens.
        """
        if not self._stopping and (work := self._uploads.due(folder, on_event)):
            self._begin(work)

    async def stop(self) -> None:
        """End what runs; it goes on where it was when it is asked for again."""
        self._stopping = True
        self._uploads.stop()
        fetches = list(self._fetches.values())
        for fetch in fetches:
            fetch.stopped.set()
        running = [fetch.outcome for fetch in fetches]
        if running:
            await asyncio.wait(running, timeout=2)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._tasks.discard)

    def _without_source(self, ref: SourceRef) -> InstalledModel:
        if self._installer.adopt(ref, lambda phase, done, total: None) and (model := self._library.find(ref)):
            return model
        if model := self._library.find_by_name(ref):
            return model
        there = [m.revision for m in self._library.all() if m.model_id == ref.model_id]
        if ref.revision and there:
            message = f'"{ref.model_id}" is here in another revision.'
            raise ApiError(
                "MODEL_NOT_FOUND", message, field="callInputs.MODEL_REVISION", requested=ref.revision, available=there
            )
        code, why = "MODEL_NOT_FOUND", "is not one of the models that come with this server"
        if not self._settings.runtime_downloads:
            code, why = "MODEL_MISMATCH", "is not here, and this server downloads nothing (RUNTIME_DOWNLOADS=0)"
        message = f'"{ref.model_id}" {why}.'
        requested, available = ref.model_id, self._library.names()
        raise ApiError(code, message, field="callInputs.MODEL_ID", requested=requested, available=available)

    async def _run(self, fetch: _Fetch) -> None:
        try:
            async with self._room if _is_ours(fetch.ref) else self._room_for_strangers:
                work = asyncio.ensure_future(in_thread(lambda: self._fetch(fetch), f"fetch {fetch.ref.model_id}"))
                # a source that does not answer keeps its thread for a while, but not its place
                await asyncio.wait({work, fetch.left}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    work.add_done_callback(lambda done: done.cancelled() or done.exception())
                    raise _Stopped
            fetch.outcome.set_result(work.result())
        except _Stopped:
            error = ApiError("CANCELLED", "Nobody waits for this model any more.")
            if self._stopping:
                error = ApiError("NOT_READY", "The server is shutting down; send the request again.")
            fetch.outcome.set_exception(error)
        except BaseException as fault:
            fetch.outcome.set_exception(fault)
            if not isinstance(fault, ApiError):
                log.exception("fetching %s failed", fetch.ref.model_id)
        finally:
            del self._fetches[fetch.ref.name]

    def _fetch(self, fetch: _Fetch) -> Fetched | FetchedAdapter:
        """In a thread."""

        def on_configuration(folder: Path | None) -> None:
            if folder is None:
                # nothing more can be said before it is here; from now on it is fetched, whoever leaves
                fetch.check()
                fetch.confirmed.set()
            else:
                soon(fetch.loop, fetch.described.set_result, _described(fetch.ref, folder))
                fetch.confirm()

        fetch.check()
        log.info("fetching %s", fetch.ref.model_id)
        try:
            installed = self._installer.install(
                fetch.ref, fetch.report, on_configuration=on_configuration, on_wait=fetch.check
            )
        except ApiError as error:
            model = self._library.find_by_name(fetch.ref) if error.code in _NO_SOURCE else None
            if model is None:
                log.warning("%s was not fetched: %s %s", fetch.ref.model_id, error.code, error.message)
                raise
            return Fetched(model, {})
        fetch.tracker.end()
        return self._arrived(fetch, installed)

    def _size(self, ref: SourceRef) -> int | None:
        """In a thread."""
        try:
            return self._installer.size(ref)
        except ApiError as error:
            if error.code in _NO_SOURCE and self._library.find_by_name(ref) is not None:
                return 0
            raise

    def _arrived(self, fetch: _Fetch, installed: Installed) -> Fetched | FetchedAdapter:
        adapter = self._library.find_adapter(fetch.ref) if fetch.ref.adapter else None
        if adapter is not None:
            return FetchedAdapter(adapter, fetch.tracker.timings)
        model = None if fetch.ref.adapter else self._library.find(fetch.ref)
        if model is None:
            message = f'"{fetch.ref.model_id}" was installed and removed again before it could be used; try again.'
            raise ApiError("MODEL_NOT_FOUND", message, requested=fetch.ref.model_id)
        if installed.upload_to is not None:
            self._uploads.ask(model.folder, installed.upload_to)
        return Fetched(model, fetch.tracker.timings)

    def _leased(self) -> set[str]:
        return self._in_use() | {name for name, count in list(self._held.items()) if count > 0}


_NO_SOURCE = ("MODEL_NOT_FOUND", "SOURCE_UNREACHABLE")


def _described(ref: SourceRef, folder: Path) -> InstalledModel:
    return describe(ref.model_id, folder, revision="-", part=ref.part)


def _is_ours(ref: SourceRef) -> bool:
    """Whether it comes from the operator's hub or an address of the operator's, not from one that a request chose."""
    return ref.trusted or ref.is_plain
