"""Looks names up, a few at once: a name server that does not answer must not keep others waiting.

A look-up takes a thread of those that everything else that blocks shares, and cannot be ended: whoever names hosts
whose name servers are silent would take all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any
from weakref import WeakKeyDictionary

_AT_ONCE = 16
_gates: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


async def look_up(host: str, port: int) -> list[str]:
    """The IP addresses of a name, each once.

    Raises:
        OSError: it has none, or nobody says.
        UnicodeError: it is no name.
    """
    loop = asyncio.get_running_loop()
    gate = _gates.setdefault(loop, asyncio.Semaphore(_AT_ONCE))
    await gate.acquire()
    asking = asyncio.ensure_future(loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))

    def done(asked: asyncio.Task[Any]) -> None:
        gate.release()  # only now, also where nobody waits any more: until then it has its thread
        with contextlib.suppress(asyncio.CancelledError):
            asked.exception()

    asking.add_done_callback(done)
    found = await asyncio.shield(asking)
    return list(dict.fromkeys(str(info[4][0]) for info in found))
