"""One worker process per device: started, watched, talked to, and started again when it dies.

The worker is started by module name and spoken to in frames over a socket pair, so this process
never imports what it runs. When this process ends, however it ends, the worker reads the end of
the stream and ends too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

from api.schema.messages import (
    HEADER,
    AboutJob,
    FromWorker,
    Generate,
    Load,
    Loaded,
    Ready,
    ToWorker,
    frame,
    parse_from_worker,
)

log = logging.getLogger("api.workers")

_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
"""A worker reads models from disk and nowhere else."""
_QUICK_DEATH = 10.0
"""A worker that dies this soon (seconds) after its start counts as failing to start."""
_MAX_QUICK_DEATHS = 5


class Worker:
    """One device's worker process, whichever incarnation of it lives now.

    Args:
        device: e.g. ``cuda:0`` or ``cpu``.
        warm: messages to send to every incarnation when it is ready.
        on_message: called with every message about a job.
        on_state: called when the worker becomes ready or dies; ``worker.ready`` says which.
    """

    def __init__(
        self,
        device: str,
        warm: list[Load],
        on_message: Callable[[Worker, AboutJob], None],
        on_state: Callable[[Worker], None],
    ) -> None:
        self.device = device
        self.info: Ready | None = None
        self.models: dict[str, int] = {}
        self.ready = False
        self.restarts = 0
        self.defunct = False
        self.running: str | None = None
        self.model: str | None = None
        self._warm = warm
        self._on_message = on_message
        self._on_state = on_state
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """The process id of the living incarnation."""
        return self._process.pid if self._process and self._process.returncode is None else None

    def start(self) -> None:
        """Start the process and keep it alive until ``stop``."""
        self._watch = asyncio.get_running_loop().create_task(self._keep_alive(), name=f"worker {self.device}")

    async def stop(self) -> None:
        """End the process: its socket closes, and it is killed if that does not do."""
        self._stopping = True
        if self._writer:
            self._writer.close()
        if self._process and self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), 3)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._watch:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch

    def send(self, message: ToWorker) -> None:
        """Send a message to the living incarnation."""
        assert self._writer is not None
        if isinstance(message, Generate):
            self.running, self.model = message.request.id, message.request.model.key
        self._writer.write(frame(message))

    async def _keep_alive(self) -> None:
        quick_deaths = 0
        while not self._stopping:
            began = time.monotonic()
            await self._run_once()
            if self._stopping:
                return
            quick_deaths = quick_deaths + 1 if time.monotonic() - began < _QUICK_DEATH else 0
            if quick_deaths >= _MAX_QUICK_DEATHS:
                log.error("worker %s died %d times right after its start: giving up", self.device, quick_deaths)
                self.defunct = True
                self._on_state(self)
                return
            self.restarts += 1
            await asyncio.sleep(min(0.1 * 2**quick_deaths, 5) if quick_deaths else 0)

    async def _run_once(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "api.worker",
                str(theirs.fileno()),
                self.device,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, **_ENVIRONMENT},
                stdin=asyncio.subprocess.DEVNULL,
            )
        self._process = process
        reader, self._writer = await asyncio.open_connection(sock=ours)
        for message in self._warm:
            self.send(message)
        try:
            await self._read(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.ready, self.models, self.info = False, {}, None
            self._writer.close()
        code = await process.wait()
        if not self._stopping:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            log.error("worker %s (pid %d) ended: %s", self.device, process.pid, how)
            self._on_state(self)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while True:
            (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
            self._receive(parse_from_worker(await reader.readexactly(length)))

    def _receive(self, message: FromWorker) -> None:
        if isinstance(message, Ready):
            self.info, self.ready = message, True
            log.info("worker %s is ready (%s)", message.device, message.device_name)
            self._on_state(self)
        elif isinstance(message, Loaded):
            self.models = message.models
        else:
            self._on_message(self, message)
