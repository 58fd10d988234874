"""Sends one webhook once.

httpcore, which image URLs are fetched with: a connection is made by a backend of ours, so that it goes to the very
address that was checked (``Guard``), which a client of a higher level would have to be taken apart for. Redirects are
not followed: they would lead elsewhere than where a signature or a check said.
"""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpcore

from api.errors import ApiError
from api.models.addresses import ALLOWING, Reach
from api.service.destinations import Destination, check_destinations
from api.service.fetch import Guard, NotAllowed, check_scheme
from api.settings import Settings

_CONNECTIONS = 256
_KEEP = 15.0
"""Seconds that an idle connection is kept."""
_ANSWER = 64 * 1024
"""Bytes of an answer that are read, so that the connection can be used again."""
_LONGEST_WAIT = 3600.0
_GONE, _TOO_MANY = 410, 429


class Outcome(NamedTuple):
    """What became of a try.

    Attributes:
        error: why it did not arrive; empty: it did.
        at_least: seconds that the receiver wants to be left alone.
        final: it is of no use to try again.
        is_down: others would not arrive there either; False: it may be this one, or this path.
    """

    error: str = ""
    at_least: float = 0.0
    final: bool = False
    is_down: bool = True


async def check_receiver(url: str, field: str, settings: Settings) -> None:
    """Say before anything is done that a request's address is not allowed; connecting looks again.

    Raises:
        ApiError: URL_NOT_ALLOWED, INVALID_INPUTS.
    """
    if url == settings.send_url:
        return
    check_scheme(url, field)
    if "@" in urlsplit(url).netloc:
        raise ApiError("INVALID_INPUTS", "No user name or password is sent with a webhook; sign it.", field=field)
    await check_destinations((Destination(url),), settings, field)


class Delivery:
    """Connections to receivers.

    Args:
        settings: SEND_URL, which may lead into a private network; whether others may; how long a try may take.
    """

    def __init__(self, settings: Settings) -> None:
        self._trusted_url = settings.send_url
        self._timeout = settings.webhook_timeout
        self._trusted = _pool(httpcore.AnyIOBackend())
        self._guarded = _pool(Guard(Reach.of(settings)))

    async def __call__(self, url: str, body: bytes, headers: list[tuple[str, str]]) -> Outcome:
        """POST once."""
        pool = self._trusted if url == self._trusted_url else self._guarded
        sent = [("Content-Type", "application/json"), ("User-Agent", "diffusers-api"), *headers]
        limits = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), self._timeout)}
        outcome: Outcome | None = None
        try:
            async with (
                asyncio.timeout(self._timeout),
                pool.stream("POST", url, headers=sent, content=body, extensions=limits) as response,
            ):
                outcome = _judge(response)
                await _drain(response)
        except TimeoutError:
            return outcome or Outcome(f"it took longer than {self._timeout:g} seconds")
        except NotAllowed:
            why = f"the address leads into a private network; {ALLOWING}"
            return Outcome(why, final=True, is_down=False)
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as fault:
            return outcome or Outcome(str(fault) or type(fault).__name__)
        return outcome

    async def close(self) -> None:
        """Let all connections go."""
        await self._trusted.aclose()
        await self._guarded.aclose()


def _pool(backend: Any) -> httpcore.AsyncConnectionPool:
    return httpcore.AsyncConnectionPool(
        max_connections=_CONNECTIONS, keepalive_expiry=_KEEP, network_backend=backend, retries=0
    )


async def _drain(response: httpcore.Response) -> None:
    """Read what nobody wants to know, so that the connection can be used again; its status has said all."""
    read = 0
    async for chunk in response.aiter_stream():
        read += len(chunk)
        if read > _ANSWER:
            return


def _judge(response: httpcore.Response) -> Outcome:
    if 200 <= response.status < 300:
        return Outcome()
    if response.status == _GONE:  # as Standard Webhooks has it
        return Outcome("it answered 410: it wants no more of these", final=True, is_down=False)
    asked = next((value for name, value in response.headers if name.lower() == b"retry-after"), b"").decode("latin-1")
    at_least = min(float(asked), _LONGEST_WAIT) if asked.isascii() and asked.isdigit() else 0.0
    why = "; redirects are not followed" if 300 <= response.status < 400 else ""
    is_down = response.status >= 500 or response.status == _TOO_MANY
    return Outcome(f"it answered {response.status}{why}", at_least, is_down=is_down)
