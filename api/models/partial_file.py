"""A file on its way: which ranges of it are on the disk, its hashes, and the side file to resume from.

Sources: RFC 9530 (Repr-Digest); RFC 1864 (Content-MD5).
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import http.client
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from isal import isal_zlib

from api.errors import ApiError
from api.models.disk import disk_fault, reserve, start_writing
from api.models.http_client import Connection, Policy, Source, StaleContent, TransientFault, Wanted, is_strong
from api.models.manifest import FileEntry

_RUN = 8 * 2**20  # bytes after which a piece is sent on to the disk
PIECE = 16 * 2**20  # one request: long enough to forget its round trip, short enough to share the end fairly


class Fetched(FileEntry, frozen=True):
    """A downloaded file; ``verified`` says that a digest was compared, not only the size."""

    etag: str = ""
    verified: bool = False


class StaleFile(StaleContent):
    """What there is of this file is worthless."""

    def __init__(self, error: ApiError, file: PartialFile) -> None:
        super().__init__(error)
        self.file = file


class Piece:
    """A run of bytes: written up to ``at``, and on its way from memory to the disk up to ``sent``."""

    __slots__ = ("at", "end", "sent", "start")

    def __init__(self, start: int, at: int, end: int | None) -> None:
        self.start, self.at, self.end, self.sent = start, at, end, at


class _Saved(msgspec.Struct):
    """What ``<name>.part.json`` holds."""

    size: int
    etag: str
    done: list[tuple[int, int]]


class PartialFile:
    """One file on its way: its pieces, its place on the disk, and its hashes."""

    def __init__(self, wanted: Wanted, folder: Path, policy: Policy, stop: threading.Event, digest: bool) -> None:
        self.source = Source(wanted, policy, stop)
        self.path = folder / wanted.path
        self.part = self.path.with_name(self.path.name + ".part")
        self.side = self.path.with_name(self.path.name + ".part.json")
        self.pieces: list[Piece] = []
        self.fd = -1
        self.hashed = 0
        self.expected: dict[str, bytes] = {}
        self._digest = digest
        self._hashes: dict[str, Any] = {}
        self._front = 0
        self.resumed = self.begun = self.whole = False
        self._saving = threading.Lock()

    def open(self) -> None:
        """Open the part file, with the pieces that an earlier run left in it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        saved = None
        with contextlib.suppress(OSError, msgspec.DecodeError):
            saved = msgspec.json.decode(self.side.read_bytes(), type=_Saved)
        self.fd = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        if saved is None or os.fstat(self.fd).st_size != saved.size or not self._usable(saved):
            self.discard()
            return
        at = 0
        for start, end in saved.done:
            self._cover(at, start)
            self.pieces.append(Piece(start, end, end))
            at = end
        self._cover(at, saved.size)
        source = self.source
        source.size, source.etag, source.known, self.resumed = saved.size, saved.etag, True, True
        source.validator = "" if source.sha256 else saved.etag

    def _usable(self, saved: _Saved) -> bool:
        edges = [edge for pair in saved.done for edge in pair]
        in_order = edges == sorted(edges) and all(0 <= edge <= saved.size for edge in edges)
        return in_order and bool(edges) and (bool(self.source.sha256) or is_strong(saved.etag))

    def _cover(self, start: int, end: int) -> None:
        for at in range(start, end, PIECE):
            self.pieces.append(Piece(at, at, min(at + PIECE, end)))

    def discard(self) -> None:
        """Start afresh, with nothing on the disk."""
        with self._saving:  # or a record of what was there a moment ago would be written after this
            self.side.unlink(missing_ok=True)
            self.pieces = []
            os.ftruncate(self.fd, 0)

    def begin(self, response: http.client.HTTPResponse) -> None:
        """Take the size and the digests from the first answer."""
        source = self.source
        headers = response
        if response.status == 206 and any(k.lower() in _WHOLE_DIGESTS for k in response.headers):
            # beside a range these may mean the range: the whole is asked about on its own
            with contextlib.suppress(TransientFault, ApiError, StaleContent):
                other = Connection(source.policy)
                headers = source.get(other, 0, None, "HEAD")
                other.close()
        whole = headers.status == 200
        self.expected = {**digests_of(dict(headers.headers.items()), whole), **source.wanted.digests}
        if source.sha256:
            self.expected["sha256"] = bytes.fromhex(source.sha256)
        names = {*self.expected, *(["sha256"] if self._digest else [])}
        self._hashes = {name: new_hash(name) for name in names}
        if not self.pieces:
            self._lay_out(response.status == 206)
        self.begun = True

    def _lay_out(self, ranges: bool) -> None:
        source = self.source
        if source.size is not None:
            free = os.statvfs(self.path.parent)
            if source.size > free.f_bavail * free.f_frsize:
                raise disk_fault(OSError(errno.ENOSPC, ""), self.path)
            reserve(self.fd, source.size)
        if ranges:
            self._cover(0, source.size or 0)
        else:
            self.pieces.append(Piece(0, 0, source.size))

    def write(self, piece: Piece, data: memoryview) -> None:
        """Put the next bytes of a piece into the file. Raises OSError."""
        while data:
            count = os.pwrite(self.fd, data, piece.at)
            piece.at += count
            data = data[count:]
        # otherwise the disk idles now, and fsync waits for all of it at the end
        if piece.at - piece.sent >= _RUN or piece.at == piece.end:
            start_writing(self.fd, piece.sent, piece.at - piece.sent)
            piece.sent = piece.at

    def advance(self, buffer: memoryview) -> bool:
        """Hash what is there in one run after what was hashed; whether there was anything."""
        while self._front < len(self.pieces) - 1 and self.pieces[self._front].at == self.pieces[self._front].end:
            self._front += 1
        front = self.pieces[self._front].at if self.pieces else 0
        if not self._hashes:
            self.hashed = front
        count = min(front - self.hashed, len(buffer))
        if count:
            count = os.preadv(self.fd, [buffer[:count]], self.hashed)
            for one in self._hashes.values():
                one.update(buffer[:count])
            self.hashed += count
        return bool(count)

    def first_range(self) -> tuple[int, int | None]:
        """Which bytes to ask for first; one is enough to see that a file that is there is still the same."""
        first = next((piece for piece in self.pieces if piece.at != piece.end), None)
        if first is not None:
            return first.at, first.end
        return 0, 1 if self.pieces else PIECE

    @property
    def complete(self) -> bool:
        """Whether every byte is there and hashed."""
        return self.begun and self._front == len(self.pieces) - 1 and self.pieces[-1].end == self.hashed

    @property
    def done(self) -> int:
        """Bytes on the disk."""
        return sum(piece.at - piece.start for piece in self.pieces)

    def save(self) -> None:
        """Record what is on the disk; it is made to be there first, as a machine may stop too."""
        with self._saving:
            done = [(piece.start, piece.at) for piece in list(self.pieces) if piece.at > piece.start]
            if self.fd < 0 or self.source.size is None or not done:
                return
            os.fdatasync(self.fd)
            fresh = self.side.with_name(self.side.name + ".new")
            fresh.write_bytes(msgspec.json.encode(_Saved(self.source.size, self.source.etag, done)))
            fresh.replace(self.side)

    def verify(self) -> None:
        """Compare size and digests. Raises MODEL_CORRUPT, or StaleFile where an earlier run may be to blame."""
        source = self.source
        size = os.fstat(self.fd).st_size
        wrong = [name for name, value in self.expected.items() if self._hashes[name].digest() != value]
        if source.wanted.size is not None and size != source.wanted.size:
            wrong = [f"size, {size} for {source.wanted.size} bytes,"]
        if wrong:
            self.discard()
            error = source.error("MODEL_CORRUPT", f"the {wrong[0]} of {self.path.name} is not the expected one")
            raise StaleFile(error, self) if self.resumed else error
        self.whole = True

    def keep(self) -> Fetched:
        """Give the file its name; from here on it counts as whole."""
        os.fsync(self.fd)
        size = os.fstat(self.fd).st_size
        self.part.replace(self.path)
        self.side.unlink(missing_ok=True)
        sha256 = self._hashes["sha256"].digest().hex() if "sha256" in self._hashes else None
        source = self.source
        return Fetched(source.wanted.path, size, sha256, etag=source.etag, verified=bool(self.expected))


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview) -> None:
        self._value = isal_zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


def new_hash(name: str) -> Any:
    """A running digest: what ``hashlib`` knows, or ``crc32``."""
    return _Crc32() if name == "crc32" else hashlib.new(name)


_WHOLE_DIGESTS = {
    "content-md5": "md5",
    "x-amz-checksum-sha256": "sha256",
    "x-amz-checksum-sha1": "sha1",
    "x-amz-checksum-crc32": "crc32",
}


def digests_of(headers: Mapping[str, str], whole: bool) -> dict[str, bytes]:
    """What the source says the file's digests are: algorithm to value.

    A checksum of S3 that ends in ``-<parts>`` is one of checksums and says nothing about the bytes.
    """
    said: list[tuple[str, str]] = []
    headers = {name.lower(): value for name, value in headers.items()}
    if whole:
        said += [(name, headers.get(header, "")) for header, name in _WHOLE_DIGESTS.items()]
    said += re.findall(r"(sha-256|sha-512|md5)=:([^:]+):", headers.get("repr-digest", ""))
    found = {}
    for name, value in said:
        with contextlib.suppress(ValueError):
            raw = base64.b64decode(value, validate=True)
            name = name.replace("-", "")
            if raw and len(raw) == (4 if name == "crc32" else hashlib.new(name).digest_size):
                found[name] = raw
    return found
