"""What the SDK calls: runs a job, says how many more may come, and whether this worker is of use."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from api.errors import ApiError
from api.serverless.drain import Drain
from api.serverless.hosting import Hosted
from api.serverless.updates import Send, Updates, streams
from api.service.bodies import result_body
from api.service.native_events import tee
from api.service.output_limit import within_limit
from api.service.runpod_input import read_input, write_error, write_output
from api.service.s3_config import check_s3_config, read_s3_config, s3_destinations
from api.service.webhooks_hook import telling

log = logging.getLogger("api.serverless")

_LOOK = 0.005
_LOOK_AFTER = 1.0
_SYNC = "sync-"
"""How the ids of ``/runsync`` begin, whose outputs may be larger."""
REFRESH = "refresh_worker"
"""Key of an input, and of the SDK's configuration: the platform replaces the worker after this job."""


class Handler:
    """The handler, over a service in its thread. Its methods run on the SDK's loop.

    It is no generator: the output of one is the list of its items, where clients expect the result alone. Events are
    sent beside it (``updates``).

    Args:
        hosted: the service.

    Attributes:
        config: for ``runpod.serverless.start``.
        drain: how it ends.
    """

    def __init__(self, hosted: Hosted) -> None:
        self._hosted = hosted
        self._settings = hosted.service.settings
        self._dispatcher = hosted.service.dispatcher
        self._running: set[str] = set()
        self._begun: set[str] = set()
        self._leaving = False
        self._session: Any = None
        self._watch: asyncio.Task[None] | None = None
        self.drain = Drain(self._settings.drain_timeout, self._unfinished, self._hang_up)
        self.config: dict[str, Any] = {"handler": self.handle, "concurrency_modifier": self.capacity}

    async def engine_is_ready(self) -> None:
        """As a fitness check: no job is taken before a worker has its device, and the models that it is to start with.

        Raises:
            RuntimeError: the workers do not start. The platform replaces the machine.
        """
        while not any(worker.ready for worker in self._dispatcher.workers):
            if self._dispatcher.state == "DEFUNCT":
                raise RuntimeError("The engine does not start; the log says why.")
            await asyncio.sleep(_LOOK)

    def capacity(self, current: int) -> int:
        """How many jobs may be here at once: the slots of all workers, so that they are batched step by step.

        The SDK takes off what it has by itself. When the number changes it waits until nothing runs before it takes the
        next job, so what is free at the moment would be the wrong answer.

        Args:
            current: what was said last.
        """
        if self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._look_after())
            self.drain.attach()
        self._begun &= self._held()
        if self._leaving or self.drain.begun:
            return 0
        if self._settings.refresh_worker:
            return 1
        slots = [w.info.slots if w.info else self._settings.max_concurrency for w in self._living()]
        return max(1, sum(slots))

    async def handle(self, job: dict[str, Any]) -> dict[str, Any]:
        """Run a job.

        Args:
            job: ``id`` and ``input``, as the platform has it.

        Returns:
            The output, or ``{"error": sentence}``.
        """
        job_id, given = str(job["id"]), job.get("input")
        refresh = isinstance(given, dict) and given.get(REFRESH) in (True, 1)
        if isinstance(given, dict):
            given = {name: value for name, value in given.items() if name != REFRESH}
        self._running.add(job_id)
        self._begun.add(job_id)
        try:
            output = await self._run(job, job_id, given)
        finally:
            self._running.discard(job_id)
        is_defunct = self._dispatcher.state == "DEFUNCT"
        if refresh or is_defunct or self._settings.refresh_worker:
            self._leaving = True
        if self._leaving and not self._running:
            # the last one says so: the platform ends the worker as soon as it hears of it
            self.config[REFRESH] = True
            self.drain.begin(int(is_defunct))
        return output

    async def _run(self, job: dict[str, Any], job_id: str, given: Any) -> dict[str, Any]:
        updates = Updates(job_id, self._sender("progress", job), self._sender("stream", job) if _asks(given) else None)
        try:
            work = self._generate(job_id, given, job.get("s3Config"), updates)
            output = await asyncio.wrap_future(self._hosted.run(work))
        except asyncio.CancelledError:  # the platform's job-stop: the service hears of it by the future
            updates.cancel()
            raise
        await updates.close()
        return output

    async def _generate(self, job_id: str, given: Any, s3: Any, updates: Updates) -> dict[str, Any]:
        """On the service's loop."""
        service, settings, simple = self._hosted.service, self._settings, False
        try:
            found = read_input(given)
            simple = found.simple
            hook = service.webhooks.hook(found.call_inputs, job=job_id)
            # who streams sees previews, and so does a webhook; of anybody else admission says that nobody would
            blind = "preview" in found.call_inputs and not _asks(given)
            on_event = tee(None if blind else updates, hook)
            async with telling(hook):
                bucket = read_s3_config(s3) if s3 else None
                if bucket:
                    await check_s3_config(bucket, settings)
                admitted = await service.admit(job_id, found.model_inputs, found.call_inputs, on_event)
                if hook:
                    hook.begin(admitted.options)
                request = admitted.request
                if bucket:
                    about = request.images, request.image_format, job_id
                    where = await asyncio.to_thread(s3_destinations, bucket, *about)
                    admitted = admitted._replace(destinations=where)
                job = service.submit(admitted, on_event)
                result = await service.finish(job, from_start=True, on_upload=hook)
                sync = job_id.startswith(_SYNC)
                result = await within_limit(result, request.image_format, job_id, settings, sync=sync)
            if hook:
                await hook.stored()
            return write_output(result_body(result), simple)
        except ApiError as error:
            log.info("job failed: %s %s", error.code, error.message, extra={"request_id": job_id})
            return {"error": write_error(error.body(), simple)}
        except Exception:
            log.exception("unexpected", extra={"request_id": job_id})
            return {"error": "INTERNAL_ERROR: Something went wrong in the worker; its log has the job's id."}

    def _sender(self, kind: str, job: dict[str, Any]) -> Send:
        async def send(body: dict[str, Any]) -> None:
            from runpod.http_client import AsyncClientSession
            from runpod.serverless.modules.rp_http import send_result, stream_result

            if self._session is None:
                self._session = AsyncClientSession()
            if kind == "stream":
                await stream_result(self._session, {"output": body}, job)
            else:
                await send_result(self._session, {"status": "IN_PROGRESS", "output": body}, job)

        return send

    async def _hang_up(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _look_after(self) -> None:
        """End the process when its workers do not start any more and no job is here that could say so."""
        while self._dispatcher.state != "DEFUNCT" or self._running:
            await asyncio.sleep(_LOOK_AFTER)
        log.error("the engine does not start any more: this worker ends, for the platform to replace it")
        self._leaving = True
        self.drain.begin(1)

    def _living(self) -> list[Any]:
        return [worker for worker in self._dispatcher.workers if not worker.defunct]

    def _unfinished(self) -> set[str]:
        return self._begun & self._held()

    @staticmethod
    def _held() -> set[str]:
        """The jobs that the SDK has: taken, and their results not sent yet."""
        from runpod.serverless.modules.worker_state import JobsProgress

        return {job.id for job in JobsProgress()}


def _asks(given: Any) -> bool:
    """Whether a job's input asks for its events, and there is somewhere to send them."""
    if not isinstance(given, dict) or not streams():
        return False
    options = given.get("callInputs")
    return any(half.get("streamEvents") in (True, 1) for half in (given, options) if isinstance(half, dict))
