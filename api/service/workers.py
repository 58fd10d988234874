"""One worker process per device: started, watched, talked to, and started again when it dies.

The worker is started by module name and spoken to in frames over a socket pair, so this process
never imports what it runs. When this process ends, however it ends, the worker reads the end of
the stream and ends too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass

from api.schema.counts import Counts, DeviceMemory, plus
from api.schema.generation import ModelRef
from api.schema.messages import (
    DEVICE_LOST,
    HEADER,
    AboutJob,
    Alive,
    Answer,
    Cancel,
    Counted,
    Due,
    FromWorker,
    Held,
    Load,
    Loaded,
    Memory,
    Plan,
    Ready,
    Stage,
    Unload,
    frame,
    parse_from_worker,
)
from api.service.host_keeper import HostKeeper
from api.service.spawning import Spawned, command, environment

log = logging.getLogger("api.workers")

_MAX_FAILED_STARTS = 5
"""After so many deaths in a row before it was ready, a worker is DEFUNCT until a start succeeds."""
_FAULTS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
"""What a process dies of by itself."""
_LONGEST_PAUSE = 30.0
"""Seconds between two starts, at most."""
_RESTORES = 3
"""How many incarnations are asked to bring back a model: one that dies meanwhile may have died of it."""

_SHUTS_DOWN = "NOT_READY", "The server is shutting down; send the request again."


@dataclass
class _Lost:
    """A model that was in a worker's memory when it died, and how many were asked to bring it back."""

    held: Held
    tries: int = 0


class Worker:
    """One device's worker process, whichever incarnation of it lives now.

    Args:
        device: e.g. ``cuda:0`` or ``cpu``.
        patience: seconds that it may make no progress, and that it may be silent at most, before it is killed; a start
            is silent until torch is imported.
        on_message: called with every message about a job.
        on_state: called when the worker becomes ready or dies; ``worker.ready`` says which.
        workers: how many share the host's memory.
        keeper: of what they share of it; None: each has a part of its own.

    Attributes:
        running: ids of the jobs that share the device.
        alone: the one job that runs has the worker for itself, until its images are encoded.
        encoding: ids of jobs whose images are being encoded, beside the device's work.
        crashed: its last death points at what it ran: it hung, its device was lost, or it had a fault. One that
            somebody else killed, such as the kernel for want of memory, does not.
        defunct: it does not start; tried again now and then.
        models: what is in its memory, by key, least recently used first.
        memory: how full its tiers are.
        allocated: what it has of a GPU's memory.
        staged: the models that it was last asked to read ahead.
        spawned: the first incarnation, where it was started before the service was there.
    """

    def __init__(
        self,
        device: str,
        patience: float,
        on_message: Callable[[Worker, AboutJob], None],
        on_state: Callable[[Worker], None],
        workers: int = 1,
        keeper: HostKeeper | None = None,
    ) -> None:
        self.device = device
        self._keeper = keeper
        self.info: Ready | None = None
        self.models: dict[str, Held] = {}
        self.memory: Memory | None = None
        self.allocated: DeviceMemory | None = None
        self._counts = Counts()
        self._counted_before = Counts()
        self.staged: list[ModelRef] = []
        self._lost: dict[str, _Lost] = {}
        self._leaving: dict[str, str] = {}
        """Models that were unloaded before it was ready, and where they stay."""
        self._asked: dict[str, asyncio.Future[Answer]] = {}
        self._workers = workers
        self.ready = False
        self.restarts = 0
        self.defunct = False
        self.running: set[str] = set()
        self.alone = False
        self.encoding: set[str] = set()
        self.crashed = False
        self._warm: list[Load] = []
        self._patience = patience
        self._alarm: asyncio.TimerHandle | None = None
        self._on_message = on_message
        self._on_state = on_state
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | Spawned | None = None
        self.spawned: Spawned | None = None
        self._watch: asyncio.Task[None] | None = None
        self._stopping = False
        self._was_ready = False

    @property
    def pid(self) -> int | None:
        """The process id of the living incarnation."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def free(self) -> int:
        """How many more jobs it can take now."""
        if not self.ready or self.info is None or (self.alone and (self.running or self.encoding)):
            return 0
        return self.info.slots - len(self.running)

    @property
    def counts(self) -> Counts:
        """What it has counted, all incarnations together; what one did in its last two seconds is lost with it."""
        return plus(self._counted_before, self._counts)

    @property
    def pinned(self) -> list[ModelRef]:
        """The models that are pinned to its memory, or will be once more. May be called from any thread."""
        lost = [lost.held for lost in list(self._lost.values())]
        return [held.ref for held in [*self.models.values(), *lost] if held.pin]

    def start(self) -> None:
        """Start the process and keep it alive until ``stop``."""
        self._watch = asyncio.get_running_loop().create_task(self._keep_alive(), name=f"worker {self.device}")

    async def stop(self) -> None:
        """End the process: its socket closes, and it is killed if that does not do."""
        self._stopping = True
        self._answer_all(*_SHUTS_DOWN)
        if self._alarm:
            self._alarm.cancel()
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

    def warm(self, load: Load) -> None:
        """Have a model loaded, by this incarnation and by every later one."""
        self._warm.append(load)
        if self._writer and not self._writer.is_closing():
            self.send(load)

    def has(self, key: str, tier: str) -> bool:
        """Whether all of a model is in ``device`` or ``host`` memory."""
        return key in self.models and self.models[key].tier == tier

    async def ask(self, message: Load | Unload | Plan) -> Answer:
        """Send a message and wait until it is done."""
        if self._stopping:
            return Answer(message.id, *_SHUTS_DOWN)
        if not self.ready:
            return Answer(message.id, "NOT_READY", "The worker is not ready; send the request again later.")
        asked = self._asked[message.id] = asyncio.get_running_loop().create_future()
        try:
            self.send(message)
            return await asked
        finally:
            del self._asked[message.id]

    def forget(self, means: Callable[[ModelRef], bool], to: str) -> set[str]:
        """Not bring back a model that was lost when the last incarnation died.

        Args:
            means: whether it is that model.
            to: where it stays; see ``Unload``.

        Returns:
            The keys of those that it was asked to bring back, and may be about to: they are to be unloaded.
        """
        keys = {key for key, lost in self._lost.items() if means(lost.held.ref)}
        for key in keys:
            del self._lost[key]
        if self.ready:
            return keys
        # it loads those that every incarnation loads, and hears of nothing else until it is ready
        self._leaving |= {load.model.key: to for load in self._warm if means(load.model)}
        return keys

    def _answer_all(self, code: str, message: str) -> None:
        for id, asked in self._asked.items():
            if not asked.done():
                asked.set_result(Answer(id, code, message))

    def stage(self, refs: list[ModelRef]) -> None:
        """Have these models, and no others, read ahead."""
        if refs != self.staged:
            self.staged = refs
            self.send(Stage(refs))

    def send(self, message: Load | Unload | Plan | Stage | Due | Cancel) -> None:
        """Send a message to the living incarnation."""
        self._write(frame(message))

    def run(self, job_id: str, framed: bytes) -> None:
        """Give the device a job.

        Args:
            job_id: its id.
            framed: its ``Generate`` message, encoded when it was admitted, where a fault is the client's.
        """
        self.running.add(job_id)
        self._write(framed)

    def _write(self, data: bytes) -> None:
        assert self._writer is not None
        self._writer.write(data)

    async def _keep_alive(self) -> None:
        """Start the process again whenever it ends. Nothing but ``stop`` ends this."""
        failed_starts = 0
        while not self._stopping:
            self._was_ready = False
            try:
                await self._run_once()
            except Exception:  # no descriptors, no memory, a message that cannot be read: try again
                log.exception("worker %s cannot be run", self.device)
                self.crashed = True
                await self._kill()
                self._ended()
            if self._stopping:
                return
            failed_starts = 0 if self._was_ready else failed_starts + 1
            if failed_starts == _MAX_FAILED_STARTS:
                log.error("worker %s does not start; it is tried again every %g s", self.device, _LONGEST_PAUSE)
                self.defunct = True
                self._on_state(self)
            self.restarts += 1
            await asyncio.sleep(min(0.1 * 2**failed_starts, _LONGEST_PAUSE) if failed_starts else 0)

    def _heard(self, stalled: float) -> None:
        """It was started, or gave a sign of life."""
        if self._alarm:
            self._alarm.cancel()
        if stalled > self._patience:
            self._hung(f"makes no progress for {stalled:.0f} s")
        else:
            self._alarm = asyncio.get_running_loop().call_later(self._patience, self._hung, "says nothing any more")

    def _hung(self, how: str) -> None:
        log.error("worker %s %s: it is killed and started again", self.device, how)
        self.crashed = True
        if self._process and self._process.returncode is None:
            self._process.kill()

    async def _kill(self) -> None:
        if self._process and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def _ended(self) -> None:
        """The process is gone, and with it everything that is known of it."""
        had = (held for held in reversed(self.models.values()) if held.pin or held.tier == "device")
        # what it was still to bring back is known better from the one before
        self._lost = {held.ref.key: _Lost(held) for held in had} | self._lost
        self.ready, self.models, self.info, self.memory, self.staged = False, {}, None, None, []
        self._counted_before, self._counts, self.allocated = self.counts, Counts(), None
        self._answer_all("WORKER_DIED", "The worker died meanwhile; send the request again.")
        if self._alarm:
            self._alarm.cancel()
        if self._writer:
            self._writer.close()
        self._on_state(self)

    async def _born(self) -> tuple[asyncio.subprocess.Process | Spawned, socket.socket]:
        """The next incarnation, and our end of its socket."""
        if self.spawned is not None:
            first, self.spawned = self.spawned, None
            if self._keeper and first.tier:
                self._keeper.attach(first.tier)
            return first, first.sock
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as given:
            sockets = [given.enter_context(theirs)]
            if self._keeper:
                sockets.append(given.enter_context(self._keeper.connect()))
            numbers = [sock.fileno() for sock in sockets]
            process = await asyncio.create_subprocess_exec(
                *command(self.device, numbers[0], self._workers, *numbers[1:]),
                pass_fds=numbers,
                env=environment(),
                stdin=asyncio.subprocess.DEVNULL,
            )
        return process, ours

    async def _run_once(self) -> None:
        process, ours = await self._born()
        self._process, self._writer, self.crashed = process, None, False
        self._heard(0.0)
        reader, self._writer = await asyncio.open_connection(sock=ours)
        for message in self._warm:
            self.send(message)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await self._read(reader)
        code = await process.wait()
        if not self._stopping:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            log.error("worker %s (pid %d) ended: %s", self.device, process.pid, how)
            self.crashed = self.crashed or code == DEVICE_LOST or -code in _FAULTS
            self._ended()

    def _restore(self) -> None:
        """Have the models back that requests had brought into its memory, those used last first, as far as they fit."""
        warm = {load.model.key for load in self._warm}
        for key, lost in sorted(self._lost.items(), key=lambda item: not item[1].held.pin):
            held, lost.tries = lost.held, lost.tries + 1
            if lost.tries > _RESTORES:
                log.warning("worker %s died %d times before %s was loaded again: given up", self.device, _RESTORES, key)
                del self._lost[key]
            elif held.pin or key not in warm:
                self.send(Load(held.ref, key, held.pin or "device", pin=bool(held.pin), evict=False))
            else:
                del self._lost[key]

    def _restored(self, key: str, answer: Answer) -> None:
        lost = self._lost.pop(key)
        if answer.code and lost.held.pin:
            log.warning("worker %s: %s is pinned no more: %s %s", self.device, key, answer.code, answer.message)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while True:
            (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
            self._receive(parse_from_worker(await reader.readexactly(length)))

    def _receive(self, message: FromWorker) -> None:
        if isinstance(message, Ready):
            self.info, self.ready, self._was_ready, self.defunct = message, True, True, False
            log.info(
                "worker %s is ready (%s): torch was imported after %.1f s, the rest took %.1f s",
                message.device,
                message.device_name,
                message.torch_ms / 1000,
                (message.ready_ms - message.torch_ms) / 1000,
            )
            self._heard(0.0)
            for key, to in self._leaving.items():
                self.send(Unload(key, "", to))
            self._leaving.clear()
            self._restore()
            self._on_state(self)
        elif isinstance(message, Loaded):
            self.models, self.memory = message.models, message.memory
        elif isinstance(message, Answer):
            if (asked := self._asked.get(message.id)) and not asked.done():
                asked.set_result(message)
            elif message.id in self._lost:
                self._restored(message.id, message)
        elif isinstance(message, Alive):
            self._heard(message.stalled)
        elif isinstance(message, Counted):
            self._counts, self.allocated = message.counts, message.memory
        else:
            self._on_message(self, message)
