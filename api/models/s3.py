"""Models in S3-compatible storage: what lies at a location, and URLs that plain HTTP can fetch it with."""

from __future__ import annotations

import hashlib
import re
from base64 import b64decode
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from api.errors import ApiError
from api.models.locations import Location
from api.models.manifest import MANIFEST_NAME, Manifest, is_safe_path
from api.models.s3_client import Access, connect, faults, missing

MODEL_INDEX = "model_index.json"
EXPIRES = 12 * 3600
"""Seconds that a signed URL is valid, at most seven days; credentials that end sooner end it sooner."""

Select = Callable[[list[str], bytes], Collection[str]]
"""Chooses files of a folder: (relative paths, content of model_index.json) to the paths that are wanted."""

_AT_ONCE = 8
_MAX_OBJECTS = 10_000
_MAX_SMALL = 16 * 2**20  # bytes of a JSON file that is read into memory
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MD5 = re.compile(r'"([0-9a-f]{32})"')


class RemoteFile(msgspec.Struct, frozen=True):
    """One object.

    Attributes:
        path: where it belongs in the model's folder, with ``/``; a file name for an archive or a checkpoint.
        key: its key in the bucket.
        size: bytes.
        etag: as in the ``ETag`` header, with its quotes: good for ``If-Match``.
        sha256: in hex, where the storage or whoever uploaded it says so.
        md5: in hex, where the ETag is one: uploaded in one part, not encrypted with a key of KMS.
        crc32: in hex, where the storage keeps one of the whole object.
    """

    path: str
    key: str
    size: int
    etag: str
    sha256: str | None = None
    md5: str | None = None
    crc32: str | None = None

    @property
    def digests(self) -> dict[str, bytes]:
        """The digests beside the sha256, by algorithm."""
        return {name: bytes.fromhex(value) for name, value in (("md5", self.md5), ("crc32", self.crc32)) if value}


class Plan(msgspec.Struct, frozen=True):
    """What is to be fetched.

    Attributes:
        location: where from.
        files: every file, sorted by path.
        revision: what identifies the content: ``sha256:<hex>`` or the ETag of the one object, or a
            digest over all files of a folder.
        region: where the bucket is.
    """

    location: Location
    files: tuple[RemoteFile, ...]
    revision: str
    region: str

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.size for file in self.files)


def resolve(
    location: Location, access: Access | None = None, *, select: Select | None = None, marker: str = MODEL_INDEX
) -> Plan:
    """Find out what lies at a location, without fetching it.

    A folder must hold ``model_index.json``, which an upload writes last. Where the upload left its
    manifest, exactly the files that it lists are taken, and all of them must be there with their
    sizes: what an older model left in the folder is no part of this one.

    Args:
        location: of source ``s3``.
        access: by default from the environment.
        select: chooses files of a folder; by default all are taken.
        marker: the file that a folder must hold; its content is what ``select`` is given.

    Raises:
        ApiError: MODEL_NOT_FOUND, SOURCE_DENIED, SOURCE_UNREACHABLE, ARCHIVE_UNSAFE (a key that would
            lead out of the folder), INVALID_INPUTS (no model's folder: too many objects),
            and what ``select`` raises.
    """
    client = connect(location, access)
    with faults(location):
        if location.kind == "prefix":
            return _resolve_folder(client, location, select, marker)
        file, region = _head(client, location, location.filename, location.key)
        revision = f"sha256:{file.sha256}" if file.sha256 else file.etag
        return Plan(location, (file,), revision, region)


def urls(plan: Plan, access: Access | None = None, *, expires: int = EXPIRES) -> dict[str, str]:
    """A URL for each file that a plain GET, with or without ``Range``, fetches it with.

    Signed (AWS Signature Version 4 in the query) where there are credentials, else bare. Makes no
    connection. The URLs are secrets: not for logs.

    Args:
        plan: from ``resolve``.
        access: as for ``resolve``.
        expires: seconds.

    Returns:
        path to URL.

    Raises:
        ApiError: SOURCE_DENIED.
    """
    client = connect(plan.location, access, region=plan.region)
    bucket = plan.location.bucket
    with faults(plan.location):
        return {
            file.path: client.generate_presigned_url(
                "get_object", Params={"Bucket": bucket, "Key": file.key}, ExpiresIn=expires
            )
            for file in plan.files
        }


def _resolve_folder(client: Any, location: Location, select: Select | None, marker: str) -> Plan:
    found: dict[str, RemoteFile] = {}
    region = client.meta.region_name
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=location.bucket, Prefix=location.key)
    for page in pages:
        region = _region(page) or region
        for entry in page.get("Contents", ()):
            path = entry["Key"][len(location.key) :]
            # consoles and mounts mark folders with empty objects
            if path and not path.endswith("/"):
                found[path] = RemoteFile(path, entry["Key"], entry["Size"], entry["ETag"])
        if len(found) > _MAX_OBJECTS:
            message = f"{location} is no model's folder: it holds more than {_MAX_OBJECTS} objects."
            raise ApiError("INVALID_INPUTS", message)
    if not found:
        raise missing(location, "nothing is there")
    _check_paths(location, found)
    index = found.get(marker)
    if index is None or not index.size:
        raise missing(location, f"incomplete upload, or no model's folder: {marker} is missing")
    listed = found.pop(MANIFEST_NAME, None)
    if listed:
        found = _as_listed(location, found, _read(client, location, listed))
    if select:
        wanted = set(select(sorted(found), _read(client, location, index)))
        found = {path: file for path, file in found.items() if path in wanted}
    if not listed:
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="s3-head") as pool:
            heads = pool.map(lambda file: _head(client, location, file.path, file.key)[0], found.values())
            found = {file.path: file for file in heads}
    files = tuple(found[path] for path in sorted(found))
    content = msgspec.json.encode([(f.path, f.size, f.sha256 or f.etag) for f in files])
    return Plan(location, files, hashlib.sha256(content).hexdigest(), region)


def _check_paths(location: Location, found: Collection[str]) -> None:
    folders = {path[:at] for path in found for at, char in enumerate(path) if char == "/"}
    for path in found:
        unsafe = not is_safe_path(path) or not path.isprintable() or re.match(r"[A-Za-z]:", path)
        if unsafe or path in folders:
            why = "is also a folder" if path in folders else "is not a safe path"
            message = f"{location} holds an object whose name {why}: nothing was fetched."
            raise ApiError("ARCHIVE_UNSAFE", message, requested=ascii(path)[:200])


def _as_listed(location: Location, found: dict[str, RemoteFile], content: bytes) -> dict[str, RemoteFile]:
    try:
        entries = msgspec.json.decode(content, type=Manifest).files
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise missing(location, f"{MANIFEST_NAME} cannot be read; remove it or upload the model again") from None
    for entry in entries:
        if entry.path not in found or found[entry.path].size != entry.size:
            why = f"incomplete upload: {entry.path!a} is missing or has another size than {MANIFEST_NAME} says"
            raise missing(location, why)
    return {entry.path: msgspec.structs.replace(found[entry.path], sha256=_digest(entry.sha256)) for entry in entries}


def _read(client: Any, location: Location, file: RemoteFile) -> bytes:
    if file.size > _MAX_SMALL:
        raise ApiError("MODEL_CORRUPT", f"{file.path} of {location} is larger than {_MAX_SMALL} bytes.")
    # IfMatch: the file that was listed, not one that was put there since
    answer = client.get_object(Bucket=location.bucket, Key=file.key, IfMatch=file.etag)
    content: bytes = answer["Body"].read()
    return content


def _head(client: Any, location: Location, path: str, key: str) -> tuple[RemoteFile, str]:
    head = client.head_object(Bucket=location.bucket, Key=key, ChecksumMode="ENABLED")
    encrypted = "kms" in head.get("ServerSideEncryption", "") or "SSECustomerAlgorithm" in head
    md5 = None if encrypted else _MD5.fullmatch(head["ETag"])
    whole = head.get("ChecksumType") != "COMPOSITE"
    file = RemoteFile(
        path,
        key,
        head["ContentLength"],
        head["ETag"],
        sha256=_digest(head.get("Metadata", {}).get("sha256")) or _checksum(head, "ChecksumSHA256", whole),
        md5=md5[1] if md5 else None,
        crc32=_checksum(head, "ChecksumCRC32", whole),
    )
    return file, _region(head) or client.meta.region_name


def _digest(text: str | None) -> str | None:
    return text.lower() if text and _DIGEST.fullmatch(text.lower()) else None


def _checksum(head: dict[str, Any], name: str, whole: bool) -> str | None:
    value = head.get(name, "")
    # "…-3" is a checksum of three parts' checksums
    return b64decode(value).hex() if value and whole and "-" not in value else None


def _region(answer: dict[str, Any]) -> str:
    region: str = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region", "")
    return region if re.fullmatch(r"[a-z0-9-]{1,40}", region) else ""
