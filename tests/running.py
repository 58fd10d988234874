"""A real server in its own process, for tests that speak HTTP to it."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


# Below those that the kernel gives to clients, and each process of a parallel run has its own: between the choice
# and the server's bind nobody else takes one.
_SHARE = 1500
_FIRST = 20_000 + _SHARE * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8)
_ports = itertools.count(secrets.randbelow(_SHARE))


def free_port() -> int:
    """A TCP port of 127.0.0.1 at which nobody listens, another one at each call."""
    while True:
        port = _FIRST + next(_ports) % _SHARE
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port


class Server:
    """A running server and a client for it."""

    module = "api"

    def __init__(self, environ: dict[str, str], log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        env = {
            **os.environ,
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
            "LOG_FORMAT": "json",
            "LOG_LEVEL": "info",
            "STATE_DIR": str(log.with_suffix(".state")),
            **environ,
        }
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module, "serve"],
            cwd=ROOT,
            env=env,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def wait_live(self) -> float:
        """Seconds from start to the first answer."""
        while True:
            with contextlib.suppress(httpx.TransportError):
                self.client.get("/health/live")
                return time.monotonic() - self.began
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.01)

    def wait_ready(self) -> None:
        self.wait_live()
        while self.client.get("/health/ready").status_code != 200:
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def worker_pids(self) -> list[int]:
        out = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "api.worker"], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in out.stdout.split()]

    def post(
        self, model_inputs: dict[str, Any], call_inputs: dict[str, Any] | None = None, **more: Any
    ) -> httpx.Response:
        return self.client.post("/", json={"modelInputs": model_inputs, "callInputs": call_inputs or {}}, **more)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(40)
        finally:
            self.process.kill()
            self.client.close()


@contextlib.contextmanager
def running(environ: dict[str, str], log: Path) -> Iterator[Server]:
    server = Server(environ, log)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def pixels(image: str | bytes) -> np.ndarray:
    """uint8 (H, W, 3) of an image, encoded or base64."""
    data = base64.b64decode(image) if isinstance(image, str) else image
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def images_of(answer: dict[str, Any]) -> list[np.ndarray]:
    """Every image of a native answer."""
    single = answer.get("image_base64")
    return [pixels(single)] if single else [pixels(image) for image in answer["images_base64"]]


def as_base64(array: np.ndarray, image_format: str = "PNG") -> str:
    """An image to send."""
    out = io.BytesIO()
    Image.fromarray(array).save(out, image_format)
    return base64.b64encode(out.getvalue()).decode()
