"""The service: what every way in (HTTP, and others later) stands on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from api.errors import ApiError
from api.models.addresses import Reach
from api.models.description import InstalledModel
from api.models.library import Library
from api.models.refs import SourceRef
from api.schema.generation import GenerationRequest, GenerationResult, ModelRef
from api.schema.messages import OnTheWay
from api.schema.transfers import Transfer
from api.schema.videos import FILE_FORMATS
from api.service.admission import Admission, Admitted
from api.service.dispatch import Dispatcher
from api.service.fetcher import Fetcher
from api.service.jobs import Job, JobState
from api.service.keys import Gate
from api.service.later import Later
from api.service.limits import Limits
from api.service.metrics import Metrics
from api.service.quantize import check_installed
from api.service.schedulers import check_name
from api.service.spawning import devices
from api.service.tracing import open_tracing
from api.service.upload import upload
from api.service.usage import Usage
from api.service.watch import Watch
from api.service.webhooks import Webhooks
from api.service.webhooks_init import tell_start
from api.settings import Settings

log = logging.getLogger("api.service")

_THREADS = 32


class Service:
    """Admits requests, queues them, and gives back results.

    Args:
        settings: the container's configuration.

    Raises:
        ApiError: MODEL_ID or one of WARM_MODELS cannot be had, as far as that can be said without a network; there is
            no such SCHEDULER.
        SettingsError: what is said of keys or addresses cannot be used.
    """

    watch = Watch()

    def __init__(self, settings: Settings) -> None:
        check_name(settings.scheduler)
        check_installed(settings)
        Reach.of(settings)
        self.settings = settings
        self.gate = Gate(settings)
        self.limits = Limits(settings, self.gate.keys.names)
        self.usage = Usage(settings.state_dir)
        self.library = Library(settings)
        names = devices(settings)
        self.dispatcher = Dispatcher(settings, names)
        self.fetcher = Fetcher(settings, self.library, self.dispatcher.folders)
        has_gpu = any(name.startswith("cuda") for name in names)
        self._admission = Admission(settings, self.library, self.fetcher, has_gpu)
        self.webhooks = Webhooks(settings)
        self.later = Later(settings, self, self.limits)
        self.watch = Watch(Metrics(self), open_tracing())
        self.dispatcher.watch = self.fetcher.watch = self.later.watch = self.later.ledger.watch = self.watch
        self.webhooks.watch = self.watch
        self._to_fetch = [ref for ref in self._admission.default_refs() if not self._warm(ref, self.library.find(ref))]
        self._fetching: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None
        if self._to_fetch and not settings.runtime_downloads:
            missing = ", ".join(ref.model_id for ref in self._to_fetch)
            message = f"Not here: {missing}; and RUNTIME_DOWNLOADS=0 forbids to fetch it."
            raise ApiError("MODEL_MISMATCH", message, available=self.library.names())

    def open(self) -> None:
        """Take what only one server may have, ahead of ``start``.

        Raises:
            SettingsError: STATE_DIR cannot be used, or another server uses it.
        """
        self.later.open()
        self.webhooks.open()
        self.usage.load()

    def start(self) -> None:
        """Start the workers, and fetch the models that they are to have; returns at once."""
        # name look-ups and image decoding share these threads: slow ones must not starve the rest
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(_THREADS, "service"))
        self.dispatcher.start()
        self.webhooks.start()
        self._telling = loop.create_task(tell_start(self.webhooks, self.dispatcher, self.settings))
        self.later.start()
        self.usage.start()
        loop.run_in_executor(None, self.library.volume.sweep)
        if self._to_fetch:
            self.dispatcher.initializing = True
            self._fetching = loop.create_task(self._fetch_defaults())

    async def stop(self) -> None:
        """Drain and end the workers."""
        self.dispatcher.draining = True
        if self._fetching:
            self._fetching.cancel()
        if self._telling:
            self._telling.cancel()
        self.later.close()
        await self.fetcher.stop()
        await self.dispatcher.stop()
        await self.later.stop()
        await self.webhooks.stop()
        await self.usage.stop()
        await self.watch.close()

    async def admit(
        self,
        request_id: str,
        model_inputs: dict[str, Any],
        call_inputs: dict[str, Any],
        on_event: Callable[[Transfer], None] | None = None,
        patience: float | None = None,
    ) -> Admitted:
        """Validate a request without running it, and get its model here; see ``Admission.admit``.

        Args:
            patience: seconds that its model may take; REQUEST_TIMEOUT where a client waits.

        Raises:
            ApiError: what is wrong with it; TIMED_OUT when the model takes longer.
        """
        patience = patience or self.settings.request_timeout
        self.dispatcher.expected += 1
        try:
            with self.watch.admission(on_event) as told:
                async with asyncio.timeout(patience):
                    return await self._admission.admit(request_id, model_inputs, call_inputs, told)
        except TimeoutError:
            message = (
                f"The model was not here within {patience:g} s. "
                "It is still being fetched: send the request again later, or watch GET /models."
            )
            raise ApiError("TIMED_OUT", message) from None
        finally:
            self.dispatcher.expected -= 1

    async def check(self, model_inputs: dict[str, Any], call_inputs: dict[str, Any]) -> None:
        """Say what is wrong with a request, as far as that can be said at once; see ``Admission.check``.

        Raises:
            ApiError: what is wrong with it.
        """
        await self._admission.check(model_inputs, call_inputs)

    async def plan(
        self, model_inputs: dict[str, Any], call_inputs: dict[str, Any]
    ) -> tuple[SourceRef, GenerationRequest | None]:
        """Validate a request that is not to run; see ``Admission.plan``.

        Raises:
            ApiError: what is wrong with it.
        """
        return await self._admission.plan(model_inputs, call_inputs)

    def source_ref(self, options: dict[str, Any]) -> SourceRef:
        """What checked ``callInputs`` name.

        Raises:
            ApiError: NO_MODEL_ID, or what is wrong with the name.
        """
        return self._admission.source_ref(options)

    def model_ref(self, model: InstalledModel, ref: SourceRef, options: dict[str, Any] | None = None) -> ModelRef:
        """What a worker knows a model by."""
        return self._admission.model_ref(model, ref, options)

    def precision_of(self, ref: SourceRef) -> str:
        """What a model's weights are computed in."""
        return self._admission.precision_of(ref)

    def submit(self, admitted: Admitted, on_event: Callable[[OnTheWay], None] | None = None, owner: str = "") -> Job:
        """Put a request in line; ``finish`` waits for it.

        Args:
            admitted: from ``admit``.
            on_event: called with phases, steps and previews as they happen.
            owner: name of the key that it came with.

        Raises:
            ApiError: the queue is full, or the server cannot run jobs.
        """
        patience, destinations = self.settings.request_timeout, admitted.destinations
        if trace := self.watch.trace(admitted.request):
            on_event = trace.reading(on_event)
        job = Job(admitted.request, on_event, admitted.timings, patience, destinations, owner)
        job.trace, job.name = trace, self.watch.name_of(admitted.request)
        self.dispatcher.submit(job)
        return job

    async def finish(
        self, job: Job, *, from_start: bool = False, on_upload: Callable[[Transfer], None] | None = None
    ) -> GenerationResult:
        """Wait for a job. If the caller is cancelled, so is the job.

        Args:
            from_start: REQUEST_TIMEOUT counts while a worker runs the job; otherwise from now on, waiting included.
            on_upload: called, from then on, while its model is uploaded to MODEL_URL, if it is.

        Raises:
            ApiError: the job failed, was cancelled or timed out; UPLOAD_FAILED.
        """
        try:
            result = await self._finished(job, from_start, on_upload)
        except ApiError as error:
            self.usage.note(job.owner, error)
            raise
        except asyncio.CancelledError:
            self.usage.note(job.owner, ApiError("CANCELLED", "The client went away."))
            raise
        self.usage.note(job.owner, result, job.request.images)
        return result

    async def _finished(
        self, job: Job, from_start: bool, on_upload: Callable[[Transfer], None] | None
    ) -> GenerationResult:
        limit = self.settings.request_timeout
        job.for_later = from_start
        try:
            result = await self._in_time(job, limit, from_start)
        except TimeoutError:
            error = ApiError("TIMED_OUT", f"Not done within REQUEST_TIMEOUT of {limit:g} s.")
            self.dispatcher.cancel(job, error)
            raise error from None
        except asyncio.CancelledError:
            log.info("nobody waits for the job any more; it is cancelled", extra=job.about)
            self.dispatcher.cancel(job, ApiError("CANCELLED", "The client went away."))
            raise
        for folder in dict.fromkeys(stage.model.folder for stage in job.request.stages):
            self.fetcher.upload_after_use(Path(folder), on_upload)
        return await self._uploaded(job, result) if job.destinations else result

    async def _uploaded(self, job: Job, result: GenerationResult) -> GenerationResult:
        """The same with links in the place of images."""
        began = time.perf_counter()
        content_type = FILE_FORMATS[job.request.image_format].content_type
        with self.watch.upload():
            urls = await upload(job.destinations, result.images, content_type, self.settings)
        timings = {**result.timings, "upload": round((time.perf_counter() - began) * 1000)}
        return msgspec.structs.replace(result, images=[], urls=urls, timings=timings)

    async def _in_time(self, job: Job, limit: float, from_start: bool) -> GenerationResult:
        due = time.monotonic() + limit
        while True:
            try:
                async with asyncio.timeout(due - time.monotonic()):
                    return await job.result()
            except TimeoutError:
                # it cannot have run for as long if it began meanwhile, or has not begun
                began = job.started if job.state == JobState.IN_PROGRESS and job.started else time.monotonic()
                if not from_start or began + limit <= due:
                    raise
                due = began + limit

    def _warm(self, ref: SourceRef, model: InstalledModel | None) -> bool:
        if model is not None:
            self.dispatcher.warm(self._admission.model_ref(model, ref))
        return model is not None

    async def _fetch_defaults(self) -> None:
        try:
            await asyncio.gather(*map(self._fetch, self._to_fetch))
        finally:
            self.dispatcher.initializing = False

    async def _fetch(self, ref: SourceRef) -> None:
        """Get a model before anybody asks for it. Where that fails, the first request tries again and is told why."""
        try:
            self._warm(ref, (await self.fetcher.ensure(ref)).model)
        except ApiError as error:
            log.error("%s could not be fetched: %s %s", ref.model_id, error.code, error.message)
        except Exception:
            log.exception("%s could not be fetched", ref.model_id)
