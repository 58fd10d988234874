"""Archives of a model folder, unpacked while they arrive.

Three stages run side by side, each in a thread of its own: reading, decompressing, and writing with
hashing; all three release the GIL. On a slow link the whole takes as long as the download, on a
fast one as long as the slowest stage.

Sources: RFC 8878 (Zstandard), RFC 1952 (gzip).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from isal import igzip_lib

from api.errors import ApiError
from api.models.disk import disk_fault
from api.models.manifest import FileEntry, OnProgress
from api.models.tar_members import BLOCK, ByteReader, corrupt, read_members, safe_name, unsafe

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

KINDS = ("tar", "tar.gz", "tar.zst")
# .tar.zstd is what older containers called the archive of a trained model
_SUFFIXES = {".tar": "tar", ".tar.gz": "tar.gz", ".tgz": "tar.gz", ".tar.zst": "tar.zst", ".tar.zstd": "tar.zst"}
_CHUNK = 2**20
_AHEAD = 32  # chunks between two stages: enough to ride out a slow fsync or a stalled link for a moment
_MAX_PADDING = 2**24  # bytes after the end marker; tape blocking factors stay far below
_MAX_RATIO = 200  # decompressed to compressed; weights stay below 10, gzip cannot exceed 1032
_RATIO_FROM = 2**26  # bytes from which the ratio counts: a small all-zero tensor is no bomb


class Readable(Protocol):
    """What an archive is read from: ``read`` returns at most ``size`` bytes, and none at the end."""

    def read(self, size: int, /) -> bytes: ...  # noqa: D102


def kind_of(name: str) -> str | None:
    """The kind of archive that a file name or URL path ends in, one of ``KINDS``, or None."""
    lowered = name.lower()
    return next((kind for suffix, kind in _SUFFIXES.items() if lowered.endswith(suffix)), None)


def extract(
    stream: Readable,
    kind: str,
    folder: Path,
    on_progress: OnProgress,
    max_bytes: int,
    max_files: int,
    *,
    size: int | None = None,
) -> tuple[FileEntry, ...]:
    """Unpack an archive while it is read.

    Only regular files and folders are made, with modes 0644 and 0755, and only below ``folder``. A
    single top folder that holds everything is left out, unless the archive has an entry for its
    root (``./``): then it says itself where the model begins. The stream is read to its end, so that
    checks which it makes there are made. After any error ``folder`` is gone.

    Args:
        stream: the archive as stored, compressed; closed by this function when it fails midway.
        kind: one of ``KINDS``.
        folder: where to; must be empty or missing.
        on_progress: called from this thread with ``download`` (bytes of the archive read, of ``size``)
            and ``extract`` (bytes of files written); what it raises ends the extraction.
        max_bytes: of all files together.
        max_files: files and folders together.
        size: bytes of the archive, where known.

    Returns:
        The files, sorted by path, with their sha256.

    Raises:
        ApiError: ARCHIVE_UNSAFE, MODEL_CORRUPT, DISK_FULL, and what the stream raises.
        ValueError: an unknown kind, or a folder that is not empty.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty")
    stop = threading.Event()
    done = False
    try:
        unpacking = _Unpacking(stream, kind, folder, on_progress, max_bytes, max_files, size, stop)
        entries = unpacking.run()
        done = True
        return entries
    except OSError as fault:
        raise disk_fault(fault, folder) from fault
    finally:
        stop.set()
        if not done:
            # closing is what wakes a reader that waits for a slow link
            with contextlib.suppress(Exception):
                stream.close()  # type: ignore[attr-defined]
            shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Unpacking:
    """One extraction: its limits, and what it has made so far."""

    stream: Readable
    kind: str
    folder: Path
    on_progress: OnProgress
    max_bytes: int
    max_files: int
    size: int | None
    stop: threading.Event
    members: int = 0
    read: int = 0  # bytes of the archive
    written: int = 0  # bytes of files

    def __post_init__(self) -> None:
        raw = _ahead(self._reading(), self.stop)
        self.bytes = ByteReader(_ahead(self._bounded(_DECODERS[self.kind](raw)), self.stop))

    def run(self) -> tuple[FileEntry, ...]:
        entries: dict[str, FileEntry] = {}
        rooted = False
        for info in read_members(self.bytes):
            name = safe_name(info)
            if not name:
                rooted = True
                continue
            self.members += 1
            if self.members > self.max_files:
                raise unsafe(name, f"is one too many: at most {self.max_files} are allowed")
            if info.isdir():
                self._make_folder(name, name)
                continue
            if self.written + info.size > self.max_bytes:
                raise unsafe(name, f"takes the total over the limit of {self.max_bytes} bytes")
            entries[name] = self._write(name, info.size)
        self.bytes.drain(_MAX_PADDING)
        self._report()
        names = sorted(entries)
        tops = list(self.folder.iterdir())
        if not rooted and len(tops) == 1 and tops[0].is_dir():
            self._lift(tops[0])
            return tuple(FileEntry(name.partition("/")[2], entries[name].size, entries[name].sha256) for name in names)
        return tuple(entries[name] for name in names)

    def _reading(self) -> Iterator[bytes]:
        while chunk := self.stream.read(_CHUNK):
            self.read += len(chunk)
            yield chunk

    def _bounded(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Stops a bomb where it unfolds, before it takes memory or time."""
        total = 0
        for chunk in chunks:
            total += len(chunk)
            if total > _RATIO_FROM and total > _MAX_RATIO * self.read:
                raise ApiError("ARCHIVE_UNSAFE", f"The archive unfolds to more than {_MAX_RATIO} times its size.")
            yield chunk

    def _make_folder(self, name: str, member: str) -> None:
        path = self.folder
        for part in name.split("/"):
            path /= part
            try:
                path.mkdir()
                path.chmod(0o755)
            except FileExistsError:
                if not path.is_dir():
                    raise unsafe(member, "needs a folder where there is a file") from None

    def _write(self, name: str, size: int) -> FileEntry:
        parent = name.rpartition("/")[0]
        if parent:
            self._make_folder(parent, name)
        digest = hashlib.sha256()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            fd = os.open(self.folder / name, flags, 0o644)
        except FileExistsError:
            # also a folder of that name, or a name that this file system takes for the same
            raise unsafe(name, "is there twice") from None
        try:
            os.fchmod(fd, 0o644)
            for chunk in self.bytes.take(size):
                digest.update(chunk)
                rest = chunk
                while rest:
                    rest = rest[os.write(fd, rest) :]
                self.written += len(chunk)
                self._report()
        finally:
            os.close(fd)
        self.bytes.whole(-size % BLOCK)
        return FileEntry(name, size, digest.hexdigest())

    def _report(self) -> None:
        self.on_progress("download", self.read, self.size)
        self.on_progress("extract", self.written, None)

    def _lift(self, top: Path) -> None:
        # a name that no member can have, so that top/top can be lifted too
        aside = self.folder / ".\\"
        top.rename(aside)
        for path in list(aside.iterdir()):
            path.rename(self.folder / path.name)
        aside.rmdir()


def _ahead(source: Iterator[bytes], stop: threading.Event) -> Iterator[bytes]:
    """The same chunks, made in a thread of its own, a bounded number of them ahead."""
    ready: queue.Queue[bytes | BaseException | None] = queue.Queue(_AHEAD)

    def put(item: bytes | BaseException | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.2)
                return

    def run() -> None:
        try:
            for chunk in source:
                put(chunk)
                if stop.is_set():
                    return
            put(None)
        except BaseException as fault:  # handed over, not swallowed
            put(fault)

    threading.Thread(target=run, name="archive", daemon=True).start()
    while not stop.is_set():
        try:
            item = ready.get(timeout=0.2)
        except queue.Empty:
            continue
        if item is None:
            return
        if isinstance(item, BaseException):
            raise item
        yield item


def _decompressed(chunks: Iterator[bytes], new: Callable[[], Any], faults: type[Exception]) -> Iterator[bytes]:
    """Frames (Zstandard) or members (gzip) one after another, in chunks of bounded size."""
    decoder = None
    for chunk in chunks:
        while True:
            if decoder is None:
                chunk = chunk.lstrip(b"\0")  # padding between and after frames
                if not chunk:
                    break
                decoder = new()
            try:
                out = decoder.decompress(chunk, _CHUNK)
            except faults as fault:
                raise corrupt(str(fault)) from None
            if out:
                yield out
            chunk = b""
            if decoder.eof:
                chunk, decoder = decoder.unused_data, None
            elif decoder.needs_input:
                break
    if decoder is not None:
        raise corrupt("it ends in the middle of compressed data")


_DECODERS: dict[str, Callable[[Iterator[bytes]], Iterator[bytes]]] = {
    "tar": lambda chunks: chunks,
    # a window over 128 MiB (zstd --long=28 and up) is refused: its sender would choose how much memory we need
    "tar.zst": lambda chunks: _decompressed(chunks, zstd.ZstdDecompressor, zstd.ZstdError),
    "tar.gz": lambda chunks: _decompressed(
        chunks,
        lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP),
        igzip_lib.IsalError,  # type: ignore[arg-type]  # its stub says instance
    ),
}
