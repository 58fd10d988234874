"""Bounds what clients that send slowly, or open many connections, can hold: Sanic waits for the next byte for ever.

Its own timeouts begin anew with each byte that comes, so that a byte a minute keeps a connection for days (Slowloris).
Here a request as a whole must come at a rate, as with Apache's mod_reqtimeout.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import orjson
from sanic.http.constants import Stage
from sanic.server.protocols.http_protocol import HttpProtocol

from api.errors import ApiError

_LOOK = 5.0
"""Seconds between two looks at a connection."""
_PATIENCE = 30.0
"""Seconds in which the head of a request must be here; a body gets as many more as its bytes take at ``_RATE``."""
_RATE = 8 * 2**10
"""Bytes a second."""


class Connection(HttpProtocol):
    """A connection of a client. All of them are in ``connections``, which Sanic keeps."""

    __slots__ = ("_next_look", "_received", "_since")

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._since: float | None = None
        self._received = 0
        self._next_look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Take it, where there is room: connections that wait for nothing make room for it, the oldest first."""
        most = self.app.ctx.service.settings.max_connections
        if len(self.connections) >= most and not self._make_room():
            transport.write(_no_room(most))
            transport.close()
            return
        super().connection_made(transport)
        self._next_look = self.loop.call_later(_LOOK, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone; of one that was not taken there is nothing to clean up."""
        if self._next_look is not None:
            self._next_look.cancel()
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count."""
        if self._next_look is None:
            return
        if self._since is None or (self._idle and not self.recv_buffer):
            self._since, self._received = time.monotonic(), 0
        self._received += len(data)
        super().data_received(data)

    def _make_room(self) -> bool:
        idle = [other for other in self.connections if other.http is not None and other._idle]
        if not idle:
            return False
        longest = min(idle, key=lambda other: other._time)
        longest.abort()
        self.connections.discard(longest)
        return True

    def _look(self) -> None:
        self._next_look = self.loop.call_later(_LOOK, self._look)
        if not self._arriving:
            self._since = None
        elif self._since is None:
            self._since, self._received = time.monotonic(), 0
        elif time.monotonic() - self._since > _PATIENCE + self._received / _RATE:
            self.transport.abort()

    @property
    def _idle(self) -> bool:
        """Whether it waits for the next request; behind a refused one its body may still come."""
        http = self.http
        return http is None or (http.stage is Stage.IDLE and getattr(http, "request_body", None) is None)

    @property
    def _arriving(self) -> bool:
        """Whether a request is here in part, and the rest is waited for."""
        http = self.http
        if http is None or http.stage is Stage.REQUEST:
            return http is not None
        return getattr(http, "request_body", None) is not None and not self._data_received.is_set()


def _no_room(most: int) -> bytes:
    """Said before anything is read."""
    error = ApiError("TOO_MANY_CONNECTIONS", f"{most} connections are open, as many as MAX_CONNECTIONS allows.")
    body = orjson.dumps({"$error": error.body()})
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\nRetry-After: 1\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
