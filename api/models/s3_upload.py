"""Puts a model into S3-compatible storage so that it is there whole, or is not taken for a model."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from api.errors import ApiError
from api.models.locations import Location
from api.models.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    OnProgress,
    list_files,
    read_manifest,
    sha256_of,
    sizes_match,
    walk,
)
from api.models.s3 import MODEL_INDEX, Plan, resolve
from api.models.s3_client import Access, connect, faults

Pack = Callable[[Path, BinaryIO, OnProgress], object]
"""Writes a folder to a stream as ``.tar.zst`` and reports ``upload`` progress: ``api.models.archive_pack.pack``."""

_FILES_AT_ONCE = 4
_THRESHOLD = 32 * 2**20  # bytes from which a file is uploaded in parts
_PART = 16 * 2**20  # the transfer manager enlarges it where a file would have more than 10,000 parts
_STREAM_PART = 32 * 2**20  # held in memory, and at most 10,000 of them: an archive of 312 GiB
_STREAM_PARTS_AT_ONCE = 4


def upload(
    source: Path, location: Location, on_progress: OnProgress, access: Access | None = None, *, pack: Pack | None = None
) -> Plan:
    """Upload a model and look whether it arrived.

    A folder to a prefix: each file for itself. First an empty ``model_index.json``, which says at
    once when writing is not allowed and marks what lies there as incomplete; the real one comes last.
    Objects that are already there and belong to no file of the model are left, and the manifest,
    uploaded with it, leaves them out.
    A folder to an archive: packed while it is uploaded, nothing is written to the disk.
    A file to an archive or a checkpoint: as it is. One object appears when all of it has arrived.

    An upload that is killed can leave invisible parts in the bucket; a lifecycle rule
    (``AbortIncompleteMultipartUpload``) removes those.

    Args:
        source: the folder or file.
        location: of source ``s3``.
        on_progress: called with ``upload``, from several threads but never from two at once; what it
            raises ends the upload.
        access: by default from the environment.
        pack: needed for a folder to an archive.

    Raises:
        ApiError: SOURCE_DENIED, SOURCE_UNREACHABLE, MODEL_NOT_FOUND (no such bucket, or the folder
            holds no model), MODEL_CORRUPT (the folder is not what its manifest says; what arrived has
            another size), ARCHIVE_UNSAFE (a link in the folder), and what ``pack`` and ``on_progress`` raise.
        ValueError: the source does not fit the location.
    """
    is_folder, kind = source.is_dir(), location.kind
    client = connect(location, access)
    if is_folder and kind == "prefix":
        sent = _upload_folder(client, source, location, on_progress)
    elif is_folder and location.archive_kind == "tar.zst" and pack is not None:
        sent = _upload_packed(client, source, location, on_progress, pack)
    elif not is_folder and kind != "prefix":
        sent = _upload_file(client, source, location, on_progress)
    else:
        raise ValueError(f"a {'folder' if is_folder else 'file'} cannot be uploaded to {location}")
    plan = resolve(location, access)
    if plan.bytes != sent:
        raise ApiError("MODEL_CORRUPT", f"{location} has {plan.bytes} bytes after an upload of {sent}.")
    return plan


def can_upload_folder(location: Location) -> bool:
    """Whether a model's folder can be put there: into a prefix, or as ``.tar.zst``."""
    return location.source == "s3" and (location.kind == "prefix" or location.archive_kind == "tar.zst")


class _Stopped(Exception):
    """Ends a transfer. What ended it may be no ``Exception``, and the transfer manager hangs on those."""


class _Progress:
    """Adds up what several threads sent; remembers why it was told to stop."""

    def __init__(self, on_progress: OnProgress, total: int) -> None:
        self._on_progress, self._total, self._done = on_progress, total, 0
        self._lock = threading.Lock()
        self.stopped: BaseException | None = None

    def __call__(self, sent: int) -> None:
        """Count bytes sent; negative where a part begins again."""
        with self._lock:
            if self.stopped is None:
                self._done += sent
                try:
                    self._on_progress("upload", self._done, self._total)
                except BaseException as fault:
                    self.stopped = fault
            if self.stopped is not None:
                raise _Stopped

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Raises what stopped the transfer first, whatever the libraries in between made of it."""
        try:
            yield
        except Exception as fault:
            if self.stopped is not None and fault is not self.stopped:
                raise self.stopped from None
            raise

    def stop(self, fault: BaseException) -> None:
        """Let the other threads end at their next byte."""
        with self._lock:
            self.stopped = self.stopped or fault


def _upload_file(client: Any, source: Path, location: Location, on_progress: OnProgress) -> int:
    size = source.stat().st_size
    progress = _Progress(on_progress, size)
    with progress.told(), faults(location, writing=True):
        _put(client, location, location.key, source, sha256_of(source), progress)
    return size


def _put(client: Any, location: Location, key: str, source: Path, sha256: str, progress: _Progress) -> None:
    # the digest as metadata: every service keeps that, few compute checksums
    extra = {"Metadata": {"sha256": sha256}}
    client.upload_file(str(source), location.bucket, key, ExtraArgs=extra, Callback=progress, Config=_transfer())


def _transfer(**more: Any) -> Any:
    from boto3.s3.transfer import TransferConfig

    settings = {"multipart_threshold": _THRESHOLD, "multipart_chunksize": _PART, "max_concurrency": 4}
    return TransferConfig(preferred_transfer_client="classic", **{**settings, **more})


def _upload_folder(client: Any, folder: Path, location: Location, on_progress: OnProgress) -> int:
    manifest = _manifest_of(folder, location)
    total = sum(entry.size for entry in manifest.files)
    progress = _Progress(on_progress, total)
    by_path = {entry.path: entry for entry in manifest.files}
    index = by_path.pop(MODEL_INDEX)

    def put(entry: FileEntry) -> None:
        assert entry.sha256
        try:
            with faults(location, writing=True):
                _put(client, location, location.key + entry.path, folder / entry.path, entry.sha256, progress)
        except BaseException as fault:
            progress.stop(fault)
            raise

    with progress.told(), faults(location, writing=True):
        client.put_object(Bucket=location.bucket, Key=location.key + MODEL_INDEX, Body=b"")
        pool = ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="s3-put")
        try:
            # the large ones first, so that none of them is left alone at the end
            largest = sorted(by_path.values(), key=lambda entry: -entry.size)
            for done in as_completed([pool.submit(put, entry) for entry in largest]):
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)
        body = msgspec.json.encode(manifest)
        client.put_object(Bucket=location.bucket, Key=location.key + MANIFEST_NAME, Body=body)
        put(index)
    return total


def _manifest_of(folder: Path, location: Location) -> Manifest:
    """The folder's manifest, or one made for it, with the SHA-256 of every file."""
    manifest = read_manifest(folder)
    if manifest is None:
        for path, status in walk(folder):
            # left out, it would make the model incomplete; followed, it could lead anywhere
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise ApiError("ARCHIVE_UNSAFE", f"{path} of {folder.name} is neither a file nor a folder.")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = Manifest("", str(location), "", "", list_files(folder), False, now)
    elif not sizes_match(folder, manifest.files):
        raise ApiError("MODEL_CORRUPT", f"{folder.name} is not what its manifest says; verify or install it again.")
    if not any(entry.path == MODEL_INDEX and entry.size for entry in manifest.files):
        raise ApiError("MODEL_NOT_FOUND", f"{folder.name} is no model's folder: {MODEL_INDEX} is missing.")
    files = tuple(
        entry if entry.sha256 else msgspec.structs.replace(entry, sha256=sha256_of(folder / entry.path))
        for entry in manifest.files
    )
    return msgspec.structs.replace(manifest, files=files)


class _Packed:
    """What ``pack`` writes, as a file to read.

    Where ``pack`` failed, ``read`` raises instead of ending: half an archive is never completed. Where
    the service refused a part, it raises too: the transfer manager would read on to the end.
    """

    def __init__(self, pack: Pack, folder: Path, on_progress: OnProgress) -> None:
        readable, writable = os.pipe()
        self._from = os.fdopen(readable, "rb", buffering=2**20)
        self._fault: BaseException | None = None
        self.size = 0
        self.refused: Exception | None = None
        self._thread = threading.Thread(
            target=self._run, args=(pack, folder, os.fdopen(writable, "wb", buffering=2**20), on_progress), daemon=True
        )
        self._thread.start()

    def _run(self, pack: Pack, folder: Path, out: BinaryIO, on_progress: OnProgress) -> None:
        try:
            with out:
                pack(folder, out, on_progress)
        except BaseException as fault:
            self._fault = fault

    def read(self, size: int = -1) -> bytes:
        data = self._from.read(size)
        self.size += len(data)
        if self.refused is not None:
            raise _Stopped
        if size < 0 or len(data) < size:
            self._thread.join()
            if self._fault is not None:
                raise _Stopped
        return data

    def close(self) -> None:
        self._from.close()
        self._thread.join()

    def check(self) -> None:
        """Raise what ``pack`` raised, unless that was only that nobody reads any more."""
        if self._fault is not None and not isinstance(self._fault, BrokenPipeError):
            raise self._fault from None


def _upload_packed(client: Any, folder: Path, location: Location, on_progress: OnProgress, pack: Pack) -> int:
    from botocore.exceptions import ClientError  # type: ignore[import-untyped]

    packed = _Packed(pack, folder, on_progress)

    def answered(http_response: Any, parsed: Any, model: Any, **_: Any) -> None:
        if http_response.status_code >= 300:
            packed.refused = ClientError(parsed, model.name)

    def failed(exception: Exception, **_: Any) -> None:
        packed.refused = exception

    client.meta.events.register("after-call.s3", answered)
    client.meta.events.register("after-call-error.s3", failed)
    config = _transfer(multipart_chunksize=_STREAM_PART, max_concurrency=_STREAM_PARTS_AT_ONCE)
    try:
        with faults(location, writing=True):
            try:
                client.upload_fileobj(packed, location.bucket, location.key, Config=config)
            except _Stopped:
                if packed.refused is not None:
                    raise packed.refused from None
                raise
    finally:
        packed.close()
        packed.check()
    return packed.size
