"""The command line: ``python -m api serve | models``."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

from api import __version__, logs
from api.errors import ApiError
from api.settings import Settings, SettingsError

if TYPE_CHECKING:
    from sanic import Sanic


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m api", description="One container that serves every diffusers model."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve_parser = commands.add_parser("serve", help="start the server", description="Start the server.")
    serve_parser.add_argument("--host", help="address to listen on (HOST)")
    serve_parser.add_argument("--port", help="port to listen on (PORT)")
    serve_parser.add_argument("--model-id", help="the default model (MODEL_ID)")
    serve_parser.set_defaults(run=serve)
    models_parser = commands.add_parser("models", help="list the installed models")
    models_parser.set_defaults(run=models)
    args = parser.parse_args(arguments)
    given = {name.upper(): str(value) for name, value in vars(args).items() if value is not None}
    try:
        settings = Settings.from_env({**os.environ, **{n: v for n, v in given.items() if n not in ("COMMAND", "RUN")}})
        return int(args.run(settings))
    except SettingsError as fault:
        print(f"The environment has values that cannot be used: {fault}", file=sys.stderr)
    except OSError as fault:
        print(f"Cannot listen on {settings.host}:{settings.port}: {fault.strerror or fault}.", file=sys.stderr)
    except ApiError as error:
        more = f" There are: {', '.join(error.available)}." if error.available else ""
        print(f"{error.message}{more}", file=sys.stderr)
    return 2


def serve(settings: Settings) -> int:
    """Start the server and run until it is told to stop."""
    from api.http.app import build_app
    from api.service.service import Service

    began = time.perf_counter()
    logs.configure(settings.log_format, settings.log_level)
    sock = _listen(settings)
    url = _url(settings.host, sock.getsockname()[1])
    app = build_app(Service(settings))

    @app.after_server_start
    async def announce(app: Sanic) -> None:
        app.ctx.announcement = asyncio.create_task(_say_when_ready(app, url, settings.model_id, began))

    @app.before_server_stop
    async def hush(app: Sanic) -> None:
        app.ctx.announcement.cancel()

    app.run(sock=sock, single_process=True, motd=False, access_log=False)
    return 0


def _listen(settings: Settings) -> socket.socket:
    """The listening socket, opened here so that what is wrong with it is said in a sentence.

    Raises:
        OSError: the address is in use, is not ours, or does not exist.
    """
    family, _, _, _, address = socket.getaddrinfo(
        settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.create_server(address[:2], family=family, backlog=1024)
    sock.set_inheritable(True)
    return sock


def _url(host: str, port: int) -> str:
    shown = "localhost" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/"


async def _say_when_ready(app: Any, url: str, model_id: str, began: float) -> None:
    dispatcher = app.ctx.service.dispatcher
    print(f"Starting on {url} with {model_id or 'no default model'} …", flush=True)
    while dispatcher.state == "STARTING":
        await asyncio.sleep(0.05)
    if dispatcher.state in ("READY", "BUSY"):
        print(f"Ready after {time.perf_counter() - began:.1f} s: {url}", flush=True)


def models(settings: Settings) -> int:
    """List the installed models."""
    from api.models.library import Library

    for model in Library(settings).all():
        print(f"{model.model_id}  {model.revision}  {model.bytes / 1e6:.1f} MB  {model.class_name}  {model.folder}")
    return 0
