"""Where MODEL_URL and CHECKPOINT_URL point: an object or a folder in S3-compatible storage, or a file behind HTTP."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from api.errors import ApiError

Kind = Literal["prefix", "archive", "checkpoint"]

FORMS = (
    "s3://",
    "s3:///bucket/key",
    "s3://endpoint/bucket/key",
    "http+s3://endpoint/bucket/key",
    "https+s3://endpoint/bucket/key",
    "https://host/path",
    "http://host/path",
)
# .tar.zstd is what older containers called the archive of a trained model
ARCHIVE_SUFFIXES = (".tar.zst", ".tar.zstd", ".tar.gz", ".tgz", ".tar")
CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt")

_S3 = re.compile(r"(?i:(https?)\+)?(?i:s3)://(?P<endpoint>[^/]*)(?:/(?P<bucket>[^/]*))?(?:/(?P<key>.*))?", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9.])?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
# one bucket namespace whatever the region: https://docs.aws.amazon.com/general/latest/gr/s3.html
_AWS = re.compile(r"https://s3(?:[.-](?:dualstack\.)?[a-z]{2}(?:-[a-z]+)+-\d)?\.amazonaws\.com")
_HUB_PAGE = re.compile(r"(/[^/]+/[^/]+)/blob/(.+)")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_MAX_URL = 8192
_MAX_KEY = 1024  # bytes; https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html
_MAX_NAME = 200  # bytes; file systems take 255, and temporary files add a little

# query parameters that say who may read for how long, never what is read
_SIGNED_V2 = frozenset({"awsaccesskeyid", "googleaccessid", "signature", "expires", "policy", "key-pair-id"})
_SIGNED_AZURE = frozenset(
    {"sv", "ss", "srt", "sp", "se", "st", "spr", "sig", "sr", "sip", "skoid", "sktid", "skt", "ske", "sks", "skv"}
)


@dataclass(frozen=True, repr=False)
class Location:
    """Where weights lie. ``str()`` and ``repr()`` show neither credentials nor queries.

    Attributes:
        source: who fetches it: ``s3`` or ``http``.
        kind: what lies there, by the end of its name: an ``archive``, a single-file ``checkpoint``,
            or else a ``prefix``: in S3 a folder of plain files; behind HTTP a file whose name says
            nothing, unless ``#fname=`` does.
        endpoint: S3: base URL of the service without credentials; None is AWS itself.
        bucket: S3: name of the bucket.
        key: S3: key of the object; a prefix ends with ``/``.
        url: HTTP: what to GET: percent-encoded (RFC 3986), without user name and fragment. May hold a
            signature: not for logs.
        authorization: HTTP: value of the ``Authorization`` header, from ``user:password@`` in the URL.
        fname: file name from ``#fname=``.
        sha256: 64 lower-case hex digits from ``#sha256=``: the digest that the one file must have.
        endpoint_is_default: S3: the endpoint is the one that the operator configured (or AWS), not
            another that a request chose.
    """

    source: Literal["s3", "http"]
    kind: Kind
    endpoint: str | None = None
    bucket: str = ""
    key: str = ""
    url: str = ""
    authorization: str | None = None
    fname: str | None = None
    sha256: str | None = None
    endpoint_is_default: bool = field(default=True, compare=False)

    def __str__(self) -> str:
        if self.source == "http":
            base, query, _ = self.url.partition("?")
            return base + ("?…" if query else "")
        if self.endpoint is None:
            return f"s3:///{self.bucket}/{self.key}"
        scheme = "" if self.endpoint.startswith("https:") else "http+"
        return f"{scheme}s3://{self.endpoint.partition('://')[2]}/{self.bucket}/{self.key}"

    def __repr__(self) -> str:
        return f"Location({self}, {self.kind})"

    @property
    def host(self) -> str:
        """The host name or address that is connected to, without its port; ``""`` for AWS itself."""
        return urlsplit(self.url or self.endpoint or "").hostname or ""

    @property
    def filename(self) -> str:
        """A safe name for the one file: ``fname``, else the end of the URL, else ``model``."""
        if self.fname:
            return self.fname
        last = (
            self.key.rpartition("/")[2] if self.source == "s3" else unquote(urlsplit(self.url).path).rpartition("/")[2]
        )
        return last if is_safe_name(last) else "model" + _suffix(last)

    @property
    def archive_kind(self) -> str:
        """How an archive is compressed: ``tar``, ``tar.gz`` or ``tar.zst``; ``""`` for what is none."""
        kinds = {".tgz": "tar.gz", ".tar.zstd": "tar.zst"}
        suffix = _suffix(self.fname or self.key or unquote(urlsplit(self.url).path))
        return kinds.get(suffix, suffix[1:]) if self.kind == "archive" else ""

    @property
    def identity(self) -> tuple[str, ...]:
        """What is equal for two locations that mean the same object, and for no others.

        Credentials, signatures and their dates are no part of it, nor is which region's address of
        AWS was used, nor the name that the file gets here.
        """
        if self.source == "http":
            return ("http", _unsigned(self.url), self.kind)
        endpoint = self.endpoint or ""
        return ("s3", "" if _AWS.fullmatch(endpoint) else endpoint, self.bucket, self.key, self.kind)


def normalized_model_id(model_id: str, revision: str = "") -> str:
    """The name that docker-diffusers-api gives a stored model: ``models--org--name[--revision]``.

    The precision is no part of it. https://github.com/kiri-art/docker-diffusers-api, api/download.py
    """
    return "models--" + model_id.replace("/", "--") + (f"--{revision}" if revision else "")


def is_safe_name(name: str) -> bool:
    """Whether a text can be the name of one file in a folder: no separators, not hidden, at most 200 bytes."""
    return (
        bool(name)
        and not name.startswith((".", "~"))
        and not _CONTROL.search(name)
        and not set(name) & set('/\\:*?"<>|')
        and len(name.encode()) <= _MAX_NAME
    )


def parse_location(
    url: str,
    *,
    default_endpoint: str | None = None,
    default_bucket: str | None = None,
    model_id: str = "",
    revision: str = "",
    field: str = "callInputs.MODEL_URL",
) -> Location:
    """Read any URL form of ``FORMS``.

    In the ``s3`` forms an empty endpoint, bucket or key falls back to the defaults; ``s3://`` means
    https, and keys are taken literally (nothing is percent-decoded, as with the AWS command line).
    ``#fname=NAME&sha256=HEX`` may follow.

    Args:
        url: what the request or the environment holds.
        default_endpoint: AWS_S3_ENDPOINT_URL; empty: AWS itself.
        default_bucket: AWS_S3_DEFAULT_BUCKET.
        model_id: names the object where the URL names none: ``<normalized model id>.tar.zst``.
        revision: MODEL_REVISION, part of that name.
        field: path of the input that held the URL, for errors.

    Raises:
        ApiError: INVALID_INPUTS.
    """
    try:
        if len(url) > _MAX_URL or _CONTROL.search(url):
            raise ValueError(f"It has control characters, or is longer than {_MAX_URL} characters.")
        base, _, fragment = url.strip().partition("#")
        fname, sha256 = _read_fragment(fragment)
        if match := _S3.fullmatch(base):
            scheme = (match[1] or "https").lower()
            endpoint, bucket, key = (match[name] or "" for name in ("endpoint", "bucket", "key"))
            usual = _read_default_endpoint(default_endpoint or "")
            at = _read_endpoint(f"{scheme}://{endpoint}") if endpoint else usual
            bucket = _read_bucket(bucket or default_bucket or "")
            key = key or (normalized_model_id(model_id, revision) + ".tar.zst" if model_id else "")
            kind = _kind(fname or key)
            key = _read_key(key, kind)
            if kind == "prefix" and (sha256 or fname):
                raise ValueError("#fname and #sha256 are of one file; this names a folder.")
            trusted = at is None or at == usual or bool(_AWS.fullmatch(at))
            return Location("s3", kind, at, bucket, key, fname=fname, sha256=sha256, endpoint_is_default=trusted)
        address, authorization = _read_http(base)
        kind = _kind(fname or unquote(urlsplit(address).path))
        return Location("http", kind, url=address, authorization=authorization, fname=fname, sha256=sha256)
    except ValueError as fault:
        message = f"{fault}" if str(fault).endswith(".") else "This is not a URL that can be read."
        # "from None": the fault's text may hold the URL
        raise ApiError("INVALID_INPUTS", message, field=field, requested=redacted(url), available=FORMS) from None


def pairs_of(fragment: str) -> list[tuple[str, str]]:
    """What follows the ``#`` of an address, as names and values; none where it cannot be read."""
    try:
        return parse_qsl(fragment, keep_blank_values=True, max_num_fields=8)
    except ValueError:  # there are more than that
        return []


def _suffix(name: str) -> str:
    lowered = name.lower()
    return next((end for end in ARCHIVE_SUFFIXES + CHECKPOINT_SUFFIXES if lowered.endswith(end)), "")


def _kind(name: str) -> Kind:
    suffix = _suffix(name)
    return "archive" if suffix in ARCHIVE_SUFFIXES else "checkpoint" if suffix else "prefix"


def _read_fragment(fragment: str) -> tuple[str | None, str | None]:
    pairs = pairs_of(fragment)
    known = dict(pairs)
    if fragment and (not pairs or len(known) != len(pairs) or known.keys() - {"fname", "sha256"}):
        # ignoring a misspelt sha256 would leave a file unverified that was to be verified
        raise ValueError("After # only fname=NAME and sha256=HEX are known, each once.")
    fname, sha256 = known.get("fname"), known.get("sha256")
    if fname is not None and not is_safe_name(fname):
        raise ValueError("#fname must be the name of one file, without separators.")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise ValueError("#sha256 must be 64 hex digits.")
    return fname, sha256.lower() if sha256 else None


def _read_bucket(bucket: str) -> str:
    if not bucket:
        raise ValueError("It names no bucket, and AWS_S3_DEFAULT_BUCKET is not set.")
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise ValueError("The name of the bucket is not one that S3 allows.")
    return bucket


def _read_key(key: str, kind: Kind) -> str:
    if not key:
        raise ValueError("It names no object, and there is no model id to name one after.")
    key = key if kind != "prefix" or key.endswith("/") else key + "/"
    if "?" in key:
        raise ValueError('An s3 URL has no query; give a signed URL as "https://…".')
    if len(key.encode()) > _MAX_KEY or not {".", ".."}.isdisjoint(key.split("/")):
        raise ValueError(f'A key has at most {_MAX_KEY} bytes, and no part "." or "..".')
    return key


def _read_default_endpoint(endpoint: str) -> str | None:
    if not endpoint:
        return None
    try:
        return _read_endpoint(endpoint if "://" in endpoint else "https://" + endpoint)
    except ValueError:
        raise ValueError("AWS_S3_ENDPOINT_URL is not an http(s) URL of a host.") from None


def _read_endpoint(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if "@" in parts.netloc:
        raise ValueError("Credentials for S3 come from the environment, never in the URL.")
    if parts.query or parts.fragment:
        raise ValueError("An endpoint has no query.")
    # some services are reached below a path
    return _origin(parts) + _encoded(parts.path).rstrip("/")


def _read_http(url: str) -> tuple[str, str | None]:
    parts = urlsplit(url)
    path = _encoded(parts.path) or "/"
    if not {".", ".."}.isdisjoint(path.split("/")):
        raise ValueError('The path has a part "." or "..".')
    if parts.hostname in ("huggingface.co", "hf.co") and (page := _HUB_PAGE.fullmatch(path)):
        path = f"{page[1]}/resolve/{page[2]}"  # people copy the address of the page about a file
    userinfo, at, _ = parts.netloc.rpartition("@")
    token = base64.b64encode(unquote(userinfo).encode()).decode()
    address = _origin(parts) + path + (f"?{_encoded(parts.query)}" if parts.query else "")
    return address, f"Basic {token}" if at else None


def _origin(parts: SplitResult) -> str:
    """Scheme, host and port as RFC 3986 §6.2.2 normalizes them."""
    if parts.scheme not in ("http", "https"):
        raise ValueError("Must be a URL in one of the forms of `available`.")
    host, port = (parts.hostname or "").removesuffix("."), parts.port
    if not _HOST.fullmatch(host) or port == 0:
        raise ValueError("The host is not a name or an address in ASCII.")
    shown = f"[{host}]" if ":" in host else host
    default = 443 if parts.scheme == "https" else 80
    return f"{parts.scheme}://{shown}" + (f":{port}" if port and port != default else "")


def _encoded(text: str) -> str:
    """Percent-encode what must be, decode what need not be: one spelling for one path or query."""

    def normal(match: re.Match[str]) -> str:
        if not match[1]:
            return "".join(f"%{byte:02X}" for byte in match[0].encode())
        char = chr(int(match[1], 16))
        return char if char in _UNRESERVED else match[0].upper()

    return re.sub(r"%([0-9A-Fa-f]{2})|[^A-Za-z0-9\-._~!$&'()*+,;=:@/?]", normal, text)


def _unsigned(url: str) -> str:
    base, _, query = url.partition("?")
    pairs = [part for part in query.split("&") if part]
    names = {part.partition("=")[0].lower() for part in pairs}
    drop = {name for name in names if name.startswith(("x-amz-", "x-goog-"))}
    drop |= _SIGNED_V2 if "signature" in names else set()
    drop |= _SIGNED_AZURE if {"sig", "se"} <= names else set()
    kept = [part for part in pairs if part.partition("=")[0].lower() not in drop]
    return base + ("?" + "&".join(kept) if kept else "")


def redacted(url: str) -> str:
    """A URL that could not be read, without anything that may be a secret."""
    shown = re.split(r"[?#]", _CONTROL.sub("�", url), maxsplit=1)[0]
    return re.sub(r"^([^:]*:/*)?.*@", r"\1", shown, flags=re.DOTALL)[:200]
