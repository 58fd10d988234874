"""Keeps the host tier that all workers of a container share: the memory of its parts, and the talk with the workers.

The memory outlives the worker that read it, and leaves when the last one who uses it has let go, however that one ends
(``host_memory``). Everything happens in a thread of its own: to free some gigabytes takes the kernel a moment.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from dataclasses import dataclass

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
    parse_to_keeper,
)
from api.schema.host_tier import Opened as Memory
from api.service.host_memory import new_memory, pair
from api.service.host_tier import Answer, Ask, Freed, HostTier, Opened, Paused, Step

log = logging.getLogger("api.host")

_TICK = 0.25
_PATIENCE = 10.0
"""Seconds that a worker may leave a message unread."""


@dataclass(frozen=True)
class Use:
    """Bytes of the host's memory that parts take, each counted once.

    Attributes:
        held: by parts that a worker has.
        kept: by those that nobody has at the moment.
        limit: that all may take.
    """

    held: int
    kept: int
    limit: int


class _Worker:
    """A worker's end of the talk.

    Args:
        number: another one for each incarnation.
        sock: to it.
    """

    def __init__(self, number: int, sock: socket.socket) -> None:
        self.number = number
        self.sock = sock
        self.sizes: dict[int, int] = {}
        """Bytes of the memory that it has asked for, by the number of the question."""


class HostKeeper:
    """Keeps the tier until ``stop``."""

    def __init__(self) -> None:
        self._tier = HostTier()
        self._memory: dict[str, int] = {}
        self._workers: dict[int, _Worker] = {}
        self._numbers = 0
        self._lock = threading.Lock()
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to serve; before any worker is connected."""
        self._selector = selectors.DefaultSelector()
        self._wakes, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="host-keeper", daemon=True)
        self._thread.start()

    def connect(self) -> socket.socket:
        """The end of a new worker; to be closed here when the worker has it."""
        ours, theirs = pair()
        self.attach(ours)
        return theirs

    def attach(self, ours: socket.socket) -> None:
        """Serve a worker whose end was made before (``pair``)."""
        ours.settimeout(_PATIENCE)
        with self._lock:
            self._numbers += 1
            worker = _Worker(self._numbers, ours)
            self._workers[worker.number] = worker
            self._tier.join(worker.number)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        self._wakes.send(b".")

    def use(self) -> Use:
        """How full it is. May be called from any thread."""
        with self._lock:
            return Use(held := self._tier.held, self._tier.bytes - held, self._tier.limit)

    def stop(self) -> None:
        """Let go of everything; workers that live keep what they have mapped."""
        if self._thread is None:
            return
        self._closing = True
        self._wakes.send(b".")
        self._thread.join()
        with self._lock:
            for descriptor in self._memory.values():
                os.close(descriptor)
            self._memory.clear()
            for worker in self._workers.values():
                worker.sock.close()
        self._selector.close()
        self._wakes.close()
        self._woken.close()

    def _run(self) -> None:
        ticked = time.monotonic()
        while not self._closing:
            try:
                ticked = self._round(ticked)
            except Exception:  # without this thread every worker would wait for an answer, for ever
                log.exception("the keeper of the host tier has stumbled")
                time.sleep(_TICK)

    def _round(self, ticked: float) -> float:
        """Answer who has said something, and tick if it is time; when it last did, ``time.monotonic``."""
        ready = self._selector.select(_TICK if self._tier.waits else None)
        for key, _ in ready:
            if key.data is None:
                self._woken.recv(4096)
                continue
            self._serve(key.data)
        # by the clock: whoever talks all the time is not to keep others from what they wait for
        if not self._tier.waits:
            return time.monotonic()
        if (now := time.monotonic()) - ticked < _TICK:
            return ticked
        with self._lock:
            self._do(self._tier.tick())
        return now

    def _serve(self, worker: _Worker) -> None:
        try:
            data = worker.sock.recv(LARGEST)
            with self._lock:
                if worker.number not in self._workers:
                    return  # it was given up in this very round
                if data:
                    self._do(self._answer(worker, parse_to_keeper(data)))
                else:
                    self._gone(worker)
        except Exception as fault:  # one worker's trouble is no other one's
            if not isinstance(fault, OSError):
                log.exception("a worker's message to the host tier cannot be answered")
            with self._lock:
                self._gone(worker)

    def _answer(self, worker: _Worker, message: ToKeeper) -> list[Step]:
        tier, number = self._tier, worker.number
        match message:
            case Hello(limit):
                tier.limit = tier.limit or limit
                self._send(worker, Settled(tier.limit))
            case Claim(id, sizes, wait):
                return tier.claim(number, id, sizes, wait=wait)
            case Withdraw(id):
                return tier.withdraw(number, id)
            case Open(id, name, size):
                worker.sizes[id] = size
                return tier.open(number, id, name)
            case Read(name, well):
                return tier.read(number, name, well=well)
            case Release(name):
                return tier.release(number, name)
            case Clear():
                return tier.clear()
            case Went():
                return tier.went()
        return []

    def _do(self, steps: list[Step]) -> None:
        for step in steps:
            if isinstance(step, Freed):
                if (descriptor := self._memory.pop(step.name, None)) is not None:
                    os.close(descriptor)
            elif worker := self._workers.get(step.worker):
                try:
                    self._tell(worker, step)
                except OSError:  # it is gone, or hangs
                    self._gone(worker)

    def _tell(self, worker: _Worker, step: Answer | Opened | Ask | Paused) -> None:
        match step:
            case Answer(_, id, what):
                worker.sizes.pop(id, None)
                self._send(worker, Granted(id) if what == "granted" else Later(id) if what == "later" else Refused(id))
            case Ask(_, size):
                self._send(worker, LetGo(size))
            case Paused(_, on):
                self._send(worker, Pause() if on else Resume())
            case Opened(_, id, name, there):
                size = worker.sizes.pop(id)
                if not there:
                    try:
                        self._memory[name] = new_memory(size)
                    except OSError as fault:  # no descriptors
                        log.warning("no memory for a part of %d bytes: %s", size, fault)
                        self._send(worker, Refused(id))
                        self._do(self._tier.read(worker.number, name, well=False))
                        return
                self._send(worker, Memory(id, there), self._memory[name])

    def _send(self, worker: _Worker, message: FromKeeper, descriptor: int | None = None) -> None:
        socket.send_fds(worker.sock, [packed(message)], [] if descriptor is None else [descriptor])

    def _gone(self, worker: _Worker) -> None:
        if self._workers.pop(worker.number, None):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(worker.sock)
            worker.sock.close()
            self._do(self._tier.died(worker.number))
