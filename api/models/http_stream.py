"""Reading a URL from front to back, resumed where it was cut.

Source: RFC 9110 §14 (ranges).
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from api.models.http_client import Connection, EndOfBody, Policy, Source, StaleContent, TransientFault, Wanted
from api.models.partial_file import digests_of, new_hash


def open_stream(
    url: str,
    *,
    size: int | None = None,
    etag: str | None = None,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    digests: Mapping[str, bytes] | None = None,
    policy: Policy | None = None,
) -> Stream:
    """Open a URL for reading from front to back, with transparent resume.

    ``digests`` (algorithm to digest) and the sha256 are compared when the end is reached.

    Raises:
        ApiError: SOURCE_UNREACHABLE, SOURCE_DENIED, MODEL_NOT_FOUND, URL_NOT_ALLOWED; MODEL_CORRUPT also at the end,
            when the sha256 differs.
    """
    source = Source(Wanted(url, "", size, etag, sha256, headers or {}), policy or Policy(), threading.Event())
    return Stream(source, digests or {})


class Probed(msgspec.Struct, frozen=True):
    """What a server says of a file: bytes, ETag, digests of the whole by algorithm; empty where it says nothing."""

    size: int | None
    etag: str
    digests: dict[str, bytes]


def probe(
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    sha256: str | None = None,
    policy: Policy | None = None,
) -> Probed:
    """Ask about a file without reading it.

    By HEAD, and where that is refused, as by an address that is signed for GET, by a GET that is broken off.

    Raises:
        ApiError: as ``open_stream``.
    """
    policy = policy or Policy()
    source = Source(Wanted(url, "", None, None, sha256, headers or {}), policy, threading.Event())
    connection = Connection(policy)
    with contextlib.closing(connection), contextlib.suppress(TransientFault):
        answer = source.get(connection, 0, None, "HEAD")
        length = answer.getheader("Content-Length", "")
        if answer.status == 200 and length.isdigit():
            return Probed(
                int(length), answer.getheader("ETag", ""), digests_of(dict(answer.headers.items()), whole=True)
            )
    with open_stream(url, headers=headers, policy=policy) as stream:
        return Probed(stream.size, stream.etag, {})


class Stream(io.RawIOBase):
    """The bytes of a URL from front to back; ``size`` and ``etag`` are what the source says."""

    def __init__(self, source: Source, digests: Mapping[str, bytes]) -> None:
        self._source = source
        self._connection = Connection(source.policy)
        self._expected = {**digests, **({"sha256": bytes.fromhex(source.sha256)} if source.sha256 else {})}
        self._hashes = {name: new_hash(name) for name in self._expected}
        self._at = 0
        self._response = self._trying(lambda: source.body(self._connection, 0, None))
        self.size, self.etag = source.size, source.etag

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """At least one byte, or 0 at the verified end. Raises ApiError."""
        view = memoryview(buffer).cast("B")
        count = self._trying(lambda: self._some(view))
        self._at += count
        for name, running in self._hashes.items():
            running.update(view[:count])
            if view and not count and running.digest() != self._expected[name]:
                raise self._source.error("MODEL_CORRUPT", f"the {name} of what it sent is not the expected one")
        return count

    def close(self) -> None:
        """End it, also from another thread."""
        self._source.stop.set()
        self._connection.abort()
        self._connection.close()
        super().close()

    def _some(self, view: memoryview) -> int:
        if not view or (self.size is not None and self._at >= self.size):
            return 0
        if self._response is None:
            self._response = self._source.body(self._connection, self._at, None)
        try:
            left = len(view) if self.size is None else self.size - self._at
            return self._connection.receive(self._response, view[:left])
        except EndOfBody:
            if self.size is None:
                return 0
            raise

    def _trying(self, once: Callable[[], Any]) -> Any:
        for failures in range(self._source.policy.attempts):
            try:
                return once()
            except StaleContent as restart:
                raise restart.error from None
            except TransientFault as cut:
                self._response = None
                self._connection.close()
                if self._source.stop.is_set():
                    raise ValueError("the stream was closed") from None
                why = cut
                self._source.pause(failures, cut.wait)
        raise self._source.error("SOURCE_UNREACHABLE", f"{why}, {self._source.policy.attempts} times in a row")
