"""A receiver of webhooks in a process of its own, which can be killed: what it got is in a file.

As a program: ``receiver.py PORT FILE FAULTS``, where FAULTS is the share of requests that it fails: with a 500, by
closing the connection, or by doing so after it has taken the event.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

if __name__ != "__main__":
    from tests.running import free_port


class Got(NamedTuple):
    """A request that the receiver took."""

    at: float
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["x-webhook-id"]

    @property
    def event(self) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(self.body)
        return event

    @property
    def name(self) -> tuple[str, str]:
        return self.event["type"], self.event["status"]


class Receiver:
    """Starts it, kills it, reads what it got."""

    def __init__(self, file: Path, faults: float = 0.0) -> None:
        self.port, self._file, self._faults = free_port(), file, faults
        self.url = f"http://127.0.0.1:{self.port}/hook"
        self.start()

    def start(self) -> None:
        arguments = [sys.executable, __file__, str(self.port), str(self._file), str(self._faults)]
        self._process = subprocess.Popen(arguments)
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            assert self._process.poll() is None
            time.sleep(0.02)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def got(self, path: str = "/hook") -> list[Got]:
        if not self._file.exists():
            return []
        # a kill may have cut the last line short: such an event was never answered
        lines = [line for line in self._file.read_text().split("\n") if line.endswith("]")]
        found = [Got(at, where, told, body.encode("latin-1")) for at, where, told, body in map(json.loads, lines)]
        return [one for one in found if one.path == path]

    def failed(self) -> int:
        """How many requests it failed."""
        return self._file.with_suffix(".failed").stat().st_size if self._faults else 0

    def wait(self, condition: Callable[[list[Got]], Any], path: str = "/hook", seconds: float = 60) -> list[Got]:
        """What it got, once that is as it should be."""
        deadline = time.monotonic() + seconds
        while not condition(found := self.got(path)):
            assert time.monotonic() < deadline, [one.name for one in found][-20:]
            time.sleep(0.05)
        return found


@contextlib.contextmanager
def receiving(file: Path, faults: float = 0.0) -> Iterator[Receiver]:
    receiver = Receiver(file, faults)
    try:
        yield receiver
    finally:
        receiver.kill()


def check_signatures(got: Got, key: str) -> None:
    """All three of an event, as a receiver would compute them that knows nothing of the sender's code."""
    event = got.event
    sig = event.pop("sig")
    text = json.dumps(event, separators=(",", ":")) + key
    assert sig == hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
    check_headers(got, key)


def check_headers(got: Got, key: str) -> None:
    """Those that any webhook has."""
    parts = dict(part.split("=") for part in got.headers["x-signature"].split(","))
    signed = f"{parts['t']}.{got.id}.".encode() + got.body
    assert parts["v1"] == hmac.new(key.encode(), signed, hashlib.sha256).hexdigest()
    assert abs(int(parts["t"]) - got.at) < 60
    stamp = got.headers["webhook-timestamp"]
    standard = hmac.new(key.encode(), f"{got.headers['webhook-id']}.{stamp}.".encode() + got.body, hashlib.sha256)
    assert got.headers["webhook-signature"] == "v1," + base64.b64encode(standard.digest()).decode()


def _serve(port: int, file: Path, faults: float) -> None:
    out, failed = file.open("a"), file.with_suffix(".failed").open("a")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if len(body) < int(self.headers["Content-Length"]):  # the sender was killed while it sent
                self.close_connection = True
                return
            fault = random.choice(("refuse", "drop", "take and drop")) if random.random() < faults else ""
            if fault:
                failed.write(".")
                failed.flush()
            if fault in ("", "take and drop"):
                told = {name.lower(): value for name, value in self.headers.items()}
                out.write(json.dumps([time.time(), self.path, told, body.decode("latin-1")]) + "\n")
                out.flush()
            if "drop" in fault:
                self.close_connection = True
                return
            self.send_response(500 if fault else 204)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
