"""The queue and who takes from it: a bounded line of jobs, as many at once to each worker as it has slots."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from zlib import crc32

from api.errors import ApiError
from api.order import Order
from api.schema.generation import ModelRef
from api.schema.messages import AboutJob, Cancel, Computed, Done, Due, Failed, Load
from api.service.blame import Blame
from api.service.host_keeper import HostKeeper
from api.service.host_memory import is_possible
from api.service.jobs import Job
from api.service.placing import Placing
from api.service.watch import Watch
from api.service.workers import Worker
from api.settings import Settings

log = logging.getLogger("api.dispatch")

_AHEAD = 256
"""How many jobs in line are looked at for what to read ahead."""
_FIRST_GUESS = 2.0
"""Seconds a job is thought to take before any has been measured."""
_WEIGHT = 0.2
"""Of the last job in the mean."""


class Dispatcher:
    """Feeds the workers.

    Jobs whose model is in a worker's memory go first, within the bounds of ``Order``. A job goes to a worker with a
    free slot that has its model in memory, or will have it, since it was given a job of it. Where these are full,
    ``Placing`` says for how long it waits for one before it goes to any other; once it has been passed for as long as
    ``Order`` allows, it goes to any at once. Workers are told the models of the jobs that wait, to read them ahead.
    When a worker dies, ``Blame`` says what becomes of the jobs that it ran.

    Args:
        settings: the size of the queue, timeouts.
        devices: one worker is started for each.

    Attributes:
        initializing: models that are to be in memory from the start are still being fetched.
        expected: requests that wait for their model to be fetched: they count as queued.
        watch: told of jobs that are over.
        keeper: of the host's memory that the workers share; None: there is one, or this kernel has no such memory.
    """

    def __init__(self, settings: Settings, devices: tuple[str, ...]) -> None:
        self._settings = settings
        self._queue: Order[Job] = Order(settings.max_switch_wait)
        self.initializing = False
        self.expected = 0
        self.watch = Watch()
        self._warm: list[Load] = []
        self._jobs: dict[str, Job] = {}
        self.keeper = HostKeeper() if len(devices) > 1 and is_possible() else None
        self.workers = [
            Worker(device, settings.watchdog_timeout, self._on_message, self._on_state, len(devices), self.keeper)
            for device in devices
        ]
        self._seconds = _FIRST_GUESS
        self._blame = Blame()
        self._placing = Placing()
        self._look_again: asyncio.TimerHandle | None = None
        self.draining = False

    def start(self) -> None:
        """Start every worker."""
        if self.keeper:
            self.keeper.start()
        for worker in self.workers:
            worker.start()

    async def stop(self) -> None:
        """Refuse new jobs, give running ones DRAIN_TIMEOUT, then end the workers."""
        self.draining = True
        for job in self._queue.waiting():
            self._finish(job, ApiError("NOT_READY", "The server is shutting down; send the request again."))
        deadline = time.monotonic() + self._settings.drain_timeout
        while self._jobs and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for job in list(self._jobs.values()):
            self._finish(job, ApiError("NOT_READY", "The server shut down before the job was done; send it again."))
        await asyncio.gather(*(worker.stop() for worker in self.workers))
        if self.keeper:
            await asyncio.to_thread(self.keeper.stop)

    @property
    def queued(self) -> int:
        """How many jobs wait."""
        return len(self._queue)

    @property
    def state(self) -> str:
        """STARTING, READY, BUSY (no worker has a free slot), DRAINING or DEFUNCT."""
        if self.draining:
            return "DRAINING"
        if all(worker.defunct for worker in self.workers):
            return "DEFUNCT"
        ready = [worker for worker in self.workers if worker.ready]
        if not ready or self.initializing:
            return "STARTING"
        return "READY" if any(worker.free for worker in ready) else "BUSY"

    def states(self) -> Counter[tuple[str, str]]:
        """How many jobs there are here, by kind (``connection`` or ``later``) and state."""
        return Counter(("later" if job.for_later else "connection", job.state.value) for job in self._jobs.values())

    def warm(self, ref: ModelRef) -> None:
        """Load a model on every worker, now and whenever one starts again."""
        load = Load(ref)
        self._warm.append(load)
        for worker in self.workers:
            worker.warm(load)

    @property
    def warm_models(self) -> list[ModelRef]:
        """The models that every worker is to have in memory."""
        return [load.model for load in self._warm]

    def folders(self) -> set[str]:
        """Names of the folders that jobs, warm and pinned models need. May be called from any thread."""
        refs = [stage.model for job in list(self._jobs.values()) for stage in job.request.stages]
        refs += [load.model for load in list(self._warm)]
        # pinned ones are read again when a worker died; what is in memory otherwise may well leave the volume
        refs += [ref for worker in self.workers for ref in worker.pinned]
        folders = [folder for ref in refs for folder in (ref.folder, *(part.folder for part in ref.additions))]
        requests = [job.request for job in list(self._jobs.values())]
        folders += [adapter.folder for request in requests for adapter in request.ip_adapters]
        paths = [lora.path for request in requests for lora in request.loras]
        paths += [inversion.path for request in requests for inversion in request.inversions]
        paths += [request.upscale.model.folder for request in requests if request.upscale]
        return {folder.rpartition("/")[2] for folder in folders} | {path.split("/")[-2] for path in paths}

    @property
    def wait(self) -> float:
        """Seconds until those who wait now have begun.

        Little's law: the slots are full, and what a job holds its slot for was measured beside as many others.
        """
        slots = self._settings.max_concurrency * sum(not worker.defunct for worker in self.workers)
        return (len(self._queue) + self.expected) * self._seconds / max(1, slots)

    def check_room(self) -> None:
        """Say no early.

        Raises:
            ApiError: QUEUE_FULL, with the seconds after which there should be room; NOT_READY.
        """
        if self.draining:
            raise ApiError("NOT_READY", "The server is shutting down.")
        if self.state == "DEFUNCT":
            raise ApiError("NOT_READY", "The workers do not start; the server's log says why.")
        # who is looked at before a free slot is given to it does not wait for one
        waiting = len(self._queue) + max(0, self.expected - sum(worker.free for worker in self.workers))
        if waiting >= self._settings.max_queue:
            wait = max(1, math.ceil(self.wait))
            message = f"{waiting} requests are waiting, as many as MAX_QUEUE allows."
            raise ApiError("QUEUE_FULL", message, retry_after=wait)

    def submit(self, job: Job) -> None:
        """Put a job in line.

        Raises:
            ApiError: QUEUE_FULL, NOT_READY, JOB_KILLED_WORKER.
        """
        self.check_room()
        if error := self._blame.refusal(job):
            raise error
        self._jobs[job.id] = job
        self._queue.join(job, job.deadline)
        self._feed()

    def cancel(self, job: Job, error: ApiError) -> None:
        """End a job wherever it is; one that runs stops at its next step."""
        for worker in self.workers:
            if job.id in worker.running and worker.ready:
                worker.send(Cancel(job.id))
        self._finish(job, error)
        self._feed()  # others may have waited for it, and its model need not be read ahead any more

    def _feed(self) -> None:
        if self._look_again:
            self._look_again.cancel()
        while (first := next(iter(self._queue.waiting(1)), None)) and first.alone:
            empty = [worker for worker in self.workers if worker.free and not worker.running and not worker.encoding]
            if not empty:
                # it stands first in line: others wait, or it would never find a worker empty
                return
            self._queue.leave(first)
            self._give(first, empty)
        if any(worker.free for worker in self.workers):
            self._advance()
        self._stage()

    def _advance(self) -> None:
        held, until = Counter[str](), dict[Job, float]()

        def go(job: Job) -> bool:
            free = [worker for worker in self.workers if worker.free]
            if not free:
                return False
            key = job.request.model.key
            warm = [worker for worker in self.workers if self._is_warm(worker, key)]
            best = [worker for worker in free if worker in warm]
            # who has been passed for as long as may be goes anywhere: held, it would keep free slots from all others
            if warm and not best and not self._queue.overdue(job):
                slots = sum(worker.info.slots for worker in warm if worker.info)
                wait = self._placing.wait(job, (held[key] + 1) * self._seconds / slots)
                if wait > 0:
                    held[key] += 1
                    until[job] = time.monotonic() + wait
                    return False
            self._give(job, best or free)
            return True

        self._queue.advance(self._is_ready, go)
        if until:
            soonest = min(min(at, self._queue.overdue_at(job)) for job, at in until.items())
            self._look_again = asyncio.get_running_loop().call_later(soonest - time.monotonic(), self._feed)

    def _is_ready(self, job: Job) -> bool:
        """Whether a worker that is free has its model in memory."""
        return any(worker.free and worker.has(job.request.model.key, "device") for worker in self.workers)

    def _is_warm(self, worker: Worker, key: str) -> bool:
        """Whether a worker has a model in memory, or is about to: then others of a burst need not load it elsewhere."""
        if not worker.ready:
            return False
        jobs = (self._jobs.get(job_id) for job_id in worker.running)
        return worker.has(key, "device") or any(job and job.request.model.key == key for job in jobs)

    def _give(self, job: Job, free: list[Worker]) -> None:
        key = job.request.model.key
        # what is in the host's memory that workers share is as near to each of them
        worker = max(
            free,
            key=lambda w: (
                w.has(key, "device"),
                not self.keeper and w.has(key, "host"),
                not self.keeper and job.request.model in w.staged,
                w.free,
                w.has(key, "host"),
            ),
        )
        job.start()
        worker.alone = job.alone
        worker.send(Due(job.id, self._queue.overdue_at(job), job.deadline))
        worker.run(job.id, job.framed)

    def _stage(self) -> None:
        """Tell each worker what to read ahead: the models of jobs that wait, each on the worker that will get them."""
        ready = [worker for worker in self.workers if worker.ready]
        if not ready:
            return
        refs = [stage.model for job in self._queue.waiting(_AHEAD) for stage in job.request.stages]
        wanted = {ref.key: ref for ref in refs}
        lists: dict[Worker, list[ModelRef]] = {worker: [] for worker in ready}
        for key, ref in wanted.items():
            having = [worker for worker in ready if worker.has(key, "device") or worker.has(key, "host")]
            # where none has it, the same one as the last time
            for worker in having or [ready[crc32(key.encode()) % len(ready)]]:
                lists[worker].append(ref)
        for worker, refs in lists.items():
            worker.stage(refs)

    def _finish(self, job: Job, error: ApiError) -> None:
        job.fail(error)
        was_here = self._jobs.pop(job.id, None)
        self._queue.leave(job)
        if was_here:
            self.watch.over(job)

    def _on_message(self, worker: Worker, message: AboutJob) -> None:
        job = self._jobs.get(message.id)
        if job and job.id in worker.running and isinstance(message, Computed | Done | Failed):
            # the slot is free; what encoding takes beyond it keeps nobody waiting
            self._seconds += _WEIGHT * (time.monotonic() - (job.started or job.created) - self._seconds)
        if isinstance(message, Computed):
            worker.running.discard(message.id)
            worker.encoding.add(message.id)
            self._feed()
            return
        if not isinstance(message, Done | Failed):
            if job:
                job.report(message)
            return
        worker.encoding.discard(message.id)
        worker.running.discard(message.id)
        if job:
            del self._jobs[job.id]
            if isinstance(message, Done):
                if (took := message.result.timings.get("loadModel")) is not None and not job.request.then:
                    self._placing.note(job.request.model.key, took / 1000)
                job.complete(message.result)
                waited = round(((job.begun or job.created) - job.created) * 1000)
                timings = {"queue": waited, **message.result.timings}
                told = ", ".join(f"{phase} {took} ms" for phase, took in timings.items())
                log.info("job done: %s", told, extra={**job.about, "timings": timings})
            else:
                log.warning("job failed: %s %s", message.code, message.message, extra=job.about)
                log.debug("%s", message.stack, extra=job.about)
                job.fail(ApiError(message.code, message.message, **message.error))
            self.watch.over(job)
        self._feed()

    def _on_state(self, worker: Worker) -> None:
        if not worker.ready:
            ran, encoded = worker.running, worker.encoding
            worker.running, worker.encoding = set(), set()
            self._judge([self._jobs[job_id] for job_id in encoded | ran if job_id in self._jobs], worker.crashed)
        if self.state == "DEFUNCT":
            for job in list(self._jobs.values()):
                self._finish(job, ApiError("NOT_READY", "The workers do not start; the server's log says why."))
        self._feed()

    def _judge(self, jobs: list[Job], crashed: bool) -> None:
        """Have the jobs of a worker that died run once more, first in line and in their order, or end them."""
        for job in sorted(jobs, key=lambda job: job.created, reverse=True):
            if error := self._blame.verdict(job, crashed=crashed):
                self._finish(job, error)
            else:
                job.requeue()
                job.alone = True
                self._queue.join(job, job.deadline, first=True)
        for job in self._queue.waiting():
            if error := self._blame.refusal(job):  # the same as the one that was to blame
                self._finish(job, error)
