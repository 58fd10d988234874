"""The queue and who takes from it: a bounded line of jobs, as many at once to each worker as it has slots."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque

from api.errors import ApiError
from api.schema.generation import ModelRef
from api.schema.messages import AboutJob, Cancel, Computed, Done, Failed, Load
from api.service.blame import Blame
from api.service.jobs import Job
from api.service.placing import Placing
from api.service.workers import Worker
from api.settings import Settings

log = logging.getLogger("api.dispatch")

_FIRST_GUESS = 2.0
"""Seconds a job is thought to take before any has been measured."""
_WEIGHT = 0.2
"""Of the last job in the mean."""


class Dispatcher:
    """Feeds the workers.

    A job goes to a worker with a free slot that has its model in memory, or will have it, since it was given a job of
    it. Where these are full, ``Placing`` says for how long it waits for one before it goes to any other. When a worker
    dies, ``Blame`` says what becomes of the jobs that it ran.

    Args:
        settings: the size of the queue, timeouts.
        devices: one worker is started for each.

    Attributes:
        initializing: models that are to be in memory from the start are still being fetched.
        expected: requests that wait for their model to be fetched: they count as queued.
    """

    def __init__(self, settings: Settings, devices: tuple[str, ...]) -> None:
        self._settings = settings
        self._queue: deque[Job] = deque()
        self.initializing = False
        self.expected = 0
        self._warm: list[Load] = []
        self._jobs: dict[str, Job] = {}
        self.workers = [
            Worker(device, settings.watchdog_timeout, self._on_message, self._on_state) for device in devices
        ]
        self._seconds = _FIRST_GUESS
        self._blame = Blame()
        self._placing = Placing()
        self._look_again: asyncio.TimerHandle | None = None
        self.draining = False

    def start(self) -> None:
        """Start every worker."""
        for worker in self.workers:
            worker.start()

    async def stop(self) -> None:
        """Refuse new jobs, give running ones DRAIN_TIMEOUT, then end the workers."""
        self.draining = True
        for job in list(self._queue):
            self._finish(job, ApiError("NOT_READY", "The server is shutting down; send the request again."))
        deadline = time.monotonic() + self._settings.drain_timeout
        while self._jobs and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for job in list(self._jobs.values()):
            self._finish(job, ApiError("NOT_READY", "The server shut down before the job was done; send it again."))
        await asyncio.gather(*(worker.stop() for worker in self.workers))

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

    def warm(self, ref: ModelRef) -> None:
        """Load a model on every worker, now and whenever one starts again."""
        load = Load(ref)
        self._warm.append(load)
        for worker in self.workers:
            worker.warm(load)

    def folders(self) -> set[str]:
        """Names of the folders that jobs and warm models need. May be called from any thread."""
        refs = [job.request.model for job in list(self._jobs.values())] + [load.model for load in list(self._warm)]
        return {ref.folder.rpartition("/")[2] for ref in refs}

    def check_room(self) -> None:
        """Say no early.

        Raises:
            ApiError: QUEUE_FULL, with the seconds after which there should be room; NOT_READY.
        """
        if self.draining:
            raise ApiError("NOT_READY", "The server is shutting down.")
        if self.state == "DEFUNCT":
            raise ApiError("NOT_READY", "The workers do not start; the server's log says why.")
        waiting = len(self._queue) + self.expected
        if waiting >= self._settings.max_queue:
            # Little's law: the slots are full, and what a job holds its slot for was measured beside as many others
            slots = self._settings.max_concurrency * sum(not worker.defunct for worker in self.workers)
            wait = max(1, math.ceil(waiting * self._seconds / max(1, slots)))
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
        self._queue.append(job)
        self._feed()

    def cancel(self, job: Job, error: ApiError) -> None:
        """End a job wherever it is; one that runs stops at its next step."""
        for worker in self.workers:
            if job.id in worker.running and worker.ready:
                worker.send(Cancel(job.id))
        self._finish(job, error)

    def _feed(self) -> None:
        if self._look_again:
            self._look_again.cancel()
        held, soonest = Counter[str](), math.inf
        for job in list(self._queue):
            free = [worker for worker in self.workers if worker.free]
            if not free:
                return
            if job.alone:
                free = [worker for worker in free if not worker.running and not worker.encoding]
                if not free:
                    # it stands first in line: others wait, or it would never find a worker empty
                    return
            key = job.request.model.key
            warm = [worker for worker in self.workers if self._is_warm(worker, key)]
            best = [worker for worker in free if worker in warm]
            if warm and not best and not job.alone:
                slots = sum(worker.info.slots for worker in warm if worker.info)
                wait = self._placing.wait(job, (held[key] + 1) * self._seconds / slots)
                if wait > 0:
                    held[key] += 1
                    soonest = min(soonest, wait)
                    continue
            self._queue.remove(job)
            self._give(job, max(best or free, key=lambda worker: worker.free))
        if soonest < math.inf:
            self._look_again = asyncio.get_running_loop().call_later(soonest, self._feed)

    def _is_warm(self, worker: Worker, key: str) -> bool:
        """Whether a worker has a model in memory, or is about to: then others of a burst need not load it elsewhere."""
        if not worker.ready:
            return False
        jobs = (self._jobs.get(job_id) for job_id in worker.running)
        return key in worker.models or any(job and job.request.model.key == key for job in jobs)

    def _give(self, job: Job, worker: Worker) -> None:
        job.start()
        worker.alone = job.alone
        worker.run(job.id, job.framed)

    def _finish(self, job: Job, error: ApiError) -> None:
        job.fail(error)
        self._jobs.pop(job.id, None)
        if job in self._queue:
            self._queue.remove(job)

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
                if (took := message.result.timings.get("loadModel")) is not None:
                    self._placing.note(job.request.model.key, took / 1000)
                job.complete(message.result)
            else:
                about = {"request_id": job.request.request_id}
                log.warning("job failed: %s %s", message.code, message.message, extra=about)
                log.debug("%s", message.stack, extra=about)
                job.fail(ApiError(message.code, message.message, **message.error))
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
                self._queue.appendleft(job)
        for job in list(self._queue):
            if error := self._blame.refusal(job):  # the same as the one that was to blame
                self._finish(job, error)
