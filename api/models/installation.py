"""One installation of a model on the volume: from the lock to the rename into place."""

from __future__ import annotations

import contextlib
import errno
import stat
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec

from api.errors import ApiError
from api.models.locks import FileLock
from api.models.manifest import (
    MANIFEST_NAME,
    Manifest,
    examine,
    fsync,
    is_safe_path,
    missing_parts,
    read_manifest,
    size_problems,
    walk,
    write_manifest,
)

if TYPE_CHECKING:
    from api.models.volume import Volume

# what is in staging after one of these must not be built upon
_SPOILT = ("DISK_FULL", "MODEL_CORRUPT", "MODEL_BROKEN", "ARCHIVE_UNSAFE")
_IDENTITY = ".identity"


class Installation:
    """A context in which one model is put together; ``Volume.install`` makes it.

    When it is left without ``commit``, the staging folder stays for the next attempt to resume, except after
    DISK_FULL, MODEL_CORRUPT, MODEL_BROKEN and ARCHIVE_UNSAFE. ENOSPC from within becomes DISK_FULL.

    Attributes:
        key: the model's folder name.
        installed: the model's folder once it is there; set on entering if there is nothing to do.
        staging: the folder to write into, on the same file system; may hold files of an earlier attempt.
    """

    staging: Path

    def __init__(
        self,
        volume: Volume,
        key: str,
        accept: Callable[[Manifest], bool] | None,
        on_wait: Callable[[], None] | None,
    ) -> None:
        self.key = key
        self.installed: Path | None = None
        self._volume = volume
        self._accept = accept
        self._on_wait = on_wait
        self._lock = FileLock(volume.lock_path(key))

    def __enter__(self) -> Self:
        # what is there needs no lock: so a read-only volume serves it
        self.installed = self._present()
        if self.installed is None:
            try:
                self._start()
            except BaseException as fault:
                self._lock.release()
                if error := _disk_full(fault, self.key) or _read_only(fault, self.key):
                    raise error from fault
                raise
        return self

    def _start(self) -> None:
        self._volume.prepare()
        self._lock.acquire(on_wait=self._on_wait)
        self.installed = self._present()
        if self.installed is None:
            # where processes cannot lock each other out they must not write into one folder
            name = self.key if self._lock.between_processes else f"{self.key}~{uuid.uuid4().hex}"
            self.staging = self._volume.staging_root / name
            self.staging.mkdir(exist_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        full = _disk_full(fault, self.key)
        try:
            spoilt = full is not None or (isinstance(fault, ApiError) and fault.code in _SPOILT)
            # without locks nobody can tell that this staging folder is free to be resumed
            if self.installed is None and (spoilt or not self._lock.between_processes):
                self.abandon()
        finally:
            self._lock.release()
        if full:
            raise full from fault

    def _present(self) -> Path | None:
        folder = self._volume.find(self.key)
        if folder is None or self._accept is None:
            return folder
        manifest = read_manifest(folder)
        return folder if manifest is not None and self._accept(manifest) else None

    def expect(self, identity: str) -> bool:
        """Empty the staging folder unless it was begun for the same content; call it before writing.

        Args:
            identity: what identifies the content: commit, ETag, digest.

        Returns:
            Whether files of an earlier attempt may be continued.

        Raises:
            OSError: the folder cannot be written.
        """
        note = self.staging / _IDENTITY
        with contextlib.suppress(OSError):
            if note.read_bytes() == identity.encode():
                return True
        self._volume.discard(self.staging)
        self.staging.mkdir()
        note.write_bytes(identity.encode())
        return False

    def reserve(self, bytes_needed: int, leased: Callable[[], set[str]]) -> None:
        """Make room for the whole model; what is in staging already counts toward it.

        The room is kept until the installation ends, so that several at once do not count on the same bytes.

        Raises:
            ApiError: DISK_FULL. See ``Volume.reserve``.
        """
        self._volume.reserve(bytes_needed, leased, self)

    def note(self, bytes_needed: int) -> None:
        """Tell others how many bytes this installation will take in all."""
        self._lock.write_note(str(bytes_needed))

    def commit(self, manifest: Manifest, hashes: Mapping[str, str] | None = None) -> Path:
        """Check what is in the staging folder and put it into place.

        Files that the manifest does not list are removed. Files without a hash, given or computed, are read once.
        ``manifest.verified`` is taken as the caller says.

        Args:
            manifest: the files, with the hashes that the source gave.
            hashes: SHA-256 in hex by path, where computed during the transfer.

        Returns:
            The model's folder.

        Raises:
            ApiError: MODEL_CORRUPT when a file, its size, hash or header, or a part of the model is wrong.
            OSError: the disk failed or is full.
        """
        # a model that was pushed from a volume may bring the manifest it had there
        files = tuple(entry for entry in manifest.files if entry.path != MANIFEST_NAME)
        paths = {entry.path for entry in files}
        problems = [f"{path!r} is not a safe name" for path in sorted(paths) if not is_safe_path(path)]
        if len(paths) != len(files):
            problems.append("a file is listed twice")
        problems = problems or size_problems(self.staging, files)
        if not problems:
            folders = self._remove_all_but(paths)
            files, problems = examine(self.staging, files, hashes or {}, sync=True)
            problems += [] if manifest.adapter else missing_parts(self.staging, manifest.part)
        if problems:
            raise corrupt(manifest.model_id, f"from {manifest.source}", problems)
        for folder in folders:
            fsync(folder)
        manifest = msgspec.structs.replace(manifest, files=files)
        write_manifest(self.staging, manifest)
        self.installed = self._volume.place(self.staging, self.key, manifest)
        return self.installed

    def _remove_all_but(self, paths: set[str]) -> list[Path]:
        """Returns the folders that stay."""
        folders = []
        for path, status in walk(self.staging):
            if stat.S_ISDIR(status.st_mode):
                try:
                    (self.staging / path).rmdir()
                except OSError:
                    folders.append(self.staging / path)
            elif path not in paths:
                (self.staging / path).unlink()
        return folders

    def abandon(self) -> None:
        """Delete what was downloaded so far.

        Raises:
            OSError: it cannot be deleted.
        """
        self._volume.discard(self.staging)


def corrupt(model_id: str, origin: str, problems: list[str]) -> ApiError:
    """The error for a model whose content is wrong; it names the first problem."""
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return ApiError("MODEL_CORRUPT", f'"{model_id}" {origin} is damaged: {problems[0]}{more}.', requested=model_id)


def _disk_full(fault: BaseException | None, key: str) -> ApiError | None:
    if isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT):
        return ApiError("DISK_FULL", "The disk of the models folder is full (MODELS_DIR).", requested=key)
    return None


def _read_only(fault: BaseException, key: str) -> ApiError | None:
    if isinstance(fault, OSError) and fault.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        message = "The model is not on the volume, and nothing can be written there (MODELS_DIR)."
        return ApiError("MODEL_NOT_FOUND", message, requested=key)
    return None
