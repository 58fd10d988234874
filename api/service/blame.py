"""Who is to blame when a worker dies, and what is refused for it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from api.errors import ApiError
from api.service.jobs import Job

log = logging.getLogger("api.dispatch")

_REMEMBER = 600.0
"""Seconds for which a request that killed a worker is refused."""
_LONE_DEATHS = 2
"""So many deaths alone are a job's own, whatever the worker died of."""


class Blame:
    """Judges the jobs that a worker ran when it died.

    A death in company blames nobody: each job runs once more, with a worker for itself. A death there blames the job at
    once where it looks like the job's doing (``Worker.crashed``). A SIGKILL that was not ours may as well come from the
    kernel, short of memory, or from an operator: such a job gets one more try alone.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._killers: dict[str, float] = {}

    def refusal(self, job: Job) -> ApiError | None:
        """The error for a request that killed a worker not long ago."""
        now = self._clock()
        self._killers = {killer: since for killer, since in self._killers.items() if now - since < _REMEMBER}
        since = self._killers.get(job.fingerprint) if self._killers else None
        if since is None:
            return None
        message = "The same request killed a worker, running alone, within the last ten minutes."
        return ApiError("JOB_KILLED_WORKER", message, retry_after=math.ceil(since + _REMEMBER - now))

    def verdict(self, job: Job, *, crashed: bool) -> ApiError | None:
        """The error with which a job ends whose worker died; None: it is to run once more, alone."""
        about = {"request_id": job.request.request_id}
        if error := self.refusal(job):
            return error
        if job.alone:
            job.lone_deaths += 1
        if not job.lone_deaths or not (crashed or job.lone_deaths >= _LONE_DEATHS):
            log.warning("its worker died; the job is tried once more, alone", extra=about)
            return None
        log.error("the job killed a worker, running alone; it is refused for a while", extra=about)
        self._killers[job.fingerprint] = self._clock()
        message = "The worker died while it ran this request alone. It is not tried again for ten minutes."
        return ApiError("JOB_KILLED_WORKER", message, retry_after=math.ceil(_REMEMBER))
