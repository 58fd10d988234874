"""Puts the images of a request where ``output_url`` says: all of them, or the request has failed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import httpcore

from api.errors import ApiError
from api.models.addresses import ALLOWING, Reach
from api.models.s3_client import connect, faults
from api.models.sources.remote import access_to
from api.service.destinations import FIELD, Destination
from api.service.fetch import Guard, NotAllowed
from api.settings import Settings

log = logging.getLogger("api.service")

_TRIES = 3
_PAUSE = 0.5
_MAY_PASS = frozenset({408, 425, 429, 500, 502, 503, 504})
_READABLE = 7 * 86400
"""Seconds for which the link to an object may be read: the longest that a signature can be good for."""


async def upload(
    destinations: Sequence[Destination], images: Sequence[bytes], content_type: str, settings: Settings
) -> list[str]:
    """Put each image where it belongs.

    Where one cannot be put, the objects of the others are removed from the bucket again; what was put at an address
    that a client gave stays there.

    Returns:
        Where they can be read: a signed link of an object in the bucket, for seven days; else the address without its
        signature.

    Raises:
        ApiError: UPLOAD_FAILED.
    """
    client = None
    if location := next((found.location for found in destinations if found.location), None):
        client = await asyncio.to_thread(connect, location, access_to(location, settings, trusted=True))
    timeout = settings.fetch_timeout

    async def one(destination: Destination, image: bytes) -> str:
        if destination.location:
            return await asyncio.to_thread(_put_object, client, destination, image, content_type)
        return await _put(destination, image, content_type, timeout, Reach.of(settings))

    pairs = zip(destinations, images, strict=True)
    results = await asyncio.gather(*(one(*pair) for pair in pairs), return_exceptions=True)
    failed = [result for result in results if isinstance(result, BaseException)]
    if not failed:
        return [str(result) for result in results]
    done = [found for found, result in zip(destinations, results, strict=True) if isinstance(result, str)]
    await asyncio.to_thread(_remove, client, done)
    for fault in failed:
        if not isinstance(fault, ApiError):
            log.error("an upload failed", exc_info=fault)
    first = failed[0]
    why = first.message if isinstance(first, ApiError) else f"{type(first).__name__}; the server's log says more."
    left = sum(1 for found in done if not found.location)
    also = f" {left} of {len(images)} were put where they belong before that, and stay there." if left else ""
    raise ApiError("UPLOAD_FAILED", f"The images could not be uploaded: {why}{also}", field=FIELD) from first


def _put_object(client: Any, destination: Destination, image: bytes, content_type: str) -> str:
    location = destination.location
    assert location
    where = {"Bucket": location.bucket, "Key": location.key}
    with faults(location, writing=True):
        client.put_object(**where, Body=image, ContentType=content_type)
        return str(client.generate_presigned_url("get_object", Params=where, ExpiresIn=_READABLE))


def _remove(client: Any, destinations: Sequence[Destination]) -> None:
    for destination in destinations:
        if location := destination.location:
            with contextlib.suppress(ApiError), faults(location, writing=True):
                client.delete_object(Bucket=location.bucket, Key=location.key)


async def _put(destination: Destination, image: bytes, content_type: str, timeout: float, reach: Reach) -> str:
    """PUT one image, again where the fault may pass; redirects are not followed, a signature is of one address."""
    why = ""
    for attempt in range(_TRIES):
        if attempt:
            await asyncio.sleep(_PAUSE * 2**attempt)
        try:
            async with (
                asyncio.timeout(timeout),
                httpcore.AsyncConnectionPool(network_backend=Guard(reach)) as pool,
            ):
                headers = [("User-Agent", "diffusers-api"), ("Content-Type", content_type)]
                limits = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), timeout)}
                answer = await pool.request("PUT", destination.url, headers=headers, content=image, extensions=limits)
        except TimeoutError:
            why = f"it took longer than {timeout:g} seconds"
            continue
        except NotAllowed:
            why = f"the address leads into a private network; {ALLOWING}"
            break
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as fault:
            why = str(fault) or type(fault).__name__
            continue
        if 200 <= answer.status < 300:
            return destination.link or destination.url.partition("?")[0]
        why = f"it answered {answer.status}"
        if answer.status not in _MAY_PASS:
            break
    raise ApiError("UPLOAD_FAILED", f"{destination.host}: {why}.", field=FIELD)
