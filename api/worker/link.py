"""The worker's end of the socket: messages in, messages out, and the end of the parent."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import socket
import threading

from api.schema.messages import (
    HEADER,
    Cancel,
    Due,
    FromWorker,
    Generate,
    Load,
    Plan,
    Stage,
    Unload,
    frame,
    parse_to_worker,
)


class Link:
    """The socket to the service.

    A thread of its own reads it, so that a cancel is heard while a job runs, and so that this
    process ends at once when the parent is gone, whatever it is doing.

    Args:
        sock: connected.

    Attributes:
        inbox: what is to be done, in order.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self.inbox: queue.SimpleQueue[Load | Unload | Stage | Plan | Generate | Cancel] = queue.SimpleQueue()
        self._known: set[str] = set()
        self._cancelled: set[str] = set()
        self._due: dict[str, Due] = {}
        threading.Thread(target=self._listen, name="link", daemon=True).start()

    def send(self, message: FromWorker) -> None:
        """Send a message; from any thread."""
        data = frame(message)
        with self._sending:
            self._sock.sendall(data)

    def is_cancelled(self, job_id: str) -> bool:
        """Whether the service has asked to stop this job."""
        return job_id in self._cancelled

    def due(self, job_id: str) -> Due:
        """How long a job may wait."""
        return self._due.get(job_id) or Due(job_id, math.inf, math.inf)

    def forget(self, job_id: str) -> None:
        """The job is over: a cancel that comes late means nothing."""
        self._known.discard(job_id)
        self._cancelled.discard(job_id)
        self._due.pop(job_id, None)

    def _listen(self) -> None:
        with contextlib.suppress(OSError), self._sock.makefile("rb") as stream:
            while header := stream.read(HEADER.size):
                message = parse_to_worker(stream.read(HEADER.unpack(header)[0]))
                if isinstance(message, Cancel):
                    if message.id in self._known:
                        self._cancelled.add(message.id)
                        self.inbox.put(message)
                    continue
                if isinstance(message, Due):
                    self._due[message.id] = message
                    continue
                if isinstance(message, Generate):
                    self._known.add(message.request.id)
                self.inbox.put(message)
        os._exit(0)
