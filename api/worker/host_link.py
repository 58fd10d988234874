"""The worker's end of the talk with the keeper of the host tier (``service/host_keeper.py``)."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping

from api.engine.common_host import Room
from api.schema.host_tier import (
    LARGEST,
    Claim,
    Clear,
    FromKeeper,
    Granted,
    Hello,
    Later,
    LetGo,
    Open,
    Opened,
    Pause,
    Read,
    Refused,
    Release,
    Resume,
    Settled,
    ToKeeper,
    Went,
    Withdraw,
    packed,
    parse_from_keeper,
)

log = logging.getLogger("api.worker")

_LOOK = 0.2
"""Seconds after which one who waits looks whether it still has to."""
_PATIENCE = 150.0
"""Seconds that jobs of other workers may hold the room that one needs."""

_Answer = Settled | Granted | Later | Refused | Opened


class HostLink:
    """The host tier, over a socket. See ``engine.common_host.HostTier``.

    What is sent goes through a queue: memory may be let go by a garbage collection anywhere, also within these lines.

    Args:
        sock: to the keeper.
        patience: seconds that a claim may wait.

    Attributes:
        waiting: threads that wait for other workers now.
    """

    def __init__(self, sock: socket.socket, patience: float = _PATIENCE) -> None:
        self.on_let_go: Callable[[int], None] = lambda size: None
        self.on_pause: Callable[[bool], None] = lambda paused: None
        self.waiting = 0
        self._sock = sock
        self._patience = patience
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._claiming = threading.Lock()
        self._answers: dict[int, queue.SimpleQueue[tuple[_Answer | None, int]]] = {0: queue.SimpleQueue()}
        self._paused = self._closed = False
        self._out: queue.SimpleQueue[ToKeeper | None] = queue.SimpleQueue()
        self._asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        for name, run in (("hear", self._hear), ("say", self._say), ("let go", self._let_go)):
            threading.Thread(target=run, name=f"host {name}", daemon=True).start()

    def settle(self, limit: int) -> int:
        """Say what models may take here; what all workers together may take.

        Args:
            limit: bytes, as this worker has measured them.

        Raises:
            MemoryError: there is no tier.
        """
        self._out.put(Hello(limit))
        answer, _ = self._answers[0].get()
        if not isinstance(answer, Settled):
            raise MemoryError("the keeper of the host tier is gone")
        return answer.limit

    # --- HostTier ---

    def claim(self, sizes: Mapping[str, int], *, wait: bool, over: Callable[[], bool]) -> Room:
        """See ``HostTier``."""
        if not wait:
            return (
                Room.GRANTED
                if isinstance(self._ask(lambda id: Claim(id, dict(sizes), False)), Granted)
                else Room.REFUSED
            )
        while not self._claiming.acquire(timeout=_LOOK):  # one at a time: the keeper goes by workers
            if self._paused or over():
                return Room.LATER
        try:
            if self._paused:
                return Room.LATER
            until, withdrawn, late = time.monotonic() + self._patience, False, False

            def give_up(id: int) -> None:
                nonlocal withdrawn, late
                late = time.monotonic() > until
                if not withdrawn and (late or over()):
                    withdrawn = True
                    self._out.put(Withdraw(id))

            answer = self._ask(lambda id: Claim(id, dict(sizes), True), give_up)
        finally:
            self._claiming.release()
        if isinstance(answer, Granted):
            return Room.GRANTED
        if isinstance(answer, Later) and not late:
            return Room.LATER
        total = sum(sizes.values()) / 1e9
        why = "is in use by other workers" if late else "is what all workers may take together"
        raise MemoryError(f"there is no room for {total:.2f} GB in the host's memory: RAM_LIMIT {why}")

    def open(self, name: str, size: int) -> tuple[int, bool]:
        """See ``HostTier``."""
        id, answers = self._question()
        try:
            self._out.put(Open(id, name, size))
            self.waiting += 1
            answer, descriptor = answers.get()
        finally:
            self.waiting -= 1
            self._forget(id)
        if not isinstance(answer, Opened) or descriptor < 0:
            raise MemoryError("the host tier has no memory for a part")
        return descriptor, answer.there

    def read(self, name: str, *, well: bool) -> None:
        """See ``HostTier``."""
        self._out.put(Read(name, well))

    def release(self, name: str) -> None:
        """See ``HostTier``."""
        self._out.put(Release(name))

    def clear(self) -> None:
        """See ``HostTier``."""
        self._out.put(Clear())

    # --- talk ---

    def _question(self) -> tuple[int, queue.SimpleQueue[tuple[_Answer | None, int]]]:
        with self._lock:
            id = next(self._ids)
            answers = self._answers[id] = queue.SimpleQueue()
            if self._closed:
                answers.put((None, -1))
            return id, answers

    def _forget(self, id: int) -> None:
        with self._lock:
            del self._answers[id]

    def _ask(
        self, question: Callable[[int], ToKeeper], meanwhile: Callable[[int], None] = lambda id: None
    ) -> _Answer | None:
        id, answers = self._question()
        self._out.put(question(id))
        try:
            self.waiting += 1
            while True:
                try:
                    return answers.get(timeout=_LOOK)[0]
                except queue.Empty:
                    meanwhile(id)
        finally:
            self.waiting -= 1
            self._forget(id)

    def _say(self) -> None:
        try:
            while (message := self._out.get()) is not None:
                self._sock.send(packed(message))
        except OSError:
            pass  # the keeper is gone, which who listens hears

    def _hear(self) -> None:
        try:
            while True:
                data, descriptors, _, _ = socket.recv_fds(self._sock, LARGEST, 1, socket.MSG_CMSG_CLOEXEC)
                if not data:
                    break
                self._heard(parse_from_keeper(data), descriptors)
        except OSError:
            pass
        with self._lock:
            self._closed = True
            for answers in self._answers.values():
                answers.put((None, -1))
        self._out.put(None)

    def _heard(self, message: FromKeeper, descriptors: list[int]) -> None:
        match message:
            case LetGo(size):
                self._asked.put(size)
            case Pause() | Resume():
                self._paused = isinstance(message, Pause)
                self.on_pause(self._paused)
            case _:
                id = 0 if isinstance(message, Settled) else message.id
                with self._lock:
                    answers = self._answers.get(id)
                if answers:
                    answers.put((message, descriptors[0] if descriptors else -1))
                else:
                    for descriptor in descriptors:
                        os.close(descriptor)

    def _let_go(self) -> None:
        while True:
            size = self._asked.get()
            try:
                self.on_let_go(size)
            except Exception:  # the others still have to hear that they need not wait
                log.exception("the host's memory cannot be let go")
            self._out.put(Went())
