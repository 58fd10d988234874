"""Reading a URL from front to back, resumed where it was cut.

Source: RFC 9110 §14 (ranges).
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Mapping
from typing import Any

from api.models.http_client import Connection, EndOfBody, Policy, Source, StaleContent, TransientFault, Wanted


def open_stream(
    url: str,
    *,
    size: int | None = None,
    etag: str | None = None,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    policy: Policy | None = None,
) -> Stream:
    """Open a URL for reading from front to back, with transparent resume.

    Raises:
        ApiError: SOURCE_UNREACHABLE, SOURCE_DENIED, MODEL_NOT_FOUND, URL_NOT_ALLOWED; MODEL_CORRUPT also at the end,
            when the sha256 differs.
    """
    return Stream(Source(Wanted(url, "", size, etag, sha256, headers or {}), policy or Policy(), threading.Event()))


class Stream(io.RawIOBase):
    """The bytes of a URL from front to back; ``size`` and ``etag`` are what the source says."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._connection = Connection(source.policy)
        self._digest = hashlib.sha256() if source.sha256 else None
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
        if self._digest is not None:
            self._digest.update(view[:count])
            if view and not count and self._digest.hexdigest() != self._source.sha256:
                raise self._source.error("MODEL_CORRUPT", "the sha256 of what it sent is not the expected one")
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
