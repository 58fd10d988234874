"""Fetches a URL that a client named, without letting it reach into private networks.

The guard sits where connections are made: every address that a name resolves to is checked, and
the connection goes to the address that was checked. Redirects and names that change their mind
between two look-ups (DNS rebinding) pass through the same place.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

from api.errors import ApiError
from api.models.addresses import Reach, not_allowed
from api.models.locations import redacted
from api.service.lookups import look_up

MAX_REDIRECTS = 5
_PATIENCE = 3.0
"""Seconds that an address gets before the next one of the same name is tried."""
_REDIRECTS = (301, 302, 303, 307, 308)


class NotAllowed(Exception):
    """An address that must not be connected to."""


class Guard(httpcore.AsyncNetworkBackend):
    """Connects only where requests may lead, and to the very address that was checked."""

    def __init__(self, reach: Reach) -> None:
        self._backend = httpcore.AnyIOBackend()
        self._reach = reach

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection to the first of a name's addresses that takes one.

        Raises:
            NotAllowed: one of them must not be connected to.
        """
        try:
            addresses = await look_up(host, port)
        except (OSError, UnicodeError) as fault:
            raise httpcore.ConnectError(f"the name {host} cannot be resolved") from fault
        if not self._reach.permits(host, port, addresses):
            raise NotAllowed(host)
        *others, last = addresses
        for address in others:  # such as those of IPv6 on a machine that has none
            patience = _PATIENCE if timeout is None else min(_PATIENCE, timeout / len(addresses))
            with contextlib.suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self._backend.connect_tcp(address, port, patience, local_address, socket_options)
        return await self._backend.connect_tcp(last, port, timeout, local_address, socket_options)

    async def connect_unix_socket(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        """There are none.

        Raises:
            NotAllowed: always.
        """
        raise NotAllowed("unix socket")

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await self._backend.sleep(seconds)


async def fetch(url: str, field: str, *, timeout: float, max_bytes: int, reach: Reach) -> bytes:
    """GET a URL.

    Args:
        url: http or https; at most five redirects are followed, each checked like the first.
        field: path of the input that held it, for errors.
        timeout: seconds for all of it.
        max_bytes: size of the body, at most.
        reach: where it may lead.

    Raises:
        ApiError: URL_NOT_ALLOWED, SOURCE_UNREACHABLE, IMAGE_TOO_LARGE.
    """
    try:
        async with (
            asyncio.timeout(timeout),
            httpcore.AsyncConnectionPool(network_backend=Guard(reach)) as pool,
        ):
            return await _follow(pool, url, field, timeout, max_bytes)
    except TimeoutError:
        raise _unreachable(url, field, f"it took longer than {timeout:g} seconds") from None
    except NotAllowed:
        raise not_allowed(redacted(url), field) from None
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as fault:
        raise _unreachable(url, field, str(fault) or type(fault).__name__) from fault


async def _follow(pool: httpcore.AsyncConnectionPool, url: str, field: str, timeout: float, max_bytes: int) -> bytes:
    timeouts = {"timeout": {"connect": timeout, "read": timeout, "write": timeout, "pool": timeout}}
    headers = [("User-Agent", "diffusers-api"), ("Accept", "image/*,*/*;q=0.5")]
    for _ in range(MAX_REDIRECTS + 1):
        check_scheme(url, field)
        async with pool.stream("GET", url, headers=headers, extensions=timeouts) as response:
            location = _header(response.headers, b"location")
            if response.status in _REDIRECTS and location:
                try:
                    url = urljoin(url, location)
                except ValueError:
                    raise _unreachable(url, field, "it redirects to what is no URL") from None
                continue
            if response.status != 200:
                raise _unreachable(url, field, f"it answered {response.status}")
            body = bytearray()
            async for chunk in response.aiter_stream():
                body += chunk
                if len(body) > max_bytes:
                    raise ApiError("IMAGE_TOO_LARGE", f"More than MAX_BODY of {max_bytes} bytes.", field=field)
            return bytes(body)
    raise _unreachable(url, field, f"more than {MAX_REDIRECTS} redirects")


def check_scheme(url: str, field: str) -> None:
    """Whether a text is an http(s) URL.

    Raises:
        ApiError: URL_NOT_ALLOWED.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        url.encode("ascii")
    except ValueError:
        valid = False
    if not valid:
        message = "Must be an http or https URL, in ASCII."
        raise ApiError("URL_NOT_ALLOWED", message, field=field, requested=redacted(url))


def _header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in headers if key.lower() == name), None)


def _unreachable(url: str, field: str, why: str) -> ApiError:
    host = urlsplit(url).netloc.rpartition("@")[2]
    return ApiError("SOURCE_UNREACHABLE", f"{host} could not be fetched: {why}.", field=field, requested=redacted(url))
