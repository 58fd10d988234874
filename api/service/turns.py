"""One turn of a job for later: generated as its inputs say, within what its terms allow."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from api.errors import ApiError
from api.schema.generation import GenerationResult
from api.service.entries import Turn
from api.service.native_events import tee
from api.service.output_limit import within_limit
from api.service.reports import Report
from api.service.s3_config import FIELD, S3Config, s3_destinations
from api.service.webhooks_hook import Hook
from api.settings import Settings

if TYPE_CHECKING:
    from api.service.service import Service


async def run(
    turn: Turn, inputs: dict[str, Any], report: Report, hook: Hook | None, service: Service, settings: Settings
) -> GenerationResult:
    """Admit it and wait for its result; its place in the queue is taken before anything is awaited.

    Args:
        turn: of which job.
        inputs: what it is made from.
        report: tells its events to its readers.
        hook: tells them to its webhook.
        service: runs it.
        settings: how long its model may take, and where large outputs go.

    Raises:
        ApiError: how it failed; TIMED_OUT where it took longer than its policy allows.
    """
    limit = turn.terms.execution_timeout
    try:
        async with asyncio.timeout(limit) as timer:
            return await _run(turn, inputs, report, hook, service, settings)
    except TimeoutError:
        if limit is None or not timer.expired():
            raise
        message = f"Not done within policy.executionTimeout of {limit * 1000:g} ms."
        raise ApiError("TIMED_OUT", message) from None


async def _run(
    turn: Turn, inputs: dict[str, Any], report: Report, hook: Hook | None, service: Service, settings: Settings
) -> GenerationResult:
    on_event = tee(report, hook)
    admitted = await service.admit(
        turn.request_id, inputs["modelInputs"], inputs["callInputs"], on_event, settings.job_ttl
    )
    if hook:
        hook.begin(admitted.options)
    request = admitted.request
    theirs = "s3Config" in inputs
    if theirs:
        config = msgspec.convert(inputs["s3Config"], S3Config)
        where = await asyncio.to_thread(s3_destinations, config, request.images, request.image_format, turn.id)
        admitted = admitted._replace(destinations=where)
    try:
        result = await service.finish(
            service.submit(admitted, on_event, turn.terms.owner), from_start=True, on_upload=hook
        )
    except ApiError as error:
        if theirs and error.code == "UPLOAD_FAILED":
            error.field = FIELD
        raise
    if not turn.terms.endpoint:
        return result
    return await within_limit(result, request.image_format, turn.id, settings, sync=turn.terms.sync)
