"""What a job for later is accepted by: the client's name for it, a digest of it, the addresses beside its inputs."""

from __future__ import annotations

import hashlib

import msgspec

from api.service.entries import Terms
from api.service.s3_config import S3Config, check_s3_config
from api.service.webhooks_delivery import check_receiver
from api.settings import Settings


def scoped(key: str | None, job_id: str | None, terms: Terms) -> str | None:
    """A client's name for a request as the store knows it: one owner's, at one endpoint, is nobody else's.

    Args:
        key: its Idempotency-Key.
        job_id: the id that it chose, which goes before the key.
        terms: owner and endpoint.
    """
    if job_id is not None:
        key = f"\x1f\x1f{job_id}"  # neither a key that a client sends nor the word of an endpoint begins like this
    elif key is None:
        return None
    return f"{terms.owner}\x1f{terms.endpoint}\x1f{key}" if terms.owner or terms.endpoint else key


def digest_of(inputs: bytes, terms: Terms, priority: str) -> str:
    """The same for two requests that ask for the same."""
    more = msgspec.json.encode([terms, priority]) if terms.endpoint else b""
    return hashlib.sha256(inputs + more).hexdigest()


async def check_places(terms: Terms, s3: S3Config | None, settings: Settings) -> None:
    """Whether the addresses that came beside the inputs may be connected to.

    Raises:
        ApiError: URL_NOT_ALLOWED, INVALID_INPUTS.
    """
    if terms.webhook:
        await check_receiver(terms.webhook, "webhook", settings)
    if s3:
        await check_s3_config(s3, settings)
