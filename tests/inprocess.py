"""The app over HTTP in the test's own process, without a worker: for what is said before one is asked."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from sanic import Sanic

from api.http.app import build_app
from api.http.connections import Connection
from api.service.service import Service
from api.settings import Settings

_names = itertools.count()


def service_of(**environ: str) -> Service:
    """A service that is not started."""
    return Service(Settings.from_env({"DEVICES": "cpu", "RUNTIME_DOWNLOADS": "0", **environ}))


def app_of(service: Service, monkeypatch: pytest.MonkeyPatch) -> Sanic:
    """Its app, which starts no worker."""

    async def stop() -> None: ...

    monkeypatch.setattr(service, "start", lambda: None)
    monkeypatch.setattr(service, "stop", stop)
    return build_app(service, f"in-process-{next(_names)}")


@contextlib.asynccontextmanager
async def serving(app: Sanic) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app, at a port of its own."""
    app.config.TOUCHUP = False  # it can rewrite Sanic's code once in a process only
    sock = socket.create_server(("127.0.0.1", 0))
    server: Any = await app.create_server(sock=sock, return_asyncio_server=True, protocol=Connection)
    await server.startup()
    await server.before_start()
    await server.start_serving()
    await server.after_start()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            yield client
    finally:
        server.close()
        await server.wait_closed()
        for connection in list(server.connections):
            connection.abort()
        Sanic.unregister_app(app)
