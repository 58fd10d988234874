"""A job as RunPod's routes and webhooks tell it."""

from __future__ import annotations

from typing import Any

from api.service.bodies import result_body
from api.service.entries import Entry
from api.service.jobs import JobState
from api.service.ledger import Ledger
from api.service.runpod_input import write_error, write_output


async def status_of(ledger: Ledger, entry: Entry, progress: dict[str, Any] | None = None) -> dict[str, Any]:
    """``id``, ``status``, ``delayTime``, ``executionTime`` in ms, and ``output`` or ``error``.

    Args:
        ledger: has the images.
        entry: the job.
        progress: how far it is, while it runs.

    Raises:
        ApiError: NO_SUCH_JOB: it was removed meanwhile.
    """
    body: dict[str, Any] = {"id": entry.id, "status": entry.state.value}
    began = entry.started or entry.finished
    if began is not None:
        body["delayTime"] = round((began - entry.created) * 1000)
    if entry.started is not None and entry.finished is not None:
        body["executionTime"] = round((entry.finished - entry.started) * 1000)
    if entry.result is not None:
        body["workerId"] = str(entry.result.meta.get("device", ""))
        body["output"] = await output_of(ledger, entry)
    elif entry.error is not None and entry.state != JobState.CANCELLED:
        body["error"] = write_error(entry.error, entry.terms.simple)
    elif entry.state == JobState.IN_PROGRESS and progress:
        body["output"] = progress_of(progress)
    return body


async def output_of(ledger: Ledger, entry: Entry) -> dict[str, Any]:
    """The output of a job that is COMPLETED, in the form of its input.

    Raises:
        ApiError: NO_SUCH_JOB: it was removed meanwhile.
    """
    return write_output(result_body(await ledger.result(entry)), entry.terms.simple)


def progress_of(steps: dict[str, Any]) -> dict[str, Any]:
    """How far a job is, from 0 to 1, with ``step``, ``total`` and ``eta`` in seconds."""
    return {"progress": round(steps["step"] / steps["total"], 4), **steps}
