"""The way into S3-compatible storage: credentials, a client for a location, and its faults as errors of ours."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from api.errors import ApiError
from api.models.addresses import Reach
from api.models.locations import Location

# boto3 takes 0.1 s to import and is imported where it is first used

DEFAULT_REGION = "us-east-1"
"""What storage that has no regions accepts (R2, MinIO, Ceph), and where AWS answers for all of them."""

_ENDPOINT_REGION = re.compile(r"(?:^|\.)s3[.-](?:dualstack\.)?([a-z]{2}(?:-[a-z]+)+-\d{1,3})\.")
_CONNECT_TIMEOUT, _READ_TIMEOUT, _ATTEMPTS = 10, 60, 4


@dataclass(frozen=True)
class Access:
    """How to get into a storage service.

    Attributes:
        access_key: with ``secret_key``; both empty: what the usual chain gives (profile, container or
            instance role), and if that is nothing, unsigned requests.
        session_token: of temporary credentials.
        region: empty: what the endpoint's name says, else the profile's, else ``DEFAULT_REGION``.
        addressing_style: ``path`` (host/bucket), ``virtual`` (bucket.host) or ``auto``: virtual for AWS,
            path elsewhere.
        anonymous: sign nothing, whatever keys there are.
        reach: where connections may lead; None where the operator chose the endpoint.
    """

    access_key: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)
    region: str = ""
    addressing_style: str = "auto"
    anonymous: bool = False
    reach: Reach | None = None

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Access:
        """Read ``AWS_*`` from the environment; set but empty is not set."""
        environ = os.environ if environ is None else environ
        return cls(
            access_key=environ.get("AWS_ACCESS_KEY_ID", "").strip(),
            secret_key=environ.get("AWS_SECRET_ACCESS_KEY", "").strip(),
            session_token=environ.get("AWS_SESSION_TOKEN", "").strip(),
            region=environ.get("AWS_DEFAULT_REGION", "").strip() or environ.get("AWS_REGION", "").strip(),
            addressing_style=environ.get("AWS_S3_ADDRESSING_STYLE", "").strip().lower() or "auto",
        )


def connect(location: Location, access: Access | None = None, *, region: str = "") -> Any:
    """A boto3 client for a location. Thread-safe; connects on its first call.

    Args:
        location: of source ``s3``.
        access: by default from the environment.
        region: where the bucket is, if that is known: AWS is then addressed there.

    Raises:
        ApiError: SOURCE_DENIED: half of the credentials are missing, or the profile is.
    """
    import boto3
    from botocore import UNSIGNED  # type: ignore[import-untyped]
    from botocore.config import Config  # type: ignore[import-untyped]

    access = access or Access.from_env()
    if bool(access.access_key) != bool(access.secret_key):
        message = "One of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY is set and the other is not: set both, or none."
        raise ApiError("SOURCE_DENIED", message)
    endpoint, style = location.endpoint, _addressing_style(location, access)
    if endpoint is None and region:
        # signed for a region, but sent to the global address, a new bucket answers with a redirect
        endpoint = f"https://s3.{region}.amazonaws.com" + (".cn" if region.startswith("cn-") else "")
        # the certificate of *.s3.… covers no bucket with a dot in its name
        style = "path" if "." in location.bucket else "virtual"
    with faults(location):
        session = boto3.session.Session(
            aws_access_key_id=access.access_key or None,
            aws_secret_access_key=access.secret_key or None,
            aws_session_token=(access.session_token or None) if access.access_key else None,
        )
        named = _ENDPOINT_REGION.search(urlsplit(endpoint or "").hostname or "")
        signed = not access.anonymous and session.get_credentials() is not None
        config = Config(
            signature_version="s3v4" if signed else UNSIGNED,
            s3={"addressing_style": style},
            connect_timeout=_CONNECT_TIMEOUT,
            read_timeout=_READ_TIMEOUT,
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
            max_pool_connections=32,
            # other services refuse these headers; Signature V4 covers the body with a SHA-256 anyway
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        where = (named[1] if named else "") or region or access.region or session.region_name or DEFAULT_REGION
        client = session.client("s3", endpoint_url=endpoint, region_name=where, config=config)
    if access.reach and not access.reach.everywhere:
        _guard(client, access.reach)
    return client


def _guard(client: Any, reach: Reach) -> None:
    """Let a client connect only where requests may lead, and to the very address that was checked.

    boto3 has no place for it: where its sessions make their connections is known from botocore 1.43's
    ``httpsession.URLLib3Session`` and urllib3 2's ``HTTPConnection._new_conn``, and held by a test. A proxy that the
    environment names is the operator's, and connects as it is told to.
    """
    from botocore import awsrequest
    from urllib3.exceptions import NewConnectionError

    def guarded(pool: Any) -> Any:
        class Connection(pool.ConnectionCls):  # type: ignore[misc]
            _dns_host: str

            def _new_conn(self) -> socket.socket:
                name = self._dns_host
                try:
                    found = socket.getaddrinfo(name, self.port, type=socket.SOCK_STREAM)
                except OSError:
                    raise NewConnectionError(self, "its name cannot be resolved") from None
                addresses = [str(info[4][0]) for info in found]
                if not reach.permits(name, self.port, addresses):
                    raise NewConnectionError(self, "it leads into a private network")
                self._dns_host = addresses[0]
                try:
                    return super()._new_conn()
                finally:
                    self._dns_host = name  # what the certificate is for

        return type("GuardedPool", (pool,), {"ConnectionCls": Connection})

    pools = {"http": awsrequest.AWSHTTPConnectionPool, "https": awsrequest.AWSHTTPSConnectionPool}
    session = client._endpoint.http_session
    session._manager.pool_classes_by_scheme = {scheme: guarded(pool) for scheme, pool in pools.items()}


@contextlib.contextmanager
def faults(location: Location, *, writing: bool = False) -> Iterator[None]:
    """Turns what boto3 raises into an ``ApiError`` that names the location, the reason and what to set.

    Nothing of the service's own message is passed on: it may quote keys and signatures.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

    try:
        yield
    except Boto3Error as fault:
        # the transfer manager wraps the client's error
        cause = fault.__cause__ or fault.__context__
        refused = _refused(location, cause, writing) if isinstance(cause, ClientError) else None
        raise refused or _unreachable(location, type(fault).__name__) from None
    except ClientError as fault:
        raise _refused(location, fault, writing) from None
    except BotoCoreError as fault:
        raise _failed(location, fault) from None


def _addressing_style(location: Location, access: Access) -> str:
    if access.addressing_style in ("path", "virtual"):
        return access.addressing_style
    host = location.host
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return "path"
    # a bare name (a container beside this one) or localhost has no subdomains
    return "path" if host and "." not in host else "auto"


def missing(location: Location, why: str) -> ApiError:
    """The error for a location that holds no model."""
    return ApiError("MODEL_NOT_FOUND", f"There is no model at {location}: {why}.", requested=str(location))


def _unreachable(location: Location, why: str) -> ApiError:
    hint = ""
    if location.host and "." not in location.host and not location.endpoint_is_default:
        hint = f' "{location.host}" is where the service should be; a bucket is written s3:///bucket/key.'
    return ApiError("SOURCE_UNREACHABLE", f"{location} could not be reached: {why}.{hint}", requested=str(location))


def _denied(location: Location, why: str, do: str) -> ApiError:
    return ApiError("SOURCE_DENIED", f"{location} refused access: {why}. {do}", requested=str(location))


def _refused(location: Location, fault: Any, writing: bool) -> ApiError:
    """The error for an answer of the service: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html."""
    status = fault.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = re.sub(r"[^A-Za-z0-9]", "", str(fault.response.get("Error", {}).get("Code", "")))[:60] or str(status)
    said = code if code == str(status) else f"{status} {code}"
    if code == "NoSuchBucket":
        return missing(location, f'the bucket "{location.bucket}" does not exist')
    if status == 404 or code in ("NoSuchKey", "NotFound"):
        return missing(location, "no such object or bucket")
    if code == "PreconditionFailed":
        return _unreachable(location, "it changed while it was read")
    if status == 301 or code in ("AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraint"):
        return _denied(location, f"{said}, the bucket is in another region", "Set AWS_DEFAULT_REGION to it.")
    if code == "RequestTimeTooSkewed":
        return _denied(location, said, "The clock of this machine is wrong.")
    if status >= 500 or status == 429:
        return _unreachable(location, f"it answered {said}")
    verb = "write" if writing else "read"
    do = f"Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to credentials that may {verb} it."
    # without the right to list, S3 answers 403 for what is not there
    more = "" if writing else " It may also be that the object does not exist."
    return _denied(location, said, do + (more if code in ("403", "AccessDenied") else ""))


def _failed(location: Location, fault: Any) -> ApiError:
    """The error for what went wrong on this side of the service. The text may hold the address: not passed on."""
    from botocore import exceptions as e

    name = type(fault).__name__
    credentials = (e.NoCredentialsError, e.PartialCredentialsError, e.CredentialRetrievalError, e.ProfileNotFound)
    if isinstance(fault, credentials):
        do = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or mend what AWS_PROFILE or the role names."
        return _denied(location, f"the credentials cannot be had ({name})", do)
    reasons = {
        e.EndpointConnectionError: "no connection",
        e.ConnectTimeoutError: "no connection in time",
        e.ReadTimeoutError: "no answer in time",
        e.ConnectionClosedError: "the connection was cut",
        e.SSLError: "its certificate cannot be trusted, or it speaks no TLS",
    }
    return _unreachable(location, next((why for kind, why in reasons.items() if isinstance(fault, kind)), name))
