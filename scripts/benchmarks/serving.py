"""A server of our own for benchmarks, and a client that adds as little as it can."""

from __future__ import annotations

import atexit
import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start(port: int) -> subprocess.Popen[bytes]:
    """Start a server with the demo model."""
    state = tempfile.mkdtemp(prefix="bench-state-")
    atexit.register(shutil.rmtree, state, ignore_errors=True)
    env = {**os.environ, "HOST": "127.0.0.1", "PORT": str(port), "MODEL_ID": "demo/shapes", "LOG_LEVEL": "warning"}
    env["STATE_DIR"] = state
    return subprocess.Popen([sys.executable, "-m", "api", "serve"], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)


def get(port: int, path: str) -> int:
    """The status of a GET, 0 while nothing answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def wait_for(port: int, path: str, limit: float = 120) -> None:
    """Wait until a GET gives 200."""
    deadline = time.monotonic() + limit
    while get(port, path) != 200:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not answer 200 within {limit} s")
        time.sleep(0.002)


@contextlib.contextmanager
def serving() -> Iterator[http.client.HTTPConnection]:
    """A ready server, and a connection to it that stays open."""
    port = free_port()
    process = start(port)
    try:
        wait_for(port, "/health/ready")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection
        connection.close()
    finally:
        process.terminate()
        process.wait(30)
