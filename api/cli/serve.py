"""``python -m api serve``."""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

from api import logs
from api.cli.text import amount
from api.settings import Settings

if TYPE_CHECKING:
    from sanic import Sanic

_TELL_EVERY = 5.0
"""Seconds between two lines about models that are still on their way."""


def serve(settings: Settings, args: argparse.Namespace) -> int:
    """Start the server and run until it is told to stop."""
    from api.http.app import build_app
    from api.http.connections import Connection
    from api.http.health_port import listen
    from api.service.service import Service

    began = time.perf_counter()
    logs.configure(settings.log_format, settings.log_level)
    port = settings.port
    try:
        sock = _listen(settings.host, port)
        port = settings.port_health
        health = _listen(settings.host, port) if port not in (0, settings.port) else None
    except OSError as fault:
        print(f"Cannot listen on {settings.host}:{port}: {fault.strerror or fault}.", file=sys.stderr)
        return 2
    url = _url(settings.host, sock.getsockname()[1])
    service = Service(settings)
    service.open()
    app = build_app(service)

    @app.after_server_start
    async def announce(app: Sanic) -> None:
        app.ctx.announcement = asyncio.create_task(_say_when_ready(app, url, settings.model_id, began))

    if health is not None:

        @app.after_server_start
        async def answer_pings(app: Sanic) -> None:
            app.ctx.health = await listen(health, service.dispatcher)

    @app.before_server_stop
    async def hush(app: Sanic) -> None:
        app.ctx.announcement.cancel()

    app.run(sock=sock, single_process=True, motd=False, access_log=False, protocol=Connection)
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """The listening socket, opened here so that what is wrong with it is said in a sentence.

    Raises:
        OSError: the address is in use, is not ours, or does not exist.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    sock = socket.create_server(address[:2], family=family, backlog=1024)
    sock.set_inheritable(True)
    return sock


def _url(host: str, port: int) -> str:
    shown = "localhost" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/"


async def _say_when_ready(app: Any, url: str, model_id: str, began: float) -> None:
    dispatcher = app.ctx.service.dispatcher
    print(f"Starting on {url} with {model_id or 'no default model'} …", flush=True)
    told = time.monotonic()
    while dispatcher.state == "STARTING":
        await asyncio.sleep(0.05)
        if time.monotonic() - told >= _TELL_EVERY:
            told = time.monotonic()
            for transfer in app.ctx.service.fetcher.transfers():
                of = f" of {amount(transfer.total)}" if transfer.total else ""
                print(f"{transfer.kind} {transfer.model_id}: {amount(transfer.done)}{of}", flush=True)
    if dispatcher.state in ("READY", "BUSY"):
        print(f"Ready after {time.perf_counter() - began:.1f} s: {url}", flush=True)
