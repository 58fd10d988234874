"""A second port that answers ``/ping`` alone, where RunPod's load balancer is told to ask there (PORT_HEALTH).

Sanic in one process listens at one port, and this is one question, asked every few seconds by one client.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from api.service.dispatch import Dispatcher

_LONGEST = 8192
_PATIENCE = 5.0
_REASONS = {200: "OK", 204: "No Content", 404: "Not Found", 503: "Service Unavailable"}


def ping_status(state: str) -> int:
    """The status of ``/ping``: 200 when a worker can run jobs, 204 while it starts, else 503."""
    return {"STARTING": 204, "READY": 200, "BUSY": 200}.get(state, 503)


async def listen(sock: socket.socket, dispatcher: Dispatcher) -> asyncio.Server:
    """Answer from now on.

    Args:
        sock: listening already.
        dispatcher: whose state is asked for.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_PATIENCE):
                head = await reader.readuntil(b"\r\n\r\n")
            path = head.partition(b" ")[2].partition(b" ")[0].partition(b"?")[0]
            status = ping_status(dispatcher.state) if path in (b"/ping", b"/ping/") else 404
            length = "" if status == 204 else "Content-Length: 0\r\n"
            writer.write(f"HTTP/1.1 {status} {_REASONS[status]}\r\n{length}Connection: close\r\n\r\n".encode())
            await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, sock=sock, limit=_LONGEST)
