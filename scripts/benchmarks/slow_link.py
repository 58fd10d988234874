"""A relay in front of a server that makes it as slow as a real one: latency, and a limit for each connection or all.

nginx has ``limit_rate``, but counts it per request and gives the first second's bytes at once: ranges of a few MiB
are not slowed at all. Object stores and content networks limit each connection, whatever is asked over it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from scripts.benchmarks.serving import ROOT, free_port

_TICK = 0.005  # seconds' worth of bytes that go on at once
_PIPE = 2**20


class Pace:
    """Bytes a second, over whoever shares it."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._due = 0.0
        self._lock = threading.Lock()

    def wait(self, count: int) -> None:
        """Wait until ``count`` bytes may have gone on."""
        with self._lock:
            # a connection that was idle has nothing saved up
            self._due = due = max(self._due, time.monotonic() - _TICK) + count / self.rate
        time.sleep(max(0.0, due - time.monotonic()))


def relay(client: socket.socket, port: int, pace: Pace, delay: float) -> None:
    """Requests with a delay, answers at a pace; without copying them."""
    server = socket.create_connection(("127.0.0.1", port))

    def ask() -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                time.sleep(delay)
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    threading.Thread(target=ask, daemon=True).start()
    out, into = os.pipe()
    with contextlib.suppress(OSError):
        while count := os.splice(server.fileno(), into, max(4096, min(_PIPE // 16, int(pace.rate * _TICK)))):
            pace.wait(count)
            while count:
                count -= os.splice(out, client.fileno(), count)
    for descriptor in (out, into):
        os.close(descriptor)
    for end in (client, server):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


@contextlib.contextmanager
def slowed(port: int, *, rate: float, delay: float = 0.0, shared: bool = False) -> Iterator[int]:
    """The port of a relay to ``port``, in a process of its own: bytes and seconds; ``shared``: over all connections."""
    own = free_port()
    arguments = [str(own), str(port), str(rate), str(delay), *(["--shared"] if shared else [])]
    process = subprocess.Popen([sys.executable, "-m", "scripts.benchmarks.slow_link", *arguments], cwd=ROOT)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", own)):
                break
            time.sleep(0.05)
        yield own
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Relay until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("own", type=int)
    parser.add_argument("port", type=int)
    parser.add_argument("rate", type=float)
    parser.add_argument("delay", type=float)
    parser.add_argument("--shared", action="store_true")
    args = parser.parse_args()
    common = Pace(args.rate)
    with socket.create_server(("127.0.0.1", args.own), backlog=128) as listener:
        while True:
            client, _ = listener.accept()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pace = common if args.shared else Pace(args.rate)
            threading.Thread(target=relay, args=(client, args.port, pace, args.delay), daemon=True).start()


if __name__ == "__main__":
    main()
