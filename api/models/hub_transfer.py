"""Moves the files of one hub model to the disk: several at once, resumed, each compared with its hash.

What a Xet store holds goes through ``hf_hub_download``, which fetches its chunks in parallel. Everything
else is streamed here, over the library's own HTTP session, because the library throws away what it has of
a file when it is interrupted (in 1.33 and 2.4 each download has a temporary file of its own), and compares sizes
but not hashes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from api.models.manifest import FileEntry, OnProgress

WORK = ".transfer"
"""Folder for unfinished parts, inside the one that the files go to."""

_log = logging.getLogger(__name__)
_TRIES = 5
_PAUSE = 0.5
_LONGEST_PAUSE = 30
_TICK = 0.2
_BLOCK = 2**20
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


class RemoteFile(msgspec.Struct, frozen=True):
    r"""One file on the hub.

    Attributes:
        path: relative, with ``/``.
        size: bytes.
        sha256: hex, for what is stored outside git (LFS, Xet).
        git_oid: for what is stored in git: hex SHA-1 of ``blob SIZE\0`` and the content.
        url: where it is served, by commit.
    """

    path: str
    size: int
    sha256: str | None
    git_oid: str | None
    url: str


class Mismatch(Exception):
    """A file that is not what the hub says it is."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)
        self.path = path
        self.why = why


class _Stopped(Exception):
    """Ends a thread whose result nobody waits for any more."""


def headers(token: str | None) -> dict[str, str]:
    """What goes with each request of ours. The library's own headers may cost a request to the public hub."""
    return {"user-agent": "diffusers-api", **({"authorization": f"Bearer {token}"} if token else {})}


@functools.cache
def transport_error() -> type[Exception]:
    """The class above all network faults: of httpx in huggingface_hub 1.x, of httpx2 in 2.x."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError" and issubclass(c, Exception))


def is_transient(fault: Exception) -> bool:
    """Whether trying again may help."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(fault, HfHubHTTPError):
        return fault.response.status_code in _TRANSIENT
    return isinstance(fault, (transport_error(), ConnectionError)) and not isinstance(fault, OfflineModeIsEnabled)


def retry_after(fault: Exception) -> int | None:
    """Seconds that the server asks to wait (RFC 9110, 10.2.3); dates are not read."""
    response = getattr(fault, "response", None)
    value = response.headers.get("retry-after", "") if response is not None else ""
    return int(value) if value.isdigit() else None


def transfer(
    model_id: str,
    commit: str,
    files: Sequence[RemoteFile],
    folder: Path,
    on_progress: OnProgress,
    token: str | None,
    workers: int,
) -> tuple[FileEntry, ...]:
    """Fetch files into a folder; see ``api.models.hub.fetch``.

    Raises:
        Mismatch: the content is wrong, twice.
        OSError: the disk; what ``huggingface_hub`` raises for the rest.
    """
    work = _Transfer(model_id, commit, folder, token)
    total = sum(file.size for file in files)
    pool = concurrent.futures.ThreadPoolExecutor(workers, "hub")
    try:
        # the largest first, or it ends up alone at the end
        pending = {pool.submit(work.one, file) for file in sorted(files, key=lambda f: -f.size)}
        entries: list[FileEntry] = []
        while pending:
            done, pending = concurrent.futures.wait(pending, _TICK, concurrent.futures.FIRST_COMPLETED)
            entries.extend(future.result() for future in done)
            on_progress("download", work.done, total)
    except BaseException:
        work.stop.set()
        # a Xet transfer may not hear of it before its file is complete
        pool.shutdown(wait=not work.in_library, cancel_futures=True)
        raise
    pool.shutdown()
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return tuple(sorted(entries, key=lambda entry: entry.path))


class _Transfer:
    """The state that the threads share."""

    def __init__(self, model_id: str, commit: str, folder: Path, token: str | None) -> None:
        self.stop = threading.Event()
        self.in_library = 0
        self._model_id, self._commit, self._folder, self._token = model_id, commit, folder, token
        # compressed on the way, neither lengths nor ranges would mean what they say
        self._headers = {**headers(token), "accept-encoding": "identity"}
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def done(self) -> int:
        """Bytes that are there, of all files."""
        with self._lock:
            return sum(self._counts.values())

    def one(self, file: RemoteFile) -> FileEntry:
        """Fetch one file, or find that it is there."""
        target = self._folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file():
            part = _Part(target)
            if self._fault(file, part) is None:
                return self._entry(file, part)
            target.unlink()
        # named by what it holds: a part of another commit's file is not continued
        identity = f"{file.path}\0{file.sha256 or file.git_oid or self._commit}"
        place = self._folder / WORK / hashlib.sha256(identity.encode()).hexdigest()[:32]
        place.parent.mkdir(parents=True, exist_ok=True)
        for again in (True, False):
            part = self._through_library(file, place) or self._stream(file, place)
            why = self._fault(file, part)
            if why is None:
                break
            part.path.unlink(missing_ok=True)
            if not again:
                raise Mismatch(file.path, why)
            _log.warning("%s of %s: %s; fetched again", file.path, self._model_id, why)
        with part.path.open("rb") as written:
            os.fsync(written.fileno())
        part.path.replace(target)
        return self._entry(file, part)

    def _entry(self, file: RemoteFile, part: _Part) -> FileEntry:
        self._set(file, file.size)
        return FileEntry(path=file.path, size=file.size, sha256=part.digest.hexdigest())

    def _fault(self, file: RemoteFile, part: _Part) -> str | None:
        if part.size != file.size:
            return f"{part.size} bytes instead of {file.size}"
        if file.sha256 and part.digest.hexdigest() != file.sha256:
            return "its SHA-256 differs"
        if file.git_oid and not file.sha256 and _git_oid(part.path) != file.git_oid:
            return "its git hash differs"
        return None

    def _set(self, file: RemoteFile, count: int) -> None:
        with self._lock:
            self._counts[file.path] = count
        if self.stop.is_set():
            raise _Stopped

    def _stream(self, file: RemoteFile, place: Path) -> _Part:
        part = _Part(place)
        furthest, failures = part.size, 0
        while part.size != file.size or not place.exists():
            try:
                self._pour(file, part)
            except Exception as fault:
                status = getattr(getattr(fault, "response", None), "status_code", None)
                if status == 416:
                    part.restart()
                # a session that another thread closed is a RuntimeError
                elif not is_transient(fault) and not isinstance(fault, RuntimeError):
                    raise
                failures = 0 if part.size > furthest else failures + 1
                wait = retry_after(fault) or min(_PAUSE * 2**failures, _LONGEST_PAUSE)
                if failures >= _TRIES or wait > _LONGEST_PAUSE:
                    raise
                if self.stop.wait(wait):
                    raise _Stopped from None
            else:
                if part.size >= file.size:
                    break
                failures = 0 if part.size > furthest else failures + 1
                if failures >= _TRIES:
                    break
            furthest = max(furthest, part.size)
        return part

    def _pour(self, file: RemoteFile, part: _Part) -> None:
        """One request: from where the part ends to the end of the file."""
        from huggingface_hub import constants, get_session, hf_raise_for_status

        if part.size > file.size:
            part.restart()
        request = {**self._headers, **({"range": f"bytes={part.size}-"} if part.size else {})}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        # a redirect to another host leaves the token behind: httpx drops the header
        with get_session().stream("GET", file.url, headers=request, timeout=timeout) as response:
            hf_raise_for_status(response)
            begins = response.headers.get("content-range", "").startswith(f"bytes {part.size}-")
            if response.status_code != 206 or not begins:
                part.restart()
            with part.writing() as write:
                for block in response.iter_bytes():
                    write(block)
                    self._set(file, min(part.size, file.size))
                    if part.size > file.size:
                        return

    def _through_library(self, file: RemoteFile, place: Path) -> _Part | None:
        """Fetch from a Xet store; None where there is none, where it fails, or where a part waits."""
        from huggingface_hub import hf_hub_download

        if not file.sha256 or place.exists() or not self._on_xet(file):
            return None
        folder = place.with_suffix(".xet")
        shutil.rmtree(folder, ignore_errors=True)
        with self._lock:
            self.in_library += 1
        try:
            path = hf_hub_download(
                self._model_id,
                file.path,
                revision=self._commit,
                local_dir=folder,
                token=self._token,
                endpoint=file.url.partition(f"/{self._model_id}/resolve/")[0],
                tqdm_class=_bar(lambda count: self._set(file, count)),
            )
            return _Part(Path(path))
        except _Stopped:
            raise
        except Exception as fault:
            _log.warning("%s: Xet failed (%s), plain HTTP instead", file.path, type(fault).__name__)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        finally:
            with self._lock:
                self.in_library -= 1

    def _on_xet(self, file: RemoteFile) -> bool:
        from huggingface_hub import constants, get_hf_file_metadata

        if constants.HF_HUB_DISABLE_XET or importlib.util.find_spec("hf_xet") is None:
            return False
        try:
            return get_hf_file_metadata(file.url, token=self._token).xet_file_data is not None
        except (OSError, transport_error()):
            return False  # the plain request meets the same fault, and tells it


class _Part:
    """A file that grows, and the SHA-256 of what it holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.digest = hashlib.sha256()
        if path.is_file():
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    self.digest.update(block)
                    self.size += len(block)

    def restart(self) -> None:
        """Throw away what it holds."""
        self.path.unlink(missing_ok=True)
        self.size = 0
        self.digest = hashlib.sha256()

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[bytes], None]]:
        """Give a function that appends."""
        self.path.touch()
        # at its place, not with O_APPEND: two processes at the same file then write the same bytes twice
        with self.path.open("r+b", buffering=_BLOCK) as file:
            file.seek(self.size)

            def write(block: bytes) -> None:
                file.write(block)
                self.digest.update(block)
                self.size += len(block)

            yield write


def _git_oid(path: Path) -> str:
    """The name git gives to a file's content: SHA-1 of a header and the bytes ("Git Internals - Git Objects")."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _bar(count: Callable[[int], None]) -> type[Any]:
    """A progress bar for the library that draws nothing and calls ``count`` with the bytes so far."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self.bytes = 0

        def update(self, n: float | None = 1) -> None:
            self.bytes += int(n or 0)
            count(self.bytes)

        def update_transfer(self, n: float | None = 1) -> None:
            """With this method there, the library reports what is on disk and what came over the wire apart."""

    return Bar
