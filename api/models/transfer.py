"""Downloads over HTTP(S): several ranges at once, resumed where they were cut, verified at the end.

Worker threads receive into buffers of 1 MiB, write them in place and have the kernel send them on to the
disk; the calling thread follows them with the hashes and reports progress; one more saves what is done. So
receiving, hashing and writing to the disk overlap, and the whole takes as long as the slowest of them.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from api.errors import ApiError
from api.models.disk import disk_fault
from api.models.http_client import Connection, EndOfBody, Policy, StaleContent, TransientFault, Wanted
from api.models.manifest import OnProgress
from api.models.partial_file import Fetched, PartialFile, Piece, StaleFile

_BUFFER = 2**20  # of a connection
_BLOCK = 4 * 2**20  # hashed between two looks around
_FIRST = 1  # connection, joined by others while each brings less than:
_FAST = 5e8  # bytes a second; a server or network that limits each connection stays below
_LOOK = 0.1  # seconds over which that is measured
_MAX_CUTS = 1000  # of one piece, progress or not
_RESTARTS = 3  # of a whole transfer whose content changed under it


def download(
    url: str,
    path: Path,
    *,
    size: int | None = None,
    etag: str | None = None,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    parts: int = 16,
    on_progress: OnProgress | None = None,
    policy: Policy | None = None,
    digest: bool = True,
) -> Fetched:
    """Download one file; see ``download_many``. ``parts`` is the most connections at once."""
    wanted = Wanted(url, path.name, size, etag, sha256, headers or {})
    many = download_many(
        [wanted], path.parent, connections=parts, on_progress=on_progress, policy=policy, digest=digest
    )
    return many[0]


def download_many(
    files: Sequence[Wanted],
    folder: Path,
    *,
    connections: int = 16,
    on_progress: OnProgress | None = None,
    policy: Policy | None = None,
    digest: bool = True,
) -> tuple[Fetched, ...]:
    """Download files at once over a bounded number of connections.

    A file grows as ``<name>.part`` beside ``<name>.part.json`` (which ranges are on the disk, of which
    ETag and size) and takes its name when all are whole. Killed or failed, the next call goes on from
    there, if the ETag is strong and still the same, or the sha256 is known; else it starts afresh.

    Args:
        files: what and where to.
        folder: missing folders are made.
        connections: at most, over all files; fewer where few bring enough.
        on_progress: called from this thread with ``download``; what it raises ends the transfer.
        policy: time-outs and retries.
        digest: compute the sha256 even where there is nothing to compare it with.

    Raises:
        ApiError: SOURCE_UNREACHABLE, SOURCE_DENIED, MODEL_NOT_FOUND, MODEL_CORRUPT, DISK_FULL, URL_NOT_ALLOWED.
        ValueError: a path that leaves the folder.
    """
    for wanted in files:
        if PurePosixPath(wanted.path).is_absolute() or {"..", ""} & set(wanted.path.split("/")):
            raise ValueError(f"{wanted.path!r} is not below the folder")
    policy = policy or Policy()
    for attempt in range(max(_RESTARTS, policy.attempts)):
        transfer = _Transfer(files, folder, connections, on_progress, policy, digest)
        try:
            return transfer.run()
        except StaleContent as restart:
            error = restart.error
            time.sleep(min(policy.max_wait, policy.backoff * 2**attempt))
    raise error


class _Transfer:
    """One attempt at all files: worker threads with a connection each, and the calling thread."""

    def __init__(
        self,
        files: Sequence[Wanted],
        folder: Path,
        connections: int,
        on_progress: OnProgress | None,
        policy: Policy,
        digest: bool,
    ) -> None:
        self._policy, self._stop = policy, threading.Event()
        self._files = [PartialFile(wanted, folder, policy, self._stop, digest) for wanted in files]
        self._on_progress = on_progress or (lambda phase, done, total: None)
        self._jobs: deque[tuple[PartialFile, Piece | None]] = deque((file, None) for file in self._files)
        self._connections = [Connection(policy) for _ in range(connections)]
        self._changed = threading.Condition()
        self._busy = 0
        self._fault: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._saver = threading.Thread(target=self._save, daemon=True)
        self._looked = (0.0, 0)

    def run(self) -> tuple[Fetched, ...]:
        try:
            for file in self._files:
                file.open()
            self._saver.start()
            self._connect(_FIRST)
            self._looked = time.monotonic(), sum(file.done for file in self._files)
            self._follow()
            self._end()
            return tuple(file.keep() for file in self._files)
        except BaseException as fault:
            if isinstance(fault, OSError):
                fault = disk_fault(fault, self._files[0].path.parent)
            self._end()
            self._leave(fault)
            raise fault from None
        finally:
            if self._end():  # else a thread may still write: better a descriptor lost than another file hit
                for file in self._files:
                    if file.fd >= 0:
                        os.close(file.fd)

    def _follow(self) -> None:
        """Hash, verify and report, until all files are whole."""
        buffer = memoryview(bytearray(_BLOCK))
        while not all(file.whole for file in self._files):
            busy = False
            for file in self._files:
                if file.begun and not file.whole:
                    busy |= file.advance(buffer)
                    if file.complete:
                        file.verify()
                        if len(self._files) > 1:
                            file.save()
            sizes = [file.source.size if file.begun else file.source.wanted.size for file in self._files]
            total = None if None in sizes else sum(size or 0 for size in sizes)
            done = sum(file.done for file in self._files)
            self._on_progress("download", done, total)
            self._look(done)
            with self._changed:
                if self._fault is not None:
                    raise self._fault
                if not busy:
                    self._changed.wait(0.05)

    def _connect(self, count: int) -> None:
        """Open more connections, so that there are ``count`` of them or as many as are allowed."""
        for connection in self._connections[len(self._threads) : count]:
            self._threads.append(threading.Thread(target=self._work, args=(connection,), daemon=True))
            self._threads[-1].start()

    def _look(self, done: int) -> None:
        """Four times as many connections where there is work for them and those there are do not bring enough."""
        since, before = self._looked
        if (now := time.monotonic()) < since + _LOOK:
            return
        self._looked = now, done
        if self._jobs and done - before < _FAST * (now - since) * len(self._threads):
            self._connect(4 * len(self._threads))

    def _save(self) -> None:
        """In a thread of its own, as it waits for the disk."""
        try:
            while not self._stop.wait(self._policy.save_every):
                for file in self._files:
                    if file.begun and not file.whole:
                        file.save()
        except BaseException as fault:
            self._tell(fault)

    def _tell(self, fault: BaseException) -> None:
        """Hand a thread's fault to the calling thread."""
        with self._changed:
            self._fault = self._fault or fault
            self._changed.notify_all()

    def _work(self, connection: Connection) -> None:
        connection.buffer = memoryview(bytearray(_BUFFER))
        try:
            while (job := self._take()) is not None:
                try:
                    self._fetch(*job, connection)
                finally:
                    with self._changed:
                        self._busy -= 1
                        self._changed.notify_all()
        except BaseException as fault:
            self._tell(fault)
        finally:
            connection.close()

    def _take(self) -> tuple[PartialFile, Piece | None] | None:
        with self._changed:
            while not self._stop.is_set() and self._fault is None:
                if self._jobs:
                    self._busy += 1
                    return self._jobs.popleft()
                if not self._busy:
                    return None
                self._changed.wait(1)
        return None

    def _fetch(self, file: PartialFile, piece: Piece | None, connection: Connection) -> None:
        """Fetch a piece, or find out what a file is and fetch its first, however often it is cut."""
        failures = 0
        for _ in range(_MAX_CUTS):
            before = piece.at if piece else 0
            try:
                piece = piece or self._begin(file, connection)
                if piece.at != piece.end:
                    response = file.source.body(connection, piece.at, piece.end)
                    self._receive(file, piece, connection, response)
                return
            except StaleContent as restart:
                raise StaleFile(restart.error, file) from None
            except TransientFault as cut:
                connection.close()
                failures = 0 if piece and piece.at > before else failures + 1
                why = cut
            if self._stop.is_set():
                return
            if failures >= self._policy.attempts:
                break
            file.source.pause(failures, why.wait)
        raise file.source.error("SOURCE_UNREACHABLE", f"{why}, again and again")

    def _begin(self, file: PartialFile, connection: Connection) -> Piece:
        """Ask for the first missing range and read it; the others become jobs."""
        start, end = file.first_range()
        response = file.source.body(connection, start, end)
        file.begin(response)
        missing = [piece for piece in file.pieces if piece.at != piece.end]
        with self._changed:
            self._jobs.extendleft((file, piece) for piece in reversed(missing[1:]))
            self._changed.notify_all()
        if not missing:
            connection.close()
            return file.pieces[0]
        with contextlib.suppress(TransientFault):
            self._receive(file, missing[0], connection, response)
            return missing[0]
        connection.close()
        return missing[0]

    def _receive(
        self, file: PartialFile, piece: Piece, connection: Connection, response: http.client.HTTPResponse
    ) -> None:
        buffer, filled, flushed = connection.buffer, 0, time.monotonic()
        try:
            while piece.end is None or piece.at + filled < piece.end:
                if self._stop.is_set():
                    return
                room = len(buffer) if piece.end is None else min(len(buffer), piece.end - piece.at)
                filled += connection.receive(response, buffer[filled:room])
                if filled == len(buffer) or time.monotonic() > flushed + 1:
                    self._write(file, piece, buffer[:filled])
                    filled, flushed = 0, time.monotonic()
        except EndOfBody:
            if piece.end is not None or piece.at + filled < (file.source.wanted.size or 0):
                raise
            self._write(file, piece, buffer[:filled])
            filled, piece.end = 0, piece.at
        finally:
            self._write(file, piece, buffer[:filled])
        if response.status == 206:
            response.close()
        else:
            connection.close()

    def _write(self, file: PartialFile, piece: Piece, data: memoryview) -> None:
        file.write(piece, data)
        with self._changed:
            self._changed.notify_all()

    def _end(self) -> bool:
        """Stop the threads, even those that wait for a server; whether all have ended."""
        self._stop.set()
        for _ in range(100):
            waiting = [thread for thread in self._threads if thread.is_alive()]
            for connection in self._connections if waiting else []:
                connection.abort()
            for thread in waiting:
                thread.join(0.05)
        if self._saver.is_alive():
            self._saver.join()  # it waits for the disk only, as whoever asks next would
        return not any(thread.is_alive() for thread in self._threads)

    def _leave(self, fault: BaseException) -> None:
        """Keep what a later run can go on from, and nothing on a full disk."""
        full = isinstance(fault, ApiError) and fault.code == "DISK_FULL"
        if isinstance(fault, StaleFile):
            fault.file.discard()
        for file in self._files:
            if file.fd < 0:
                continue
            if not full and file.begun and file.done:
                with contextlib.suppress(OSError):
                    file.save()
            if full or not file.side.exists():
                file.part.unlink(missing_ok=True)
                file.side.unlink(missing_ok=True)
