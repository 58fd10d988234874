"""The service: what every way in (HTTP, and others later) stands on."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from api.errors import ApiError
from api.models.library import Library
from api.schema.generation import GenerationRequest, GenerationResult
from api.schema.messages import Phase, Progress
from api.service.admission import Admission
from api.service.dispatch import Dispatcher
from api.service.jobs import Job
from api.settings import Settings

log = logging.getLogger("api.service")

_THREADS = 32


def devices(settings: Settings) -> tuple[str, ...]:
    """The devices to start workers for: DEVICES, or every NVIDIA GPU there is, or the CPU.

    Asks the file system, not torch, which this process must not import.
    """
    if settings.devices:
        return settings.devices
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    else:
        count = sum(bool(re.fullmatch(r"nvidia\d+", entry.name)) for entry in Path("/dev").iterdir())
    return tuple(f"cuda:{index}" for index in range(count)) or ("cpu",)


class Service:
    """Admits requests, queues them, and gives back results.

    Args:
        settings: the container's configuration.

    Raises:
        ApiError: MODEL_ID or one of WARM_MODELS is not installed.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.library = Library(settings)
        names = devices(settings)
        self._admission = Admission(settings, self.library, has_gpu=any(name.startswith("cuda") for name in names))
        self.dispatcher = Dispatcher(settings, names, self._admission.default_refs())

    def start(self) -> None:
        """Start the workers; returns at once."""
        # name look-ups and image decoding share these threads: slow ones must not starve the rest
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "service"))
        self.dispatcher.start()

    async def stop(self) -> None:
        """Drain and end the workers."""
        await self.dispatcher.stop()

    async def admit(
        self, request_id: str, model_inputs: dict[str, Any], call_inputs: dict[str, Any]
    ) -> tuple[GenerationRequest, dict[str, Any]]:
        """Validate a request without running it; see ``Admission.admit``."""
        return await self._admission.admit(request_id, model_inputs, call_inputs)

    def submit(self, request: GenerationRequest, on_event: Callable[[Phase | Progress], None] | None = None) -> Job:
        """Put a request in line; ``finish`` waits for it.

        Args:
            request: from ``admit``.
            on_event: called with phases and steps as they happen.

        Raises:
            ApiError: the queue is full, or the server cannot run jobs.
        """
        job = Job(request, on_event)
        self.dispatcher.submit(job)
        return job

    async def finish(self, job: Job) -> GenerationResult:
        """Wait for a job. If the caller is cancelled, so is the job.

        Raises:
            ApiError: the job failed, was cancelled or timed out.
        """
        try:
            async with asyncio.timeout(self.settings.request_timeout):
                return await job.result()
        except TimeoutError:
            error = ApiError("TIMED_OUT", f"Not done within REQUEST_TIMEOUT of {self.settings.request_timeout:g} s.")
            self.dispatcher.cancel(job, error)
            raise error from None
        except asyncio.CancelledError:
            log.info("the client went away; its job is cancelled", extra={"request_id": job.request.request_id})
            self.dispatcher.cancel(job, ApiError("CANCELLED", "The client went away."))
            raise
