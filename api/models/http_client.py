"""One HTTP(S) exchange: connecting, redirects, what identifies the content, and faults.

``http.client`` because it lets the body be received into our own buffer: on loopback 2.0 GB/s on one
connection, against 0.9 for httpcore and 1.0 for ``urllib``, which make objects of each piece.

Sources: RFC 9110 §13.1.5 (If-Range), §14 (ranges), §15.3.7 (206), §10.2.3 (Retry-After), §8.8.3 (ETag).
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.client
import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from urllib.parse import SplitResult, unquote, urldefrag, urljoin, urlsplit, urlunsplit

import msgspec

from api.errors import ApiError
from api.models.addresses import Reach, not_allowed

MAX_REDIRECTS = 5


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """How long to wait and how often to try. Seconds, and bytes per second."""

    connect_timeout: float = 10.0
    read_timeout: float = 30.0  # of silence
    min_rate: int = 1024  # a connection that stays below it for read_timeout counts as cut
    attempts: int = 6  # in a row without a new byte
    backoff: float = 0.5  # doubled each time, with jitter
    max_wait: float = 60.0  # also for Retry-After
    save_every: float = 2.0
    reach: Reach = Reach(everywhere=True)  # where connections may lead
    token_variable: str = ""  # what to set when the source refuses


class Wanted(msgspec.Struct, frozen=True):
    """One file to download. ``url`` may end in ``#sha256=<hex>`` and hold ``user:password@``.

    Attributes:
        path: where to, relative to the folder.
        size: bytes it must have.
        etag: ETag it must have.
        sha256: hex it must have.
        headers: sent to the origin of ``url`` only, not where that redirects to.
        digests: it must have, by algorithm: ``md5``, ``crc32``.
    """

    url: str
    path: str
    size: int | None = None
    etag: str | None = None
    sha256: str | None = None
    headers: Mapping[str, str] = {}
    digests: Mapping[str, bytes] = {}


class TransientFault(Exception):
    """A fault that may pass: tried again after a pause."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class EndOfBody(TransientFault):
    """No more bytes: a cut, or, where no length was given, the end."""


class StaleContent(Exception):
    """What was downloaded so far is worthless; carries what to say if there is no other try."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


class Source:
    """One URL: where it leads, what identifies its content, and how to ask for it."""

    def __init__(self, wanted: Wanted, policy: Policy, stop: threading.Event) -> None:
        url, fragment = urldefrag(wanted.url)
        match = re.search(r"(?:^|&)sha256=([^&]*)", fragment)
        self.sha256 = (wanted.sha256 or (match[1] if match else "")).lower()
        if self.sha256 and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ApiError("INVALID_INPUTS", "sha256 must be 64 hexadecimal digits.", requested=self.sha256[:80])
        parts = _split(url)
        self._headers = {"User-Agent": "diffusers-api", "Accept-Encoding": "identity", **wanted.headers}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            self._headers["Authorization"] = "Basic " + base64.b64encode(pair).decode()
        netloc = parts.netloc.rpartition("@")[2]
        self.url = self._leads_to = urlunsplit((parts.scheme, netloc, parts.path or "/", parts.query, ""))
        self.host = netloc
        self.wanted, self.policy, self.stop = wanted, policy, stop
        self.size: int | None = None
        self.etag = self.validator = ""
        self.known = False  # whether a first answer said what the file is

    def error(self, code: str, why: str) -> ApiError:
        """The error to raise; names the host only, as the rest of a URL can hold a signature."""
        return ApiError(code, f"{self.host}: {why}.", requested=self.host)

    def pause(self, failures: int, wait: float = 0.0) -> None:
        """Wait before the next try: at least ``wait`` seconds, at most ``Policy.max_wait``; ends with ``stop``."""
        pause = max(wait, self.policy.backoff * 2 ** min(failures, 16) * random.uniform(0.5, 1))  # noqa: S311
        self.stop.wait(min(pause, self.policy.max_wait))

    def get(self, connection: Connection, start: int, end: int | None, method: str = "GET") -> http.client.HTTPResponse:
        """The answer to a request for bytes ``start`` to ``end``, checked to be of the same content.

        200 with everything is an answer too. Raises TransientFault, StaleContent and ApiError.
        """
        headers = {} if method == "HEAD" else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        if headers and self.known and is_strong(self.etag):
            headers["If-Range"] = self.etag
        origin, url = urlsplit(self.url)[:2], self._leads_to
        for _ in range(MAX_REDIRECTS + 1):
            # what the caller sends may be a secret: it stays with the origin it was meant for
            own = urlsplit(url)[:2] == origin
            base = self._headers if own else {"User-Agent": "diffusers-api", "Accept-Encoding": "identity"}
            response = connection.send(method, url, {**base, **headers})
            location = response.getheader("Location")
            if response.status not in (301, 302, 303, 307, 308) or not location:
                if method == "GET":
                    self._check(response, url, start, end)
                self._leads_to = url
                return response
            connection.close()
            url = _split(location, url).geturl()
        raise self.error("SOURCE_UNREACHABLE", f"more than {MAX_REDIRECTS} redirects")

    def _check(self, response: http.client.HTTPResponse, url: str, start: int, end: int | None) -> None:
        status = response.status
        if status not in (200, 206, 416):
            redirected, self._leads_to = url != self.url, self.url
            if status in (408, 425, 429) or status >= 500 or (redirected and self.known):
                # a signed address that was redirected to expires: ask the first one again
                raise TransientFault(f"it answered {status}", _retry_after(response.getheader("Retry-After")))
            if status in (401, 403):
                where = self.policy.token_variable or "credentials in the URL (https://user:password@host/…)"
                raise self.error("SOURCE_DENIED", f"it answered {status}; set {where}, with access to this file")
            code = "MODEL_NOT_FOUND" if status in (404, 410) else "SOURCE_UNREACHABLE"
            raise self.error(code, f"it answered {status}")
        total = response.length
        if status != 200:
            match = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)", response.getheader("Content-Range", "").strip())
            if not match or (status == 416 and match[3] != "0"):
                raise TransientFault(f"it answered {status} without a range that makes sense")
            total = int(match[3])
            if status == 206:
                first, after = int(match[1] or -1), int(match[2] or -1) + 1
                asked = (start, total if end is None else min(end, total))
                if (first, after) != asked or response.length not in (None, after - first):
                    raise TransientFault("it answered with another range than was asked for")
        self._identify(total, response)

    def _identify(self, total: int | None, response: http.client.HTTPResponse) -> None:
        wanted, etag = self.wanted, response.getheader("ETag", "")
        if wanted.size is not None and total not in (None, wanted.size):
            raise self.error("MODEL_CORRUPT", f"the file has {total} bytes where {wanted.size} were expected")
        if wanted.etag and _bare(etag) != _bare(wanted.etag):
            raise self.error("MODEL_CORRUPT", f"the file's ETag is {etag or 'missing'}, not {wanted.etag}")
        # with a known sha256 the end decides; some clusters give each node's copy an ETag of its own
        validator = "" if self.sha256 else etag or response.getheader("Last-Modified", "")
        if not self.known:
            if total is None and not response.chunked and wanted.size is None and not self.sha256:
                raise self.error("SOURCE_UNREACHABLE", "it does not say how long the file is")
            self.size, self.etag, self.validator, self.known = total, etag, validator, True
        elif (total, validator) != (self.size, self.validator):
            raise StaleContent(self.error("SOURCE_UNREACHABLE", "the file changed while it was downloaded"))

    def body(self, connection: Connection, start: int, end: int | None) -> http.client.HTTPResponse:
        """As ``get``, with the body beginning at ``start`` even where the server has no ranges."""
        before = self.known
        response = self.get(connection, start, end)
        if start and response.status == 200:
            if before and not (self.sha256 or is_strong(self.etag)):
                why = "it was cut, and neither ranges nor a strong ETag allow to go on"
                raise StaleContent(self.error("SOURCE_UNREACHABLE", why))
            waste = memoryview(bytearray(2**20))
            while start:
                start -= connection.receive(response, waste[:start])
        return response


class Connection:
    """One connection, kept alive between the requests of one thread."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._http: http.client.HTTPConnection | None = None
        self._origin: tuple[str, str] = ("", "")
        self._sock: socket.socket | None = None
        self._since, self._count = 0.0, 0
        self.buffer = memoryview(b"")

    def send(self, method: str, url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        """The answer to one request, over the connection that is open where it leads to the same origin.

        Raises TransientFault; ApiError for a certificate that is not valid or an address that is not allowed.
        """
        parts = urlsplit(url)
        if self._http is None or self._origin != parts[:2]:
            self.close()
        for fresh in (self._http is None, True):
            try:
                connection = self._http or self._connect(parts.scheme, parts.hostname or "", parts.port)
                self._origin = parts[:2]
                target = urlunsplit(("", "", parts.path or "/", parts.query, ""))
                connection.request(method, target, headers=dict(headers))
                self._since, self._count = time.monotonic(), 0
                return connection.getresponse()
            except ssl.SSLCertVerificationError as fault:
                self.close()
                why = f"{parts.hostname}: its certificate is not valid: {fault.verify_message}."
                raise ApiError("SOURCE_UNREACHABLE", why, requested=parts.hostname) from None
            except (OSError, http.client.HTTPException) as fault:
                self.close()
                # a kept connection may have been closed by the server meanwhile: that is no fault
                if fresh:
                    raise TransientFault(_reason(fault)) from fault
        raise AssertionError

    def receive(self, response: http.client.HTTPResponse, view: memoryview) -> int:
        """At least one byte of the body, straight from the socket. Raises TransientFault at its end."""
        try:
            if response.chunked:
                data = response.read1(len(view))
                view[: len(data)] = data
                count = len(data)
            else:
                count = response.fp.readinto1(view) if response.fp else 0  # type: ignore[attr-defined]
        except (OSError, ValueError, http.client.HTTPException) as fault:
            raise TransientFault(_reason(fault)) from fault
        if not count:
            raise EndOfBody("the connection was cut")
        self._count += count
        if (now := time.monotonic()) > self._since + self._policy.read_timeout:
            if self._count < self._policy.min_rate * (now - self._since):
                raise TransientFault(f"it sent less than {self._policy.min_rate} bytes a second")
            self._since, self._count = now, 0
        return count

    def _connect(self, scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
        sock = self._dial(host, port or (443 if scheme == "https" else 80))
        if scheme == "https":
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        # the socket is connected already, to an address that was checked
        self._http = http.client.HTTPConnection(host, port or (443 if scheme == "https" else 80))
        if scheme == "https":
            self._http.default_port = 443
        self._http.sock = self._sock = sock
        self._http.auto_open = 0
        return self._http

    def _dial(self, host: str, port: int) -> socket.socket:
        addresses = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not self._policy.reach.permits(host, port, addresses):
            raise not_allowed(host)
        fault: OSError = OSError("no address")
        for address in dict.fromkeys(addresses):
            try:
                sock = socket.create_connection((address, port), self._policy.connect_timeout)
            except OSError as error:
                fault = error
                continue
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(self._policy.read_timeout)
            return sock
        raise fault

    def abort(self) -> None:
        """From another thread: wakes the one that waits for this connection."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it; the next request opens a new one."""
        if self._http is not None:
            self._http.close()
        self._http = None


def _split(url: str, base: str = "") -> SplitResult:
    try:
        parts = urlsplit(urljoin(base, url))
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        url.encode("ascii")
        valid = valid and not re.search(r"[\x00-\x20\x7f]", url)
    except ValueError:
        valid = False
    if not valid:
        raise ApiError("URL_NOT_ALLOWED", "A source must be an http or https URL, in ASCII.")
    return parts


def is_strong(etag: str) -> bool:
    """Whether an ETag promises the same bytes (RFC 9110 §8.8.1)."""
    return etag.startswith('"')


def _bare(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _retry_after(value: str | None) -> float:
    """Seconds, of a number or an HTTP date."""
    if not value:
        return 0.0
    if value.strip().isdigit():
        return float(value.strip()[:9])
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _reason(fault: Exception) -> str:
    if isinstance(fault, TimeoutError):
        return "it did not answer in time"
    if isinstance(fault, socket.gaierror):
        return "its name cannot be resolved"
    # messages of http.client can quote what the server sent, hence only the kind
    return os.strerror(fault.errno) if isinstance(fault, OSError) and fault.errno else "the connection was cut"
