"""One file at a URL, in S3 or behind HTTP: found, described, and ready to be read over plain HTTP."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import replace
from urllib.parse import urlsplit

import msgspec

from api.errors import ApiError
from api.models import s3
from api.models.addresses import Reach, not_allowed
from api.models.http_client import Policy, Wanted
from api.models.http_stream import Stream, open_stream, probe
from api.models.locations import Location
from api.models.s3_client import Access
from api.settings import Settings


class Remote(msgspec.Struct, frozen=True):
    """A file that can be fetched.

    Attributes:
        location: what was asked for.
        wanted: how to GET it; its URL may be signed: a secret.
        policy: of its connections.
        digests: algorithm to digest, where the source says one of the whole file.
        size: bytes, where known.
    """

    location: Location
    wanted: Wanted
    policy: Policy
    digests: Mapping[str, bytes]
    size: int | None

    @property
    def version(self) -> str:
        """What identifies the content: a digest, else the ETag without its quotes, else nothing."""
        sha256 = self.wanted.sha256
        return f"sha256:{sha256}" if sha256 else (self.wanted.etag or "").removeprefix("W/").strip('"')

    @property
    def is_known(self) -> bool:
        """Whether the operator's own storage says what is known of it."""
        return self.location.source == "s3" and self.location.endpoint_is_default

    def stream(self) -> Stream:
        """Open it for reading from front to back; every digest is compared at the end."""
        wanted = self.wanted
        return open_stream(
            wanted.url,
            size=wanted.size,
            etag=wanted.etag,
            sha256=wanted.sha256,
            headers=wanted.headers,
            digests=self.digests,
            policy=self.policy,
        )


def find(location: Location, settings: Settings, trusted: bool) -> Remote:
    """Ask for a file's size, version and digests.

    Args:
        location: an archive or a checkpoint.
        settings: keys, and whether private networks are allowed.
        trusted: the operator named it, so that it may lie in a private network.

    Raises:
        ApiError: MODEL_NOT_FOUND, SOURCE_DENIED, SOURCE_UNREACHABLE, URL_NOT_ALLOWED.
    """
    policy = policy_of(location, settings, trusted)
    if location.source == "s3":
        plan = s3.resolve(location, access_to(location, settings, trusted))
        (file,) = plan.files
        url = s3.urls(plan, access_to(location, settings, trusted))[file.path]
        sha256 = location.sha256 or file.sha256
        wanted = Wanted(url, file.path, file.size, file.etag, sha256, digests=file.digests)
        return Remote(location, wanted, policy, file.digests, file.size)
    headers = {"Authorization": location.authorization} if location.authorization else _at_the_hub(location, settings)
    # a first look is not worth the patience of a download of hours
    impatient = msgspec.structs.replace(policy, attempts=3, read_timeout=10.0, max_wait=5.0)
    found = probe(location.url, headers=headers, sha256=location.sha256, policy=impatient)
    wanted = Wanted(
        location.url, location.filename, found.size, found.etag or None, location.sha256, headers, found.digests
    )
    return Remote(location, wanted, policy, found.digests, found.size)


def policy_of(location: Location, settings: Settings, trusted: bool) -> Policy:
    """How to connect: only to public addresses, where a request chose the host and nobody allowed more."""
    ours = trusted or (location.source == "s3" and location.endpoint_is_default)
    variable = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if location.source == "s3" else ""
    return Policy(reach=Reach(everywhere=True) if ours else Reach.of(settings), token_variable=variable)


def access_to(location: Location, settings: Settings, trusted: bool) -> Access:
    """The keys for a place in S3.

    A signature is good for one host and one request only, so that it may be shown to an endpoint that a
    request chose; the token of temporary credentials may not, and then nothing is signed there.

    Raises:
        ApiError: URL_NOT_ALLOWED: the request chose an endpoint in a private network.
    """
    access = Access(
        access_key=settings.aws_access_key_id,
        secret_key=settings.aws_secret_access_key,
        session_token=settings.aws_session_token,
        region=settings.aws_default_region,
        addressing_style=settings.aws_s3_addressing_style,
    )
    if trusted or location.endpoint_is_default:
        return access
    reach = Reach.of(settings)
    _check_reach(location, reach)
    if not access.access_key or access.session_token:
        return Access(region=access.region, addressing_style=access.addressing_style, anonymous=True, reach=reach)
    return replace(access, reach=reach)


def _check_reach(location: Location, reach: Reach) -> None:
    """Say it in a sentence; what counts is the look-up on connecting (``s3_client.py``)."""
    if reach.everywhere:
        return
    parts = urlsplit(location.endpoint or "")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError:
        message = f"{location} could not be reached: its name cannot be resolved."
        raise ApiError("SOURCE_UNREACHABLE", message, requested=str(location)) from None
    if not reach.permits(parts.hostname or "", port, [str(info[4][0]) for info in found]):
        raise not_allowed(str(location))


def hub_token(settings: Settings) -> str:
    """What the environment gives to authenticate with at the hub, by either name; may be empty."""
    return settings.hf_auth_token or settings.hf_token


def _at_the_hub(location: Location, settings: Settings) -> dict[str, str]:
    """The hub's token, for a file on the hub: ``https://huggingface.co/org/name/resolve/main/x.safetensors``."""
    address = urlsplit(settings.hf_endpoint or "https://huggingface.co")
    token = hub_token(settings)
    return {"Authorization": f"Bearer {token}"} if token and urlsplit(location.url)[:2] == address[:2] else {}
